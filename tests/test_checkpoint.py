"""Checkpoints: exact resumption, and the same files as torch.optim's."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from gam_helpers import (
    METHODS,
    SETTINGS,
    batch,
    closure_of,
    freeze,
    make,
    mixed_net,
    mlp,
    regression,
    same,
    trainer,
    weights,
)
from torch.optim import SGD, Adam, AdamW

from gam_fused import FusedGAM

BASES = {
    "sgd": (SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.5}),
    "adam": (Adam, {"lr": 0.01, "amsgrad": True}),
    "adamw": (AdamW, {"lr": 0.01}),
    "foreign": (torch.optim.NAdam, {"lr": 0.01}),
}
TORCH = [b for b in BASES if b != "foreign"]


def through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def build(model, method="finite_difference", base="sgd", **options):
    kind, base_options = BASES[base]
    return make(model.parameters(), kind, method, model=model, **{**base_options, **options})


def train(optimizer, model, steps, dtype=torch.float32):
    closure = closure_of(optimizer, regression(model, *batch(dtype=dtype)))
    for _ in range(steps):
        optimizer.step(closure)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_resumes_bit_for_bit(method, base):
    model = mixed_net()
    optimizer = build(model, method, base)
    train(optimizer, model, 3)
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()})
    train(optimizer, model, 3)
    other = mixed_net(seed=5)
    resumed = build(other, method, base)
    resumed.load_state_dict(saved["optimizer"])
    other.load_state_dict(saved["model"])
    torch.set_rng_state(saved["rng"])
    train(resumed, other, 3)
    same(weights(resumed), weights(optimizer))
    same(freeze(resumed.state_dict()), freeze(optimizer.state_dict()))


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"interval": 3}, torch.float32),
        ({}, torch.bfloat16),
        ({"flatten": True}, torch.float32),
        ({"gamma": 0.9}, torch.float64),
    ],
    ids=["interval", "stochastic_rounding", "flatten", "scheduled"],
)
def test_resumes_with_its_counters(options, dtype):
    """In the middle of an interval, of the sequence of the stochastic rounding, of a schedule of hyperparameters."""
    method = "accelerated" if "gamma" in options else "finite_difference"
    model = mlp(dtype)
    optimizer = build(model, method, **{k: v for k, v in options.items() if k != "gamma"})
    train(optimizer, model, 2, dtype)
    if "gamma" in options:
        optimizer.gamma = options["gamma"]
        optimizer.param_groups[0]["rho"] = 0.33
    saved = through_a_file([model.state_dict(), optimizer.state_dict()])
    train(optimizer, model, 4, dtype)
    other = mlp(dtype, seed=4)
    resumed = build(other, method, **{k: v for k, v in options.items() if k != "gamma"})
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    train(resumed, other, 4, dtype)
    same(weights(resumed), weights(optimizer))


def test_skipped_steps_survive():
    model = mlp()
    optimizer = build(model)
    optimizer.step(lambda: regression(model, *batch())() * float("nan"))
    resumed, used = build(mlp()), build(other := mlp())
    train(used, other, 2)
    for loaded in (resumed, used):
        loaded.load_state_dict(through_a_file(optimizer.state_dict()))
        assert int(loaded.skipped_steps) == 1
    train(used, other, 1)
    assert int(used.skipped_steps) == 1


@pytest.mark.parametrize("base", TORCH)
@pytest.mark.parametrize("method", METHODS)
def test_the_layout_is_torchs_own(method, base):
    model, twin = mlp(), mlp()
    kind, options = BASES[base]
    plain, optimizer = kind(twin.parameters(), **options), build(model, method, base)
    train(plain, twin, 2)
    train(optimizer, model, 2)
    mine, theirs = optimizer.state_dict(), plain.state_dict()
    assert list(mine["state"]) == list(theirs["state"])
    for i, entry in theirs["state"].items():
        assert set(mine["state"][i]) == set(entry)
        for key, value in entry.items():
            got = mine["state"][i][key]
            assert (got.shape, got.dtype, got.device) == (value.shape, value.dtype, value.device), key
            if key == "step":
                assert torch.equal(got, value)
    assert set(mine["param_groups"][0]) >= set(theirs["param_groups"][0])
    assert mine["param_groups"][0]["params"] == theirs["param_groups"][0]["params"]


@pytest.mark.parametrize("base", TORCH)
def test_a_checkpoint_of_torch_loads_and_goes_back(base):
    """torch -> FusedGAM at alpha 0 -> torch: the same run as torch alone, to rounding."""
    kind, options = BASES[base]
    model, twin = mlp(torch.float64), mlp(torch.float64)
    plain, straight = kind(model.parameters(), **options), kind(twin.parameters(), **options)
    train(plain, model, 3, torch.float64)
    optimizer = FusedGAM(model.parameters(), kind, alpha=0.0, rho=0.123, **{**options, "lr": 0.5})
    optimizer.load_state_dict(through_a_file(plain.state_dict()))
    assert optimizer.param_groups[0]["lr"] == options["lr"]
    assert optimizer.param_groups[0]["rho"] == 0.123
    train(optimizer, model, 3, torch.float64)
    back = kind(model.parameters(), **{**options, "lr": 0.5})
    back.load_state_dict(through_a_file(optimizer.state_dict()))
    train(back, model, 3, torch.float64)
    train(straight, twin, 9, torch.float64)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_pickle_and_deepcopy(how, base):
    model = mixed_net()
    optimizer = build(model, base=base)
    train(optimizer, model, 2)
    copies = copy.deepcopy((model, optimizer)) if how == "deepcopy" else pickle.loads(pickle.dumps((model, optimizer)))
    other_model, other = copies
    assert other.param_groups is other.base_optimizer.param_groups
    assert other.param_groups[0]["params"][0] is next(other_model.parameters())
    for pair in ((model, optimizer), (other_model, other)):
        torch.manual_seed(9)
        train(pair[1], pair[0], 3)
    same(weights(other), weights(optimizer))
    same(freeze(other.state_dict()), freeze(optimizer.state_dict()))
    same(freeze(dict(other_model.named_buffers())), freeze(dict(model.named_buffers())))


def test_a_scheduler_holds_after_deepcopy():
    model = mlp()
    optimizer = build(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    train(optimizer, model, 1)
    scheduler.step()
    other_model, other = copy.deepcopy((model, optimizer))
    train(other, other_model, 1)
    assert other.param_groups[0]["lr"] == 0.025


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_a_skipped_first_step_leaves_the_state_dict(method, base):
    model = mlp()
    optimizer = build(model, method, base)
    before = freeze(optimizer.state_dict())
    optimizer.step(lambda: regression(model, *batch())() * float("inf"))
    after = freeze(optimizer.state_dict())
    assert after["param_groups"][0].pop("gam")["skipped_steps"] == 1
    assert before["param_groups"][0].pop("gam")["skipped_steps"] == 0
    same(after, before)
    assert dict(optimizer.state) == {}


@pytest.mark.parametrize("base", BASES)
def test_loading_into_a_run_and_going_back_in_time(base):
    """A state dict taken early is loaded into the same optimizer after more steps: caches must not outlive it."""
    model = mlp()
    optimizer = build(model, base=base)
    train(optimizer, model, 2)
    early = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(optimizer, model, 2)
    expected = weights(optimizer)
    for _ in range(2):
        model.load_state_dict(early[0])
        optimizer.load_state_dict(copy.deepcopy(early[1]))  # torch.optim takes tensors over as they are
        train(optimizer, model, 2)
        same(weights(optimizer), expected)


@pytest.mark.parametrize("wrong", ["groups", "sizes"])
def test_a_state_dict_that_does_not_fit_is_refused(wrong):
    model = mlp()
    optimizer = build(model)
    train(optimizer, model, 1)
    before = freeze(optimizer.state_dict())
    state = copy.deepcopy(optimizer.state_dict())
    if wrong == "groups":
        state["param_groups"].append(state["param_groups"][0])
    else:
        state["param_groups"][0]["params"].pop()
    with pytest.raises(ValueError, match=r"different number|doesn't match"):
        optimizer.load_state_dict(state)
    same(freeze(optimizer.state_dict()), before)


@pytest.mark.parametrize("base", BASES)
def test_distributed_checkpoint_in_one_process(base):
    from torch.distributed.checkpoint.state_dict import (
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )  # fmt: skip

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = mlp()
        optimizer = build(model, base=base)
        before = weights(optimizer)
        get_optimizer_state_dict(model, optimizer)
        same(weights(optimizer), before)
        train(optimizer, model, 3)
        saved = copy.deepcopy((get_model_state_dict(model), get_optimizer_state_dict(model, optimizer)))
        other = mlp(seed=7)
        resumed = build(other, base=base)
        set_model_state_dict(other, saved[0])
        set_optimizer_state_dict(other, resumed, saved[1])
    train(optimizer, model, 2)
    train(resumed, other, 2)
    same(weights(resumed), weights(optimizer))


@pytest.mark.parametrize("base", TORCH)
def test_step_without_closure_creates_state_only_at_lr_0_with_zero_gradients(base):
    model = mlp()
    optimizer = build(model, base=base, lr=0.0)
    before = weights(optimizer)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    same(weights(optimizer), before)
    assert len(optimizer.state) == 4
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="closure"):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.param_groups[0]["lr"] = 0.1
    with pytest.raises(RuntimeError, match="closure"):
        optimizer.step()
    same(weights(optimizer), before)


@pytest.mark.parametrize("base", TORCH)
def test_skipped_steps_are_counted_on_after_a_step_without_closure(base):
    model = mlp()
    optimizer = build(model, base=base, lr=0.0)
    optimizer.step(lambda: regression(model, *batch())() * float("nan"))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    train(optimizer, model, 1)
    assert optimizer.skipped_steps == 1


def test_settings_of_every_method_are_in_the_state_dict_as_plain_numbers():
    for method in METHODS:
        optimizer, closure = trainer(method, (model := mlp()), regression(model, *batch()))
        optimizer.step(closure)
        state = optimizer.state_dict()
        through_a_file(state)
        assert state["param_groups"][0]["rho"] == SETTINGS[method]["rho"]
