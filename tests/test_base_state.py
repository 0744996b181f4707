"""The base optimizer's state and groups: as torch follows them, whoever changes them and whatever fails."""

from __future__ import annotations

import collections
import copy

import pytest
import torch
from gam_helpers import backend_params, batch, close, closure_of, freeze, mlp, regression, same, weights
from torch.optim import SGD, Adam, AdamW

from gam_fused import FusedGAM, FusedSAM

BASES = {
    "SGD": (SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}),
    "Adam": (Adam, {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1}),
    "AdamW": (AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5}),
    "NAdam": (torch.optim.NAdam, {"lr": 0.01, "decoupled_weight_decay": True}),
    "RAdam": (torch.optim.RAdam, {"lr": 0.01}),
    "Adamax": (torch.optim.Adamax, {"lr": 0.01}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.01}),
    "Adadelta": (torch.optim.Adadelta, {"lr": 0.5}),
    "Adafactor": (torch.optim.Adafactor, {"lr": 0.01}),
    "ASGD": (torch.optim.ASGD, {"lr": 0.01}),
    "Rprop": (torch.optim.Rprop, {"lr": 0.01}),
}
LATER_KEYS = (
    "maximize",
    "foreach",
    "differentiable",
    "fused",
    "capturable",
    "decoupled_weight_decay",
    "amsgrad",
    "momentum",
)
FROM_THE_FIRST = {("SGD", "momentum"), ("Adafactor", "maximize")}


def pair(base, backend="auto", **options):
    """A plain optimizer and FusedSAM at radius 0, which is the same, each with a model."""
    kind, own = BASES[base] if isinstance(base, str) else base
    own = {**own, **options}
    models = mlp(torch.float64), mlp(torch.float64)
    fused = FusedSAM(models[1].parameters(), kind, backend=backend, base_kwargs=own)
    for group in fused.param_groups:
        group[fused.rho_key] = 0.0
    return models, kind(models[0].parameters(), **own), fused


def step(optimizer, model, seed=1):
    optimizer.step(closure_of(optimizer, regression(model, *batch(dtype=torch.float64, seed=seed))))


def run(models, optimizers, steps, change=lambda optimizer, i: None):
    for i in range(steps):
        for model, optimizer in zip(models, optimizers, strict=True):
            change(optimizer, i)
            step(optimizer, model, i)


def agree(models, tolerance=1e-12):
    close(list(models[1].parameters()), [p.detach() for p in models[0].parameters()], tolerance)


@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize("base", ["AdamW", "Adam", "SGD"])
@pytest.mark.parametrize("through", ["FusedGAM", "base"])
def test_a_checkpoint_of_any_age_of_a_fused_base(base, through, backend):
    old_checkpoint_agrees(base, through, backend)


@pytest.mark.parametrize("base", [b for b in BASES if b not in ("SGD", "Adam", "AdamW")])
@pytest.mark.parametrize("through", ["FusedGAM", "base"])
def test_a_checkpoint_of_any_age_of_a_foreign_base(base, through):
    old_checkpoint_agrees(base, through, "auto")


def old_checkpoint_agrees(base, through, backend):
    """Without what torch has added to groups since, and with a step count that is a number: resumed as torch resumes it."""
    (model, twin), plain, fused = pair(base, backend)
    for i in range(3):
        step(plain, model, i)
    saved = copy.deepcopy(plain.state_dict())
    for group in saved["param_groups"]:
        for key in LATER_KEYS:
            if key in group and (base, key) not in FROM_THE_FIRST:
                del group[key]
    if base in ("Adam", "NAdam"):  # what stays on must be said
        for group in saved["param_groups"]:
            group |= {k: True for k in ("amsgrad", "decoupled_weight_decay") if BASES[base][1].get(k)}
    if base in ("Adam", "AdamW"):
        for entry in saved["state"].values():
            entry["step"] = int(entry["step"])
    plain.load_state_dict(copy.deepcopy(saved))
    (fused if through == "FusedGAM" else fused.base_optimizer).load_state_dict(copy.deepcopy(saved))
    twin.load_state_dict(model.state_dict())
    run((model, twin), (plain, fused), 5)
    agree((model, twin))
    for theirs, mine in zip(plain.param_groups, fused.param_groups, strict=True):
        assert {k: v for k, v in mine.items() if k in theirs and k != "params"} == {
            k: v for k, v in theirs.items() if k != "params"
        }
        assert mine[fused.rho_key] == 0.0, "what a checkpoint does not have stays"


