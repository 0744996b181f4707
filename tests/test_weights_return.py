"""Contract, point 1: weights return bit for bit, and their storage never changes."""

from __future__ import annotations

import pytest
import torch
from gam_helpers import METHODS, PASSES, backend_params, batch, closure_of, make, mlp, regression, same, trainer, weights
from torch import nn


def awkward_mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Weights that subtraction cannot give back: huge, tiny, subnormal, negative zero."""
    model = mlp(dtype)
    with torch.no_grad():
        model[0].weight[0] = torch.tensor([-0.0, 0.0, 3e4 if dtype == torch.float16 else 3e7])
        model[0].weight[1] = torch.tensor([1e-30, -1e-6, 1.2345678])
        model[0].bias[0] = torch.finfo(dtype).tiny / 2
        model[2].bias[0] = -0.0
    return model


BASES = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 1e-2}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 1e-2}),
    "adam": (torch.optim.Adam, {"weight_decay": 1e-2}),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_thousand_steps_at_lr_0_change_no_bit(method):
    model = awkward_mlp()
    optimizer, closure = trainer(method, model, regression(model, *batch()), lr=0.0)
    before = weights(optimizer)
    for _ in range(1000):
        optimizer.step(closure)
    same(weights(optimizer), before)


@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_lr_0_in_every_backend_dtype_and_base(method, base, dtype, backend):
    model = awkward_mlp(dtype)
    kind, options = BASES[base]
    optimizer, closure = trainer(
        method, model, regression(model, *batch(dtype=dtype)), kind, lr=0.0, backend=backend, **options
    )
    before = weights(optimizer)
    for _ in range(5):
        optimizer.step(closure)
    same(weights(optimizer), before)
    assert int(optimizer.skipped_steps) == 0


FOR_ALL_METHODS = [{"rho": 100.0}, {"adaptive": True}, {"max_grad_norm": 0.1}, {"interval": 2}, {"flatten": True}]
OPTIONS = [(method, options) for method in METHODS for options in FOR_ALL_METHODS]
OPTIONS += [(method, {"oracle": "sam", "sam_rho": 0.3}) for method in ("finite_difference", "exact")]


@pytest.mark.parametrize(
    ("method", "options"), OPTIONS, ids=lambda o: o if isinstance(o, str) else "-".join(f"{k}={v}" for k, v in o.items())
)
def test_lr_0_with_every_option(method, options):
    model = awkward_mlp()
    loss_fn = regression(model, *batch())
    groups = [
        {"params": [model[0].weight], "rho": 0.5},
        {"params": [model[0].bias, model[2].weight]},
        {"params": [model[2].bias], "perturb": False},
    ]
    optimizer, closure = trainer(method, model, loss_fn, params=groups, lr=0.0, **options)
    before = weights(optimizer)
    for _ in range(20):
        optimizer.step(closure)
    same(weights(optimizer), before)


@pytest.mark.parametrize("base", [torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.NAdam], ids=lambda b: b.__name__)
@pytest.mark.parametrize("method", METHODS)
def test_a_foreign_base_at_lr_0_changes_no_bit(method, base):
    model = mlp()  # no zeros here: torch's own update turns -0.0 into 0.0
    optimizer, closure = trainer(method, model, regression(model, *batch()), base, lr=0.0)
    before = weights(optimizer)
    for _ in range(50):
        optimizer.step(closure)
    same(weights(optimizer), before)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop], ids=lambda b: b.__name__)
@pytest.mark.parametrize("method", METHODS)
def test_storage_never_changes_in_any_pass(method, base):
    model = mlp()
    loss_fn = regression(model, *batch())
    seen = []

    def watched():
        seen.append([(p.data_ptr(), p.untyped_storage().data_ptr(), p.stride()) for p in model.parameters()])
        return loss_fn()

    optimizer, closure = trainer(method, model, watched, base, lr=0.01)
    objects = list(model.parameters())
    for _ in range(5):
        optimizer.step(closure)
    watched()
    assert all(s == seen[0] for s in seen)
    assert len(seen) == 5 * PASSES[method] + 1
    assert all(p is q for p, q in zip(objects, model.parameters(), strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_pass_1_runs_at_theta_and_the_others_elsewhere(method):
    model = mlp()
    loss_fn = regression(model, *batch())
    seen = []

    def watched():
        seen.append(weights(optimizer))
        return loss_fn()

    optimizer, closure = trainer(method, model, watched)
    optimizer.step(closure)
    for _ in range(3):
        before = weights(optimizer)
        seen.clear()
        optimizer.step(closure)
        same(seen[0], before)
        assert all(any(not torch.equal(a, b) for a, b in zip(s, before, strict=True)) for s in seen[1:])


@pytest.mark.parametrize("method", METHODS)
def test_replicas_stay_equal(method):
    """Two copies that see the same gradients are the same after many steps: nothing depends on addresses or history."""
    results = []
    for _ in range(2):
        model = mlp()
        optimizer, closure = trainer(method, model, regression(model, *batch()))
        for _ in range(50):
            optimizer.step(closure)
        results.append(weights(optimizer))
    same(*results)


def test_a_thousand_steps_between_updates_leave_the_update_alone():
    """Steps at lr 0 followed by one real step: the same as the one real step (base without state)."""
    results = []
    for idle in (0, 100):
        model = mlp()
        optimizer = make(model.parameters(), momentum=0.0, lr=0.0)
        closure = closure_of(optimizer, regression(model, *batch()))
        for _ in range(idle):
            optimizer.step(closure)
        optimizer.param_groups[0]["lr"] = 0.1
        optimizer.step(closure)
        results.append(weights(optimizer))
    same(*results)
