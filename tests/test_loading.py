"""`load_state_dict` is a transaction: checked whole, loaded whole, or nothing has changed."""

from __future__ import annotations

import copy

import pytest
import torch
from gam_helpers import METHODS, backend_params, batch, freeze, make, mlp, regression, same, trainer, weights
from torch.optim import SGD, AdamW

from gam_fused import FusedGAM, FusedSAM

NAN = float("nan")


def trained(cls=FusedGAM, base=SGD, steps=2, **options):
    model = mlp()
    options = {"momentum": 0.9, **options} if base is SGD else options
    optimizer = cls(model.parameters(), base, lr=0.1, **options)
    for i in range(steps):
        optimizer.step(regression(model, *batch(seed=i)))
    return model, optimizer


def everything(optimizer):
    names = ("method", "rho_prime", "alpha", "beta", "gamma", "xi", "interval")
    own = {name: getattr(optimizer, name) for name in names}
    return freeze(
        {"state": optimizer.state_dict(), "own": own, "weights": weights(optimizer), "defaults": optimizer.defaults}
    )


def put(state_dict, *path):
    """Replace what a path leads to, or delete it where the last step of the path is `del`."""
    *keys, last, value = path
    for key in keys:
        state_dict = state_dict[key]
    if value is del_:
        del state_dict[last]
    else:
        state_dict[last] = value


del_ = object()
GAM = ("param_groups", 0, "gam")
BROKEN = {
    "gam lacks gamma": (SGD, (*GAM, "gamma", del_), "gamma"),
    "gam lacks steps_taken": (SGD, (*GAM, "steps_taken", del_), "steps_taken"),
    "gam is a list": (SGD, ("param_groups", 0, "gam", [1]), "gam"),
    "steps_taken is NaN": (SGD, (*GAM, "steps_taken", NAN), "steps_taken"),
    "steps_taken is negative": (SGD, (*GAM, "steps_taken", -1), "steps_taken"),
    "skipped_steps is a word": (SGD, (*GAM, "skipped_steps", "two"), "skipped_steps"),
    "alpha is NaN": (SGD, (*GAM, "alpha", NAN), "alpha"),
    "alpha is a pair": (SGD, (*GAM, "alpha", [0.5, 0.5]), "alpha"),
    "rho_prime is 0": (SGD, (*GAM, "rho_prime", 0.0), "rho_prime"),
    "rho_prime is None": (SGD, (*GAM, "rho_prime", None), "rho_prime"),
    "rho is NaN": (SGD, ("param_groups", 0, "rho", NAN), "rho"),
    "perturb is a number": (SGD, ("param_groups", 0, "perturb", 0.5), "perturb"),
    "lr is NaN": (SGD, ("param_groups", 0, "lr", NAN), "lr"),
    "momentum is infinite": (SGD, ("param_groups", 0, "momentum", float("inf")), "momentum"),
    "betas are NaN": (AdamW, ("param_groups", 0, "betas", (NAN, 0.9)), "beta1"),
    "no groups": (SGD, ("param_groups", del_), "param_groups"),
    "no state": (SGD, ("state", del_), "state"),
    "a group is none": (SGD, ("param_groups", [3]), "param group 0"),
    "too few parameters": (SGD, ("param_groups", 0, "params", [0, 1]), "size"),
    "another group": (SGD, ("param_groups", []), "number of param"),
    "0-d momentum": (SGD, ("state", 0, "momentum_buffer", torch.tensor(7.0)), "momentum_buffer"),
    "(1, 1) momentum": (SGD, ("state", 0, "momentum_buffer", torch.ones(1, 1)), "momentum_buffer"),
    "a row of momentum": (SGD, ("state", 0, "momentum_buffer", torch.ones(1, 3)), "momentum_buffer"),
    "transposed": (AdamW, ("state", 0, "exp_avg", torch.ones(3, 5)), "exp_avg"),
    "no exp_avg_sq": (AdamW, ("state", 1, "exp_avg_sq", del_), "exp_avg_sq"),
    "no step": (AdamW, ("state", 1, "step", del_), "step"),
    "step is NaN": (AdamW, ("state", 1, "step", torch.tensor(NAN)), "step"),
    "step is infinite": (AdamW, ("state", 1, "step", float("inf")), "step"),
    "step is negative": (AdamW, ("state", 1, "step", -3), "step"),
    "step is a vector": (AdamW, ("state", 1, "step", torch.ones(2)), "step"),
    "momentum is a number": (SGD, ("state", 0, "momentum_buffer", 0.5), "momentum_buffer"),
    "exp_avg is a pair": (AdamW, ("state", 1, "exp_avg", (0.1, 0.2)), "exp_avg"),
    "betas are one": (AdamW, ("param_groups", 0, "betas", [0.9]), "betas"),
    "betas are a number": (AdamW, ("param_groups", 0, "betas", torch.tensor(0.9)), "betas"),
    "nesterov is a row": (SGD, ("param_groups", 0, "nesterov", torch.ones(3)), "nesterov"),
    "a parameter is a row": (SGD, ("param_groups", 0, "params", 2, torch.ones(3)), "params"),
    "state is a number": (SGD, ("state", 0, 3), "must be a dict"),
    "foreign 0-d": (torch.optim.RMSprop, ("state", 0, "square_avg", torch.tensor(1.0)), "square_avg"),
}


