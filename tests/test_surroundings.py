"""What is set around a step: default device and dtype, inference mode, what closures return, meta parameters, subclasses."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from gam_helpers import METHODS, backend_params, batch, make, mlp, regression, same, trainer, weights
from torch.optim import SGD, AdamW, NAdam

from gam_fused import FusedGAM, flatness
from gam_fused.step import precision


@pytest.fixture
def default_device():
    yield torch.set_default_device
    torch.set_default_device(None)


@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize("base", [SGD, AdamW], ids=lambda b: b.__name__)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_default_device_changes_nothing(method, base, dtype, backend, default_device):
    """ "cuda:99" stands for any other device: nothing of ours may be made there."""
    ends = []
    for device in (None, "cuda:99", "meta"):
        model = mlp(dtype)
        options = {"lr": 0.01, "backend": backend, "max_grad_norm": 0.1, "adaptive": True}
        optimizer, closure = trainer(method, model, regression(model, *batch(dtype=dtype)), base, **options)
        default_device(device)
        for _ in range(2):
            optimizer.step(closure)
        optimizer.diagnostics()
        saved = optimizer.state_dict()
        optimizer.load_state_dict(saved)
        optimizer.step(closure)
        default_device(None)
        ends.append(weights(optimizer))
    same(ends[1], ends[0])
    same(ends[2], ends[0])


def test_a_constructor_under_another_default_device(default_device):
    model = mlp()
    default_device("cuda:99")
    optimizer = FusedGAM(model.parameters(), AdamW, lr=0.1, model=model, flatten=True)
    default_device(None)
    optimizer.step(regression(model, *batch()))


def test_measures_of_flatness_under_another_default_device(default_device):
    model = mlp()
    loss = regression(model, *batch())
    default_device("cuda:99")
    params = list(model.parameters())
    flatness.zeroth_order_flatness(loss, params, 0.1, steps=2)
    flatness.first_order_flatness(loss, params, 0.1, steps=2)
    flatness.hessian_eigenvalues(loss, params, k=1)
    flatness.hessian_trace(loss, params, samples=2)
    flatness.loss_landscape(loss, params, radius=0.1, points=3)
    flatness.local_minima_density(loss, params, directions=2, step=0.05)


CALLS = {
    "prepare": lambda o: o.prepare(),
    "save and load": lambda o: o.load_state_dict(o.state_dict()),
    "diagnostics": lambda o: (o.skipped_steps, o.session.last and o.diagnostics(), o.zero_grad()),
    "grad_scaler": lambda o: setattr(o, "grad_scaler", o.grad_scaler or torch.amp.GradScaler("cpu")),
    "entries": lambda o: (o.param_groups[0].update(lr=0.02), o.prepare()),
}


@pytest.mark.parametrize("flatten", [False, True], ids=["", "flat"])
@pytest.mark.parametrize("base", [SGD, AdamW, NAdam], ids=lambda b: b.__name__)
@pytest.mark.parametrize("call", CALLS)
def test_what_is_called_in_inference_mode_spoils_no_step(call, base, flatten):
    found = []
    for mode in (torch.inference_mode, torch.no_grad):
        model = mlp()
        with mode():
            optimizer = make(model.parameters(), base, flatten=flatten, lr=0.01)
        for _ in range(3):
            with mode():
                CALLS[call](optimizer)
            optimizer.step(regression(model, *batch()))
            if optimizer.grad_scaler:
                optimizer.grad_scaler.update()
        found.append(weights(optimizer))
    same(*found)


@pytest.mark.parametrize("kind", ["tuple", "list", "dict", "loss"])
@pytest.mark.parametrize("method", [m for m in METHODS if m != "exact"])
def test_what_the_closure_returns_is_not_kept(method, kind):
    model, seen = mlp(), []
    optimizer = make(model.parameters(), method=method)
    x, y = batch()

    def closure():
        out = model(x)
        seen.append(weakref.ref(out))
        loss = (out - y).square().mean()
        loss.backward()
        kinds = {
            "tuple": (loss.detach(), out),
            "list": [loss.detach(), out],
            "dict": {"loss": loss, "out": out},
            "loss": loss,
        }
        return kinds[kind]

    returned = optimizer.step(closure)
    gc.collect()
    assert all(r() is None for r in seen), "what comes back is detached: no graph either"
    if kind in ("tuple", "list"):
        assert optimizer.diagnostics()["loss"] == returned[0].double()
    held = weakref.ref(returned if kind == "loss" else returned["out"] if kind == "dict" else returned[1])
    del returned
    gc.collect()
    assert held() is None


def test_meta_parameters_are_named():
    model = torch.nn.Linear(3, 2, device="meta")
    optimizer = FusedGAM(model.parameters(), SGD, lr=0.1)
    with pytest.raises((RuntimeError, ValueError), match=r"parameter 0 of group 0 .*meta"):
        optimizer.step(lambda: model(torch.ones(1, 3, device="meta")).sum())


def test_a_parameter_whose_class_hides_its_memory_is_named():
    class Wrapped(torch.Tensor):
        @staticmethod
        def __new__(cls, inner):
            return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, requires_grad=True)

        def __init__(self, inner):
            self.inner = inner

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            def unwrap(t):
                return t.inner if isinstance(t, Wrapped) else t

            return func(*[unwrap(a) for a in args], **(kwargs or {}))

    p = Wrapped(torch.ones(3))
    with pytest.raises(TypeError, match=r"parameter 0 of group 0 .*Wrapped"):
        FusedGAM([p], SGD, lr=0.1).step(lambda: p.sum())


@pytest.mark.parametrize("form", ["tensors", "groups", "added"])
def test_duplicates_are_named(form):
    p = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"parameter 0 of group 0 .*twice|more than one"):  # noqa: PT012
        if form == "tensors":
            FusedGAM([p, p], SGD, lr=0.1)
        elif form == "groups":
            FusedGAM([{"params": [p, p]}], SGD, lr=0.1)
        else:
            FusedGAM([p], SGD, lr=0.1).add_param_group({"params": [p]})


def test_flatten_after_channels_last():
    model = torch.nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    twin = torch.nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    twin.load_state_dict(model.state_dict())
    x = torch.randn(2, 4, 5, 5)
    ends = []
    for m, flat in ((model, True), (twin, False)):
        optimizer = FusedGAM(m.parameters(), SGD, lr=0.1, momentum=0.9, flatten=flat)
        for i in range(4):
            if i == 2:
                m.to(memory_format=torch.contiguous_format)
            if i == 3:
                m.to(memory_format=torch.channels_last)
            optimizer.step(lambda m=m: m(x).square().mean())
        ends.append(weights(optimizer))
    same(ends[0], ends[1])


@pytest.fixture
def switches():
    """The switches of TF32 as they are now: those of one backend, and of one kind of operator, follow the general one."""
    every = [torch.backends, torch.backends.cudnn, torch.backends.cuda.matmul, torch.backends.cudnn.conv]
    before = [switch.fp32_precision for switch in every]
    yield dict(zip(("all", "cudnn", "matmul", "conv"), every, strict=True))
    for switch, value in zip(every, before, strict=True):
        switch.fp32_precision = value


@pytest.mark.parametrize(
    ("settings", "eps"),
    [
        ({}, precision.TF32_EPS),  # convolutions
        ({"matmul": "tf32", "conv": "ieee"}, precision.TF32_EPS),
        ({"matmul": "ieee", "conv": "tf32"}, precision.TF32_EPS),
        ({"matmul": "ieee", "conv": "ieee"}, torch.finfo(torch.float32).eps),
        ({"matmul": "none", "conv": "none", "all": "tf32"}, precision.TF32_EPS),
        ({"matmul": "none", "conv": "none", "all": "ieee"}, torch.finfo(torch.float32).eps),
    ],
    ids=str,
)
def test_either_way_of_setting_tf32(switches, settings, eps):
    """torch raises where one is read by the old switches after it was set by the new ones."""
    model = mlp()
    optimizer, closure = trainer("finite_difference", model, regression(model, *batch()))
    optimizer.step(closure)
    for name, value in settings.items():
        switches[name].fp32_precision = value
    record = copy.copy(optimizer.session.last)
    record.blocks = [SimpleNamespace(dtype=torch.float32, shared=SimpleNamespace(device=torch.device("cuda")))]
    assert precision._forward_eps(record, 0.0) == eps


def test_no_combination_of_switches_makes_reading_them_raise():
    """Old and new ones, one after the other, in a process of its own: torch cannot undo a mix of them."""
    code = """
import itertools, torch
from gam_fused.step import precision
b = torch.backends
old = [lambda v: setattr(b.cuda.matmul, "allow_tf32", v), lambda v: setattr(b.cudnn, "allow_tf32", v),
       lambda v: torch.set_float32_matmul_precision("high" if v else "highest")]
new = [b, b.cuda.matmul, b.cudnn, b.cudnn.conv, b.cudnn.rnn]
sets = [(lambda f=f, v=v: f(v)) for f in old for v in (True, False)]
sets += [(lambda s=s, v=v: setattr(s, "fp32_precision", v)) for s in new for v in ("ieee", "tf32", "none")]
raised = 0
for some in itertools.permutations(sets, 2):
    for change in some:
        change()
    precision._tf32_is_allowed()
    try:
        b.cuda.matmul.allow_tf32, b.cudnn.allow_tf32
    except RuntimeError:
        raised += 1
assert raised, "this torch does not mind a mix: nothing to test"
"""
    subprocess.run([sys.executable, "-c", code], check=True)