@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize("dampening", [0.0, 0.5])
@pytest.mark.parametrize(
    "momenta",
    [(0.0, 0.0, 0.3, 0.6, 0.9), (0.9, 0.9, 0.0, 0.0, 0.9, 0.9), (0.0, 0.9, 0.0, 0.5, 0.0)],
    ids=["from 0", "off and on", "by turns"],
)
def test_momentum_is_followed_as_torch_follows_it(momenta, dampening, backend):
    models, plain, fused = pair("SGD", backend, dampening=dampening)

    def change(optimizer, i):
        optimizer.param_groups[0]["momentum"] = momenta[i]

    for i in range(len(momenta)):
        for model, optimizer in zip(models, (plain, fused), strict=True):
            change(optimizer, i)
            step(optimizer, model, i)
        for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
            theirs, mine = plain.state.get(p, {}).get("momentum_buffer"), fused.state.get(q, {}).get("momentum_buffer")
            assert (theirs is None) == (mine is None)
            if theirs is not None:
                torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)
    agree(models)


@pytest.mark.parametrize("backend", backend_params())
def test_momentum_that_a_skipped_step_did_not_start_starts_with_d(backend):
    """Dampening tells: the first momentum is d, later ones are a part of it."""
    models, plain, fused = pair("SGD", backend, dampening=0.5)
    fused.step(lambda: regression(models[1], *batch(dtype=torch.float64))() * float("nan"))
    fused.param_groups[0]["momentum"] = 0.0
    fused.step(lambda: regression(models[1], *batch(dtype=torch.float64))() * float("nan"))
    fused.param_groups[0]["momentum"] = 0.9
    assert fused.skipped_steps == 2
    run(models, (plain, fused), 3)
    agree(models)


@pytest.mark.parametrize("backend", backend_params())
def test_amsgrad_switched_on_later_fails_as_under_torch(backend):
    models, plain, fused = pair("AdamW", backend)
    run(models, (plain, fused), 2)
    before = weights(fused), freeze(fused.state_dict())
    for model, optimizer in zip(models, (plain, fused), strict=True):
        optimizer.param_groups[0]["amsgrad"] = True
        with pytest.raises(KeyError, match="max_exp_avg_sq"):
            step(optimizer, model)
        optimizer.param_groups[0]["amsgrad"] = False
    fused_now = weights(fused), freeze(fused.state_dict())
    same(fused_now[0], before[0])
    same(fused_now[1], before[1])


@pytest.mark.parametrize("backend", backend_params())
def test_amsgrad_off_and_on_keeps_the_maximum(backend):
    models, plain, fused = pair("Adam", backend)
    run(models, (plain, fused), 6, lambda o, i: o.param_groups[0].update(amsgrad=i not in (2, 3)))
    agree(models)


def fails():
    raise RuntimeError("out of memory")


@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize("base", ["SGD", "Adam", "AdamW"])
def test_a_failure_in_the_first_step_after_loading_loses_no_state(base, backend):
    _, _, fused = pair(base, backend)
    model = mlp(torch.float64)
    source = FusedGAM(model.parameters(), BASES[base][0], **BASES[base][1])
    for i in range(3):
        step(source, model, i)
    saved = copy.deepcopy(source.state_dict())
    fused.load_state_dict(copy.deepcopy(saved))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"):
            fused.step(fails)
        same(freeze(fused.state_dict()["state"]), freeze(saved["state"]))


@pytest.mark.parametrize("change", ["unfreeze", "add a group", "another dtype", "flatten", "unpickle"])
def test_a_failure_in_the_first_step_after_a_new_plan_loses_no_state(change):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    model[0].requires_grad_(False)
    optimizer = FusedGAM(model[1].parameters() if change == "add a group" else model.parameters(), AdamW, lr=0.01)
    loss = regression(model, *batch())
    for _ in range(3):
        optimizer.step(loss)
    saved = freeze(optimizer.state_dict()["state"])
    if change == "unfreeze":
        model[0].requires_grad_(True)
    elif change == "add a group":
        optimizer.add_param_group({"params": model[0].parameters()})
    elif change == "another dtype":
        model.double()
        model.float()
    elif change == "flatten":
        optimizer.flatten = True
    else:
        optimizer = copy.deepcopy(optimizer)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(fails)
    same(freeze(optimizer.state_dict()["state"]), saved)
    assert len(optimizer.state) == 2