@pytest.mark.parametrize(("base", "path", "name"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_state_dict_is_named_and_changes_nothing(base, path, name):
    options = {"base_kwargs": {"alpha": 0.9}} if base is torch.optim.RMSprop else {}
    _, source = trained(base=base, **options)
    broken = copy.deepcopy(source.state_dict())
    put(broken, *path)
    model, optimizer = trained(base=base, steps=3, rho=0.3, **options)
    optimizer.param_groups[0]["lr"] = 0.7
    before, groups = everything(optimizer), optimizer.param_groups[0]
    with pytest.raises((ValueError, TypeError, KeyError), match=name):
        optimizer.load_state_dict(broken)
    same(everything(optimizer), before)
    assert optimizer.param_groups[0] is groups
    assert optimizer.state is optimizer.base_optimizer.state
    optimizer.step(regression(model, *batch()))
    good = copy.deepcopy(source.state_dict())
    optimizer.load_state_dict(good)
    optimizer.step(regression(model, *batch()))


@pytest.mark.parametrize("value", [None, 3, [], {}, {"state": {}}], ids=repr)
def test_what_is_no_state_dict(value):
    _, optimizer = trained()
    with pytest.raises((ValueError, TypeError, AttributeError)):
        optimizer.load_state_dict(value)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_base_that_fails_to_load_is_as_before(error):
    class Fails(SGD):
        def __setstate__(self, state):
            super().__setstate__(state)
            if self.defaults.get("fails"):
                raise error("no")

    model = mlp()
    optimizer = FusedGAM(model.parameters(), Fails, lr=0.1, momentum=0.9)
    optimizer.step(regression(model, *batch()))
    saved, before = copy.deepcopy(optimizer.state_dict()), everything(optimizer)
    saved["param_groups"][0]["lr"] = 0.5
    optimizer.base_optimizer.defaults["fails"] = True
    with pytest.raises(error, match="no"):
        optimizer.load_state_dict(saved)
    same(
        {k: v for k, v in everything(optimizer).items() if k != "defaults"},
        {k: v for k, v in before.items() if k != "defaults"},
    )


@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize("target", METHODS)
@pytest.mark.parametrize("source", METHODS)
def test_another_methods_state_dict_keeps_the_own_hyperparameters(source, target, backend):
    """Counters and the base's state are taken over; what rho, alpha, ... mean is each method's own."""
    model, optimizer = mlp(), None
    for method in (source, target):
        state = copy.deepcopy(optimizer.state_dict()) if optimizer else None
        optimizer, closure = trainer(method, model, regression(model, *batch()), backend=backend)
        if state is None:
            optimizer.param_groups[0]["rho"] = 0.123
            optimizer.step(closure)
    own = {name: getattr(optimizer, name) for name in ("rho_prime", "alpha", "beta", "gamma")}
    optimizer.load_state_dict(state)
    assert optimizer.method == target
    assert {name: getattr(optimizer, name) for name in own} == own
    assert optimizer.param_groups[0]["rho"] == (0.123 if source == target else 0.1)
    assert len(optimizer.state) == 4
    optimizer.step(closure)
    assert optimizer.state_dict()["param_groups"][0]["gam"]["steps_taken"] == 2


def test_state_dicts_of_version_0_1_load():
    """They did not say which method wrote them."""
    for cls, other in ((FusedGAM, FusedSAM), (FusedSAM, FusedGAM), (FusedGAM, FusedGAM)):
        model, source = trained(cls, rho=0.3)
        saved = copy.deepcopy(source.state_dict())
        del saved["param_groups"][0]["gam"]["method"]
        optimizer = other(model.parameters(), SGD, lr=0.1, momentum=0.9, rho=0.2)
        optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0]["rho"] == (0.3 if cls is other else 0.2)
        optimizer.step(regression(model, *batch()))


def test_hooks_may_rebuild_the_dict_and_come_in_torchs_order():
    model, optimizer = trained()
    calls = []

    def unwrap(opt, state_dict):
        calls.append("FusedGAM, before")
        return state_dict["optimizer"]

    def groups_anew(opt, state_dict):
        kept = ("params", "lr", "momentum", "dampening", "weight_decay", "nesterov")  # as the first versions of torch
        groups = [{k: v for k, v in g.items() if k in kept} for g in state_dict["param_groups"]]
        return {**state_dict, "param_groups": groups}

    base = optimizer.base_optimizer
    optimizer.register_load_state_dict_pre_hook(unwrap)
    optimizer.register_load_state_dict_pre_hook(groups_anew)
    base.register_load_state_dict_pre_hook(lambda *_: calls.append("base, before"))
    base.register_load_state_dict_post_hook(lambda *_: calls.append("base, after"))
    optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("FusedGAM, after"))
    optimizer.param_groups[0]["rho"] = 0.3
    saved = {"optimizer": copy.deepcopy(optimizer.state_dict())}
    saved["optimizer"]["param_groups"][0]["lr"] = 0.05
    optimizer.load_state_dict(saved)
    assert calls == ["FusedGAM, before", "base, before", "base, after", "FusedGAM, after"]
    group = optimizer.param_groups[0]
    assert (group["lr"], group["rho"], group["perturb"], group["maximize"]) == (0.05, 0.3, True, False)
    optimizer.step(regression(model, *batch()))


