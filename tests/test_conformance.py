"""FusedSAM and FusedGAM around SGD, Adam and AdamW do what torch's own tests of its optimizers ask.

Elsewhere: tensor learning rates and `zero_grad` in test_bases.py; state dicts of any age in test_base_state.py; missing
gradients in test_missing_gradients.py; the order of hooks of loading in test_loading.py; complex and other parameters that
cannot work in test_bad_input.py; meta parameters and the default device in test_surroundings.py; memory in test_memory.py;
`repr` in test_options.py; every other base in test_conformance_bases.py.
"""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from cases import DTYPES
from gam_helpers import METHODS, bits, freeze, same, weights
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR, LinearLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch_optim import BACKENDS, OURS, Linear, Rosenbrock, info_of

from soak import conformance

all_of_ours = pytest.mark.parametrize("which", OURS.values(), ids=OURS)


def build(params, which, desc="default", **kwargs):
    """One of ours in a configuration of torch's, with more keywords for the base."""
    info = info_of(*which)
    options = next(i.kwargs for i in info.optim_inputs_func("cpu") if i.desc == desc)
    return info.optim_cls(params, **{**options, "base_kwargs": {**options["base_kwargs"], **kwargs}})


def trained(problem, optimizer, steps=3, schedulers=()):
    for _ in range(steps):
        loss = optimizer.step(problem)
        for s in schedulers:
            s.step(loss) if isinstance(s, torch.optim.lr_scheduler.ReduceLROnPlateau) else s.step()
    return optimizer


@all_of_ours
def test_the_loss_goes_where_it_should_with_and_without_schedulers(which):
    """In every configuration of torch's; in one of them with every set of schedulers. In all with all: `make soak`."""
    for case in conformance.directions():
        if case[:3] == which and (case.schedulers == -1 or case.configuration == 1):
            conformance.goes_where_it_should(case)


@pytest.mark.parametrize("scheduler", conformance.SCHEDULERS)
def test_schedulers_act_as_on_torchs_optimizers(scheduler):
    for case in conformance.scheduled():
        if case[0] == scheduler:
            conformance.follows_torch(case)


def test_no_scheduler_of_torch_is_left_out():
    public = {name for name in torch.optim.lr_scheduler.__all__ if name != "LRScheduler"}
    assert public <= {name.split(",")[0] for name in conformance.SCHEDULERS}


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_goes_on_in_another_backend(method):
    for case in conformance.loads():
        if case[0] == method:
            conformance.goes_on_elsewhere(case)


@all_of_ours
def test_down_the_rosenbrock_valley(which):
    problem = Rosenbrock()
    optimizer = build(problem.params, which, lr=1e-4 if which[1] == "SGD" else 1e-2, weight_decay=0.0)
    for group in optimizer.param_groups:
        group["rho"] = 1e-3  # the valley is 0.1 wide
    first = problem().item()
    trained(problem, optimizer, 60)
    assert problem().item() < 0.1 * first


@all_of_ours
def test_groups_have_their_own_lr_and_weight_decay(which):
    problem = Linear()
    start = [bits(p) for p in problem.params]
    trained(problem, build([{"params": [problem.weight], "lr": 0.0}, {"params": [problem.bias]}], which, lr=1e-3))
    same(bits(problem.weight), start[0])
    assert not torch.equal(bits(problem.bias), start[1])
    norms = []
    for decay in (0.0, 0.9):
        problem = Linear()
        groups = [{"params": [problem.weight], "weight_decay": decay}, {"params": [problem.bias]}]
        trained(
            lambda p=problem: 0 * p.weight.sum() + p.bias.square().sum(), build(groups, which, lr=0.01, weight_decay=0.0)
        )
        norms.append(problem.weight.detach().norm())
    assert norms[1] < 0.999 * norms[0]


@all_of_ours
def test_a_tensor_lr_follows_schedulers_as_a_number_does(which):
    results = []
    for lr in (0.01, torch.tensor(0.01, dtype=torch.float64)):
        problem = Linear()
        optimizer = build(problem.params, which, lr=lr)
        schedulers = [ExponentialLR(optimizer, 0.5), LinearLR(optimizer, 0.5, total_iters=2)]
        trained(problem, optimizer, 4, schedulers)
        assert type(optimizer.param_groups[0]["lr"]) is type(lr)
        results.append(weights(optimizer))
    same(*results)


@all_of_ours
def test_zero_gradients_move_nothing(which):
    problem = Linear()
    optimizer = build(problem.params, which, lr=0.1, weight_decay=0.0)
    start = weights(optimizer)
    trained(lambda: 0 * problem(), optimizer)
    same(weights(optimizer), start)


@all_of_ours
def test_a_parameter_unfrozen_in_mid_run_starts_then(which):
    """Until then it has neither moved nor state; then its state is as after the first step."""
    problem = Linear()
    problem.weight.requires_grad_(False)
    optimizer, start = build(problem.params, which, lr=1e-3), bits(problem.weight)
    trained(problem, optimizer, 2)
    same(bits(problem.weight), start)
    assert not optimizer.state.get(problem.weight)
    problem.weight.requires_grad_(True)
    trained(problem, optimizer, 1)
    assert not torch.equal(bits(problem.weight), start)
    if which[1] != "SGD":
        assert [float(optimizer.state[p]["step"]) for p in problem.params] == [1.0, 3.0]


