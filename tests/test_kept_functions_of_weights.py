"""Casts of autocast and weights of `parametrize.cached()`: contexts around a step keep none of perturbed weights."""

from __future__ import annotations

import pytest
import torch
from gam_helpers import METHODS, PASSES, batch, make, mlp, regression, same, weights
from torch import nn
from torch.nn.utils import parametrize

from gam_fused import finite_difference_hvp

WIDE = {"rho": 3.0}  # perturbs by more than bfloat16 rounds away


class Shifted(nn.Module):
    """A parametrization whose backward needs nothing saved, so that nothing tells that an old weight is used."""

    def forward(self, weight):
        return weight.flip(0) + 1


def parametrized(seed: int = 0) -> nn.Sequential:
    model = mlp(torch.float64, seed=seed)
    parametrize.register_parametrization(model[0], "weight", Shifted())
    return model


def around_autocast():
    return torch.autocast("cpu", torch.bfloat16)


CONTEXTS = {"autocast": (mlp, around_autocast), "parametrize.cached": (parametrized, parametrize.cached)}


@pytest.mark.parametrize("where", CONTEXTS)
@pytest.mark.parametrize("method", METHODS)
def test_a_forward_after_the_step_sees_the_new_weights(method, where):
    model_of, around = CONTEXTS[where]
    model = model_of()
    x, y = batch(dtype=model[2].weight.dtype)
    optimizer = make(model.parameters(), method=method, **WIDE)
    with around():
        optimizer.step(regression(model, x, y))
        inside = model(x)
    with around():
        assert torch.equal(inside, model(x))


@pytest.mark.parametrize("where", CONTEXTS)
@pytest.mark.parametrize("k", range(PASSES["finite_difference"]))
def test_a_forward_after_a_failure_sees_the_old_weights(k, where):
    model_of, around = CONTEXTS[where]
    model = model_of()
    x, y = batch(dtype=model[2].weight.dtype)
    optimizer, passes, loss_fn = make(model.parameters(), **WIDE), [], regression(model, x, y)
    with around():
        expected = model(x)

    def closure():
        passes.append(k)
        loss = loss_fn()
        if len(passes) > k:
            raise ValueError("boom")
        return loss

    with around():
        with pytest.raises(ValueError, match="boom"):
            optimizer.step(closure)
        inside = model(x)
    assert torch.equal(inside, expected)


@pytest.mark.parametrize("method", METHODS)
def test_parametrized_weights_are_computed_anew_in_every_pass(method):
    ends = []
    for around in (False, True):
        model = parametrized()
        optimizer = make(model.parameters(), method=method)
        for _ in range(3):
            if around:
                with parametrize.cached():
                    optimizer.step(regression(model, *batch(dtype=torch.float64)))
            else:
                optimizer.step(regression(model, *batch(dtype=torch.float64)))
        ends.append(weights(optimizer))
    same(ends[1], ends[0])


def test_products_see_weights_of_their_own_point():
    model = parametrized()
    params = list(model.parameters())
    loss_fn, vector = regression(model, *batch(dtype=torch.float64)), [torch.ones_like(p) for p in params]
    expected = finite_difference_hvp(loss_fn, params, vector)
    with parametrize.cached():
        products = finite_difference_hvp(loss_fn, params, vector)
    same(products, expected)
