"""Param groups as timm makes them: lists without weight decay, layer-wise lr_scale and names, optimizers it has built."""

from __future__ import annotations

import importlib

import pytest
import torch
from gam_helpers import batch, close, closure_of, make, mixed_net, regression, same, weights

from gam_fused import FusedGAM

OPTIONS = {"lr": 0.05, "momentum": 0.9, "nesterov": True}  # what timm's "sgd" is


def no_weight_decay(model):
    """`param_groups_weight_decay`: 1-D parameters and biases first."""
    plain = [p for n, p in model.named_parameters() if p.ndim <= 1 or n.endswith(".bias")]
    return [
        {"params": plain, "weight_decay": 0.0},
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
    ]


def layer_decay(model):
    """`param_groups_layer_decay`: one group per layer and kind, with the names of its parameters."""
    return [
        {"lr_scale": 0.5**i, "weight_decay": 0.1 * (p.ndim > 1), "param_names": [n], "params": [p], "lr": 0.05 * 0.5**i}
        for i, (n, p) in enumerate(model.named_parameters())
    ]


GROUPS = [no_weight_decay, layer_decay]


def timms_optim():
    importlib.import_module("paper_recipes")  # finds timm, or skips
    return importlib.import_module("timm.optim")


def timms_own(model):
    return timms_optim().param_groups_weight_decay(model, 0.1)


@pytest.mark.parametrize("groups", [*GROUPS, timms_own])
def test_groups_are_those_of_the_base_optimizer(groups):
    """With alpha = 0 the update is the base optimizer's: what timm's groups say is what happens."""
    results = []
    for kind in ("base", "gam"):
        model = mixed_net().double()
        model[3].p = 0.0
        optimizer = torch.optim.SGD(groups(model), **OPTIONS)
        if kind == "gam":
            optimizer = make(groups(model), alpha=0.0, model=model, **OPTIONS)
            for mine, given in zip(optimizer.param_groups, groups(model), strict=True):
                assert all(mine[k] == v for k, v in given.items() if k != "params")
        loss_fn = regression(model, *batch(dtype=torch.float64))
        for epoch in range(4):
            for group in optimizer.param_groups:  # timm's schedulers
                group["lr"] = 0.05 / (1 + epoch) * group.get("lr_scale", 1.0)
            optimizer.step(closure_of(optimizer, loss_fn))
        results.append(list(model.parameters()))
    close(*results, 1e-9)


@pytest.mark.parametrize("groups", GROUPS)
def test_an_optimizer_that_was_built_elsewhere(groups):
    """`create_optimizer_v2` gives an instance."""
    results = []
    for given in (False, True):
        model = mixed_net()
        options = {"rho": 0.1, "rho_prime": 0.05, "alpha": 0.7, "model": model}
        if given:
            optimizer = FusedGAM(None, torch.optim.SGD(groups(model), **OPTIONS), **options)
        else:
            optimizer = FusedGAM(groups(model), torch.optim.SGD, **OPTIONS, **options)
        torch.manual_seed(4)
        for _ in range(3):
            optimizer.step(regression(model, *batch()))
        results.append(weights(optimizer))
    same(*results)


def test_an_optimizer_that_timm_has_built():
    model = mixed_net()
    optimizer = FusedGAM(None, timms_optim().create_optimizer_v2(model, "adamw", lr=0.01, weight_decay=0.1), model=model)
    loss_fn = regression(model, *batch())
    first, *_, last = (float(optimizer.step(loss_fn)) for _ in range(30))
    assert last < first
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize(("name", "options"), [("param_groups", {}), ("compiled", {"backend": "aot_eager"})])
def test_the_examples(name, options):
    pytest.importorskip("sklearn", reason="needs the package scikit-learn")
    if name == "compiled" and torch.cuda.is_available():
        options = {}
    assert importlib.import_module(f"examples.loops.{name}").train(epochs=4, limit=256, **options) > 0.4


def test_an_entry_that_goes_missing_comes_back_with_the_value_it_had():
    model = mixed_net()
    optimizer = make(model.parameters(), rho=0.3, model=model)
    closure = closure_of(optimizer, regression(model, *batch()))
    optimizer.param_groups[0]["rho"] = 0.2
    optimizer.step(closure)
    for _ in range(2):  # as with a hook that rebuilds the groups before every step
        del optimizer.param_groups[0]["rho"]
        optimizer.step(closure)
        assert optimizer.param_groups[0]["rho"] == 0.2


def test_a_parameter_put_into_a_group_is_checked():
    model = mixed_net()
    optimizer = make(model.parameters(), model=model)
    number = len(optimizer.param_groups[0]["params"])
    optimizer.param_groups[0]["params"].append(torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64)))
    with pytest.raises(TypeError, match=rf"parameter {number} of group 0 .*complex64"):
        optimizer.step(closure_of(optimizer, regression(model, *batch())))


def test_perturb_can_be_changed_between_steps():
    model = mixed_net().eval()
    optimizer = make([{"params": model[0].parameters()}, {"params": model[4].parameters()}], model=model, lr=0.0)
    points, loss_fn = [], regression(model, *batch())

    def closure():
        points.append([torch.cat([p.detach().flatten() for p in model[i].parameters()]) for i in (0, 4)])
        return loss_fn()

    for perturb in (True, False, True):
        optimizer.param_groups[1]["perturb"] = perturb
        points.clear()
        optimizer.step(closure)
        assert not torch.equal(points[1][0], points[0][0])
        assert torch.equal(points[1][1], points[0][1]) is not perturb
        counted = [b - a for a, b in zip(*points[:2], strict=True)][: 2 if perturb else 1]
        assert torch.cat(counted).norm().item() == pytest.approx(optimizer.rho_prime, rel=1e-4)