@all_of_ours
@pytest.mark.parametrize("how", ["weights_only", "deepcopy", "pickle"])
def test_what_was_saved_goes_on_with_the_same_bits(which, how):
    problem = Linear()
    named = list(zip(["weight", "bias"], problem.params, strict=True))
    optimizer = trained(problem, build(named, which, lr=1e-3))
    if how == "weights_only":
        file, other = io.BytesIO(), Linear(seed=1)
        torch.save([optimizer.state_dict(), problem.params, problem.x], file)
        file.seek(0)
        saved, params, other.x = torch.load(file, weights_only=True)
        other.weight.data, other.bias.data = (p.detach() for p in params)
        second = build(other.params, which)
        second.load_state_dict(saved)
    else:
        both = problem, optimizer
        other, second = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
        assert {n for n in vars(second) if n[0] != "_"} == {n for n in vars(optimizer) if n[0] not in "_" and n != "step"}
    for o, p in ((optimizer, problem), (second, other)):
        trained(p, o)
    same(weights(second), weights(optimizer))
    assert second.param_groups[0]["param_names"] == ["weight", "bias"]
    same(freeze(second.state_dict()), freeze(optimizer.state_dict()))


def _hooked(optimizer, step, monitored):
    """The calls of every hook that torch has, in order, in a step, a save and a load."""
    calls: list[str] = []

    def note(name):
        return lambda o, *_: calls.append(name) if o is monitored else None

    handles = [
        register_optimizer_step_pre_hook(note("global before step")),
        register_optimizer_step_post_hook(note("global after step")),
    ]
    for event in ("step_pre", "step_post"):
        for i in range(2):
            handles.append(getattr(optimizer, f"register_{event}_hook")(note(f"{event} {i}")))
    for event in ("state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post"):
        for i in range(3):
            handles.append(getattr(optimizer, f"register_{event}_hook")(note(f"{event} {i}"), prepend=i == 2))
    step()
    optimizer.load_state_dict(optimizer.state_dict())
    for handle in handles:
        handle.remove()
    count = len(calls)
    step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert len(calls) == count, "handles remove"
    return calls


@all_of_ours
def test_hooks_come_in_torchs_order(which):
    problem, other = Linear(), Linear()
    optimizer = build(problem.params, which)
    plain = getattr(torch.optim, which[1])(other.params, lr=1e-3)

    def closure():
        plain.zero_grad()
        loss = other()
        loss.backward()
        return loss

    mine = _hooked(optimizer, lambda: optimizer.step(problem), optimizer)
    assert mine == _hooked(plain, lambda: plain.step(closure), plain)
    assert len(mine) == 18


class Mixed(Linear):
    """With a parameter of no dimensions; gradients are computed in float64, so that only the optimizer rounds."""

    def __init__(self, dtype: torch.dtype):
        super().__init__(dtype)
        self.scale = torch.nn.Parameter(torch.tensor(0.75, dtype=dtype))
        self.x = self.x.double()

    @property
    def params(self):
        return [*super().params, self.scale]

    def __call__(self):
        return (self.scale.double() * (self.weight.double() @ self.x) + self.bias.double()).square().mean()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@all_of_ours
def test_backends_equal_the_reference_in_parameters_and_state(which, dtype):
    """One step, to twice the error of the reference's own rounding and two ulps of the largest element.

    In float64 the reference is what is exact, and differences of gradients enlarge the last bit: 64 ulps.
    """
    ulps = 64 if dtype == torch.float64 else 2
    method, base, backend = which
    kwargs = {"lr": 0.01, "weight_decay": 0.1, **({"momentum": 0.9} if base == "SGD" else {"eps": 1e-2})}
    results = []
    for name, kind in ((backend, dtype), ("reference", dtype), ("reference", torch.float64)):
        problem = Mixed(dtype)
        for p in problem.params:
            p.data = p.data.to(kind)
        optimizer = trained(problem, build(problem.params, (method, base, name), **kwargs), 1)
        results.append({(i, k): v for i, p in enumerate(problem.params) for k, v in _tensors(optimizer, p).items()})
    mine, reference, exact = results
    assert mine.keys() == reference.keys()
    for key, value in mine.items():
        assert value.dtype == reference[key].dtype, key
        allowed = 2 * (reference[key].double() - exact[key]).abs().max()
        allowed += ulps * torch.finfo(value.dtype).eps * exact[key].abs().max()
        error = (value.double() - exact[key]).abs().max()
        assert error <= allowed, f"{key}: {error:.3g}, allowed are {allowed:.3g}"


def _tensors(optimizer: Optimizer, p: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"weights": p.detach(), **{k: v for k, v in optimizer.state[p].items() if isinstance(v, torch.Tensor)}}


@pytest.mark.parametrize("default", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("base", ["SGD", "Adam", "AdamW"])
def test_the_default_dtype_changes_no_bit(base, backend, default):
    """Nor do state dicts that torch has made under it, with step counts of float64."""
    results = []
    for dtype in (torch.float32, default):
        torch.set_default_dtype(dtype)
        try:
            problem = Linear()
            plain = getattr(torch.optim, base)(problem.params, lr=1e-3)
            problem().backward()
            plain.step()
            optimizer = build(problem.params, ("finite_difference", base, backend), lr=1e-3)
            trained(problem, optimizer, 1)
            optimizer.load_state_dict(plain.state_dict())
            trained(problem, optimizer, 2)
        finally:
            torch.set_default_dtype(torch.float32)
        results.append([weights(optimizer), freeze(optimizer.state_dict()["state"])])
    same(*results)