@pytest.mark.parametrize("base", ["SGD", "AdamW"])
def test_a_state_dict_between_skipped_steps_deletes_nothing_that_is_alive(base):
    """Parameters that joined in a skipped step have no state yet; the others keep theirs."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    model[0].requires_grad_(False)
    optimizer = FusedGAM(model.parameters(), *BASES[base][:1], **BASES[base][1])
    loss = regression(model, *batch())
    optimizer.step(loss)
    model[0].requires_grad_(True)
    optimizer.step(lambda: loss() * float("nan"))
    assert len(optimizer.state_dict()["state"]) == 2
    optimizer.step(loss)
    assert len(optimizer.state_dict()["state"]) == 4
    assert len(optimizer.state_dict()["state"]) == 4


def test_a_parameter_without_state_may_be_removed():
    """torch.optim.SGD without momentum has nothing to look for."""
    p, q = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    optimizer = FusedGAM([p, q], SGD, lr=0.1)
    optimizer.step(lambda: (p * q).sum())
    assert not optimizer.state
    optimizer.param_groups[0]["params"].pop()
    assert optimizer.state_dict()["state"] == {}
    optimizer.step(lambda: p.sum())


@pytest.mark.parametrize("base", ["SGD", "AdamW", "RMSprop"])
@pytest.mark.parametrize("backend", backend_params())
def test_state_and_groups_assigned_anew_are_the_bases(base, backend):
    models, plain, fused = pair(base, backend)
    run(models, (plain, fused), 3)
    for optimizer in (plain, fused):
        optimizer.state = collections.defaultdict(dict)  # the idiom for a reset
    run(models, (plain, fused), 2)
    agree(models)
    assert fused.state is fused.base_optimizer.state
    assert len(fused.state_dict()["state"]) == len(plain.state_dict()["state"])
    for optimizer in (plain, fused):
        optimizer.param_groups = [{**g, "lr": 0.0} for g in optimizer.param_groups]
    before = weights(fused)
    step(fused, models[1])
    same(weights(fused), before)
    assert fused.param_groups is fused.base_optimizer.param_groups


@pytest.mark.parametrize("base", ["SGD", "AdamW", "RMSprop"])
def test_the_bases_own_load_state_dict_and_groups_stay_linked(base):
    models, plain, fused = pair(base)
    run(models, (plain, fused), 2)
    fused.base_optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
    fused.base_optimizer.param_groups[0]["lr"] = 0.0
    before = weights(fused)
    step(fused, models[1])
    same(weights(fused), before)
    fused.param_groups[0]["lr"] = plain.param_groups[0]["lr"]


@pytest.mark.parametrize("copied", [False, True])
def test_groups_keep_their_radius_when_the_base_loads_by_itself(copied):
    models, plain, fused = pair("SGD")
    run(models, (plain, fused), 1)
    fused = copy.deepcopy(fused) if copied else fused
    fused.param_groups[0]["rho"] = 0.7
    fused.base_optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert fused.param_groups[0]["rho"] == 0.7


def test_a_group_added_through_the_base():
    model = mlp()
    base = SGD(model[0].parameters(), lr=0.1)
    optimizer = FusedGAM(None, base, rho=0.3)
    base.add_param_group({"params": model[2].parameters(), "lr": 0.0})
    before = weights(optimizer)
    optimizer.step(regression(model, *batch()))
    assert [g["rho"] for g in optimizer.param_groups] == [0.3, 0.3]
    assert not torch.equal(weights(optimizer)[0], before[0])
    assert torch.equal(weights(optimizer)[2], before[2])


class Wrapper(torch.optim.Optimizer):
    """Keeps state in an optimizer of its own, and overrides its state dict accordingly."""

    def __init__(self, inner):
        self.inner = inner
        super().__init__([{"params": g["params"]} for g in inner.param_groups], inner.defaults)

    def step(self, closure=None):
        return self.inner.step(closure)

    def state_dict(self):
        return self.inner.state_dict()

    def load_state_dict(self, state_dict):
        self.inner.load_state_dict(state_dict)


def test_a_base_that_keeps_its_state_elsewhere():
    def build(seed=0):
        model = mlp(seed=seed)
        optimizer = FusedGAM(None, Wrapper(AdamW(model.parameters(), lr=0.01)), rho=0.1)
        return model, optimizer

    model, optimizer = build()
    for _ in range(3):
        optimizer.step(regression(model, *batch()))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    assert len(saved[1]["state"]) == 4
    optimizer.step(regression(model, *batch()))
    other, resumed = build(5)
    resumed.load_state_dict(saved[1])
    other.load_state_dict(saved[0])
    resumed.step(regression(other, *batch()))
    same(weights(resumed), weights(optimizer))
    broken = copy.deepcopy(saved[1])
    broken["param_groups"][0]["rho"] = float("nan")
    before = freeze(resumed.state_dict())
    with pytest.raises(ValueError, match="rho"):
        resumed.load_state_dict(broken)
    same(freeze(resumed.state_dict()), before)


def test_train_and_eval_of_a_schedule_free_base():
    class ScheduleFree(SGD):
        mode = ""

        def train(self):
            self.mode = "train"

        def eval(self):
            self.mode = "eval"

    p = torch.nn.Parameter(torch.ones(1))
    optimizer = FusedGAM([p], ScheduleFree, lr=0.1)
    optimizer.train()
    assert optimizer.base_optimizer.mode == "train"
    optimizer.eval()
    assert optimizer.base_optimizer.mode == "eval"
    assert not hasattr(FusedGAM([p], SGD, lr=0.1), "train")
    copy.deepcopy(optimizer).eval()
