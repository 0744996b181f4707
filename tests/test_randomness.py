"""Contract, point 2: all passes see the same random numbers, and the step uses up those of one pass."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from gam_helpers import METHODS, PASSES, batch, closure_of, make, mlp, regression, trainer
from torch import nn


class WatchedDropout(nn.Dropout):
    """Remembers which elements it kept."""

    def __init__(self):
        super().__init__(0.5)
        self.masks = []

    def forward(self, x):
        self.masks.append(super().forward(torch.ones_like(x)))
        return x * self.masks[-1]


def dropout_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 16), nn.Tanh(), WatchedDropout(), nn.Linear(16, 2))


@pytest.mark.parametrize("method", METHODS)
def test_dropout_masks_are_the_same_in_all_passes(method):
    model = dropout_net()
    optimizer, closure = trainer(method, model, regression(model, *batch()))
    steps = []
    for _ in range(3):
        model[2].masks.clear()
        optimizer.step(closure)
        masks = list(model[2].masks)
        assert len(masks) == PASSES[method]
        assert all(torch.equal(m, masks[0]) for m in masks)
        steps.append(masks[0])
    assert not torch.equal(steps[0], steps[1])
    assert not torch.equal(steps[1], steps[2])


@pytest.mark.parametrize("oracle_method", ["finite_difference", "exact"])
def test_the_oracles_own_pass_is_replayed_too(oracle_method):
    model = dropout_net()
    optimizer, closure = trainer(oracle_method, model, regression(model, *batch()), oracle="sam", sam_rho=0.3)
    optimizer.step(closure)
    assert len(model[2].masks) == PASSES[oracle_method] + 1
    assert all(torch.equal(m, model[2].masks[0]) for m in model[2].masks)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop], ids=lambda b: b.__name__)
@pytest.mark.parametrize("method", METHODS)
def test_the_step_leaves_the_state_that_one_plain_pass_leaves(method, base):
    model = dropout_net()
    plain = copy.deepcopy(model)
    x, y = batch()
    optimizer, closure = trainer(method, model, regression(model, x, y), base)
    torch.manual_seed(7)
    for _ in range(3):
        regression(plain, x, y)().backward()
    expected = torch.get_rng_state()
    torch.manual_seed(7)
    for _ in range(3):
        optimizer.step(closure)
    assert torch.equal(torch.get_rng_state(), expected)


@pytest.mark.parametrize("method", METHODS)
def test_noise_drawn_by_the_closure_itself_is_replayed(method):
    model = mlp()
    x, y = batch()
    drawn = []

    def noisy():
        drawn.append(torch.randn_like(x))
        return regression(model, x + 0.1 * drawn[-1], y)()

    optimizer, closure = trainer(method, model, noisy)
    optimizer.step(closure)
    assert len(drawn) == PASSES[method]
    assert all(torch.equal(d, drawn[0]) for d in drawn)


def test_interval_off_steps_draw_once():
    model = dropout_net()
    optimizer, closure = trainer("finite_difference", model, regression(model, *batch()), interval=3)
    for _ in range(3):
        optimizer.step(closure)
    masks = model[2].masks
    assert len(masks) == 4 + 1 + 1
    assert all(torch.equal(m, masks[0]) for m in masks[:4])
    assert not torch.equal(masks[4], masks[0])
    assert not torch.equal(masks[5], masks[4])


@pytest.mark.parametrize("method", ["sam", "finite_difference", "accelerated"])
def test_preserve_rng_state_false_draws_anew_in_each_pass(method):
    model = dropout_net()
    optimizer, closure = trainer(method, model, regression(model, *batch()), preserve_rng_state=False)
    optimizer.step(closure)
    masks = model[2].masks
    assert len(masks) == PASSES[method]
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(masks))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stochastic_rounding_leaves_the_users_generator_alone(dtype):
    model = mlp(dtype)
    optimizer = make(model.parameters())
    closure = closure_of(optimizer, regression(model, *batch(dtype=dtype)))
    before = torch.get_rng_state()
    for _ in range(3):
        optimizer.step(closure)
    assert torch.equal(torch.get_rng_state(), before)