def test_the_bases_own_state_dict_hooks_are_called():
    _, optimizer = trained()
    base = optimizer.base_optimizer
    base.register_state_dict_post_hook(lambda opt, sd: {**sd, "by": "base"})
    optimizer.register_state_dict_post_hook(lambda opt, sd: {**sd, "for": "FusedGAM"})
    saved = optimizer.state_dict()
    assert (saved["by"], saved["for"]) == ("base", "FusedGAM")
    optimizer.load_state_dict(saved)


def test_loading_from_inside_a_step_is_an_error():
    model, optimizer = trained()
    saved = copy.deepcopy(optimizer.state_dict())
    before = everything(optimizer)

    def closure():
        optimizer.load_state_dict(saved)
        return regression(model, *batch())()

    with pytest.raises(RuntimeError, match="during a step"):
        optimizer.step(closure)
    same(everything(optimizer), before)


def test_loading_leaves_the_given_dict_alone():
    model, source = trained()
    saved = source.state_dict()
    kept = freeze(copy.deepcopy(saved))
    optimizer = make(model.parameters())
    optimizer.load_state_dict(saved)
    same(freeze(saved), kept)


def test_what_a_failing_load_has_put_into_the_base_is_taken_out():
    """Attributes, groups and entries of the state that a base of one's own adds or changes in place while it loads."""

    class Adds(SGD):
        def __setstate__(self, state):
            entries = list(self.state.values()) if "state" in self.__dict__ else []
            super().__setstate__(state)
            if "fails" in self.defaults:
                self.loaded = True
                kept.append(self.param_groups)
                for entry in entries:
                    entry["more"] = 1
                raise ValueError("no")

    model, kept = mlp(), []
    optimizer = FusedGAM(model.parameters(), Adds, lr=0.1, momentum=0.9)
    optimizer.step(regression(model, *batch()))
    base = optimizer.base_optimizer
    saved, groups, before = copy.deepcopy(optimizer.state_dict()), base.param_groups, everything(optimizer)
    base.defaults["fails"] = True
    with pytest.raises(ValueError, match="no"):
        optimizer.load_state_dict(saved)
    del base.defaults["fails"]
    assert not hasattr(base, "loaded")
    assert base.param_groups is groups
    same(everything(optimizer), before)


def test_a_hook_that_fails_after_a_load_leaves_the_counters():
    model = mlp()
    optimizer, closure = trainer("finite_difference", model, regression(model, *batch()))
    optimizer.step(lambda: closure() * float("nan"))
    saved = copy.deepcopy(optimizer.state_dict())
    for _ in range(3):
        optimizer.step(closure)
    optimizer.alpha = 0.9
    before = freeze(optimizer.state_dict())

    def fails(_):
        raise ValueError("after the load")

    handle = optimizer.register_load_state_dict_post_hook(fails)
    with pytest.raises(ValueError, match="after the load"):
        optimizer.load_state_dict(saved)
    handle.remove()
    same(freeze(optimizer.state_dict()), before)
    assert (optimizer.session.steps_taken, optimizer.alpha) == (4, 0.9)


@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize("base", [SGD, AdamW])
def test_state_made_in_inference_mode_is_refused_and_changes_nothing(base, backend):
    """A kernel would write to it before autograd refuses to count that, and weights alone would be put back."""
    model, optimizer = trained(base=base, backend=backend)
    before, state_dict = everything(optimizer), optimizer.state_dict()
    key = "exp_avg" if base is AdamW else "momentum_buffer"
    with torch.inference_mode():
        state_dict["state"] = {i: {**entry, key: entry[key].clone()} for i, entry in state_dict["state"].items()}
    with pytest.raises(ValueError, match=rf"'{key}' of parameter 0 of group 0.*inference_mode.*clone"):
        optimizer.load_state_dict(state_dict)
    same(everything(optimizer), before)
    for entry, theirs in zip(optimizer.state.values(), state_dict["state"].values(), strict=True):
        entry[key] = theirs[key]
    with pytest.raises(ValueError, match=rf"'{key}' of parameter 0 of group 0.*inference_mode.*clone"):
        optimizer.step(regression(model, *batch()))
    same(everything(optimizer), before)
    for entry in optimizer.state.values():
        entry[key] = entry[key].clone()
    optimizer.step(regression(model, *batch()))
