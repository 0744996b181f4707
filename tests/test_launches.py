"""A step on a device launches as many kernels for many tensors as for few, those of the torch backend included."""

from __future__ import annotations

import pytest
import torch
from gam_helpers import METHODS, make
from test_never_waits import closure_for, parameters, watched  # noqa: F401
from torch.optim import SGD, AdamW

from gam_fused.backends import batches

FIRST_ORDER = [m for m in METHODS if m != "exact"]
OPTIONS = {
    "sgd": {"base": SGD, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "adamw": {"base": AdamW, "amsgrad": True},
    "bfloat16": {"base": AdamW, "dtype": torch.bfloat16},
    "adaptive": {"adaptive": True, "momentum": 0.0},
    "clipped": {"max_grad_norm": 1.0, "momentum": 0.0},
}


def launches(watch, count, method, *, dtype=torch.float32, missing=(), groups=1, backend="torch", **options):
    """In one step, of `count` tensors of all kinds of shapes; by line of the package, and operator."""
    shapes = ([(4, 3), (4,), (), (2, 3, 2)] * count)[:count]
    params = parameters(shapes, dtype)
    for p in params[3::4]:
        p.data = p.data.permute(2, 0, 1)  # dense, in another order
    given = [{"params": params[i::groups], "lr": 0.1 + i} for i in range(groups)]
    optimizer = make(given, method=method, backend=backend, **options)
    closure = closure_for(optimizer, missing=missing)
    for _ in range(2):
        optimizer.step(closure)
    watch.launches.clear()
    optimizer.step(closure)
    return dict(watch.launches)


@pytest.fixture
def watch(watched):  # noqa: F811
    return watched


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("method", FIRST_ORDER)
def test_many_tensors_take_no_more_launches_than_few(watch, method, option):
    few, many = (launches(watch, count, method, **OPTIONS[option]) for count in (4, 24))
    assert few == many
    assert 40 < sum(few.values()) < 600


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_nor_does_what_surrounds_other_backends_kernels(watch, backend):
    for method in FIRST_ORDER:
        few, many = (launches(watch, n, method, dtype=torch.bfloat16, backend=backend, base=AdamW) for n in (4, 24))
        assert few == many
        assert sum(few.values()) < 20


@pytest.mark.parametrize("method", FIRST_ORDER)
def test_nor_do_groups_of_many(watch, method):
    few, many = (launches(watch, count, method, groups=3, base=AdamW) for count in (12, 36))
    assert few == many


@pytest.mark.parametrize(("base", "dtype"), [(SGD, torch.bfloat16), (AdamW, torch.float32)], ids=str)
@pytest.mark.parametrize("method", FIRST_ORDER)
def test_nor_do_gradients_that_are_missing(watch, method, base, dtype):
    few, many = (launches(watch, n, method, base=base, dtype=dtype, missing=range(1, n, 3)) for n in (8, 24))
    assert few == many


def test_launches_grow_with_elements_where_these_are_many(watch, monkeypatch):
    """Temporaries are as large as a batch, not as the model."""
    monkeypatch.setattr(batches, "VECTORS", 60)
    assert sum(launches(watch, 40, "sam").values()) > 2 * sum(launches(watch, 4, "sam").values())
