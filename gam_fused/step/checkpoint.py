"""State dicts, pickling, and what groups and state need that came from elsewhere.

State dicts are the base optimizer's own, made and loaded by itself. What FusedGAM adds are entries of the param groups, the
one place that every tool that saves optimizers keeps (torch.distributed.checkpoint knows no others): "rho" (or "gam_rho"),
"perturb", and under "gam" the method, its hyperparameters and the counters.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gam_fused import checks
from gam_fused.base import hooks
from gam_fused.base.state import BaseState, check_state
from gam_fused.constants import Control
from gam_fused.parallel.dtensor import local
from gam_fused.transaction.interrupts import Interrupts

if TYPE_CHECKING:
    from gam_fused.optimizer import FusedGAM

# "step": LR schedulers wrap it per instance.
_NOT_PICKLED = ("_plan", "_last", "_precision_watch", "_counters", "_in_step", "step")
_SCHEDULED = ("rho_prime", "alpha", "beta", "gamma")
_COUNTERS = ("steps_taken", "skipped_steps", "noise_step")


def device_counters(optimizer: FusedGAM) -> tuple[float, float]:
    """Skipped steps and the counter of the stochastic rounding. Waits for the device."""
    if optimizer._plan is None:
        return optimizer._counters
    control = optimizer._plan.blocks[0].control.tolist()
    return control[Control.SKIPPED], control[Control.NOISE_STEP]


def picklable(optimizer: FusedGAM) -> dict[str, Any]:
    """What pickle and deepcopy carry: everything but hooks, as torch.optim has it, and what is built anew from the rest."""
    kept = {k: v for k, v in optimizer.__dict__.items() if k not in _NOT_PICKLED and not k.startswith("_optimizer_")}
    # Copies of the user's generators would not be the ones that the closure draws from.
    return kept | {"_counters": device_counters(optimizer), "_flat_buffers": [], "generators": ()}


def counters(optimizer: FusedGAM) -> dict[str, Any]:
    """What belongs to the whole optimizer: numbers, tuples of numbers and a name. Every group carries all of it."""
    skipped, noise_step = device_counters(optimizer)
    entry = {"steps_taken": optimizer._steps_taken, "skipped_steps": int(skipped), "noise_step": int(noise_step)}
    return entry | {"method": optimizer.method} | {name: getattr(optimizer, name) for name in _SCHEDULED}


def complete_groups(optimizer: FusedGAM) -> None:
    """Give GAM's entries to groups that lack them: added through the base optimizer, or rebuilt by it or by a hook.

    They keep what a group of that number had before, as long as there are as many.
    """
    names, groups = optimizer._gam_defaults, optimizer.param_groups
    before = optimizer._group_values if len(optimizer._group_values) == len(groups) else [names] * len(groups)
    for group, values in zip(groups, before, strict=True):
        for name in names:
            group.setdefault(name, values[name])
    optimizer._group_values = [{name: group[name] for name in names} for group in groups]


def link(optimizer: FusedGAM) -> None:
    """Groups keep GAM's entries when the base optimizer loads a state dict by itself."""
    hooks.complete(optimizer.base_optimizer)
    reference = weakref.ref(optimizer)

    def before(base: Optimizer, state_dict: dict[str, Any]) -> None:
        if (linked := reference()) is not None and linked.base_optimizer is base:
            complete_groups(linked)

    def after(base: Optimizer) -> None:
        if (linked := reference()) is not None and linked.base_optimizer is base:
            complete_groups(linked)

    optimizer.base_optimizer.register_load_state_dict_pre_hook(before)
    optimizer.base_optimizer.register_load_state_dict_post_hook(after)


def _enter(optimizer: FusedGAM, loaded: list[dict[str, Any]]) -> None:
    """Put GAM's entries into the groups, also of a base optimizer that has loaded the others elsewhere."""
    for group, values in zip(optimizer.param_groups, loaded, strict=True):
        group.update({name: values[name] for name in optimizer._gam_defaults})
    complete_groups(optimizer)


def save(optimizer: FusedGAM) -> dict[str, Any]:
    hooks.before_state_dict(optimizer)
    drop_unstarted(optimizer)
    complete_groups(optimizer)
    entry = counters(optimizer)
    for group in optimizer.param_groups:
        group["gam"] = entry
    state_dict: dict[str, Any] = optimizer.base_optimizer.state_dict()
    saved = state_dict.get("param_groups", [])
    if len(saved) == len(optimizer.param_groups):  # of a base optimizer that makes it from others than its own groups
        for mine, group in zip(optimizer.param_groups, saved, strict=True):
            for name in optimizer._gam_defaults:
                group.setdefault(name, mine[name])
    return hooks.after_state_dict(optimizer, state_dict)


def load(optimizer: FusedGAM, state_dict: dict[str, Any]) -> None:
    """Load a state dict of FusedGAM or of its base optimizer's class; entries it lacks keep their present values.

    Raises:
        ValueError, TypeError, KeyError: and nothing has changed.
    """
    if optimizer._in_step.locked():
        raise RuntimeError("load_state_dict was called during a step of the optimizer, from its closure or another thread")
    state_dict = hooks.before_load(optimizer, state_dict)
    saved = _groups_of(state_dict)
    extra: dict[str, Any] = next((group["gam"] for group in saved if group.get("gam")), {})
    values = _checked_entry(optimizer, extra) if extra else {}
    base, before = optimizer.base_optimizer, BaseState(optimizer.base_optimizer)
    complete_groups(optimizer)
    present = [{name: group[name] for name in optimizer._gam_defaults} for group in optimizer.param_groups]
    own_method = not extra or _is_of(optimizer, extra)
    groups = _with_entries(optimizer, saved, present, own_method)
    state_of_gam = {name: getattr(optimizer, name) for name in (*values, "_plan")}
    with Interrupts():
        try:
            check_state(base, optimizer._fused, optimizer.param_groups, state_dict, saved)
            base.load_state_dict({**state_dict, "param_groups": groups})
            _enter(optimizer, groups)
            for name, value in values.items():
                setattr(optimizer, name, value)
            optimizer._tables()  # raises for numbers that cannot be
            if extra:
                optimizer._plan = None
            hooks.after_load(optimizer)
        except BaseException:
            before.put_back()
            for name, value in state_of_gam.items():
                setattr(optimizer, name, value)
            raise


def _groups_of(state_dict: Any) -> list[dict[str, Any]]:
    groups = state_dict.get("param_groups") if isinstance(state_dict, dict) else None
    if not isinstance(groups, Iterable) or not isinstance(state_dict.get("state"), dict):
        found = sorted(map(str, state_dict)) if isinstance(state_dict, dict) else type(state_dict).__name__
        raise ValueError(f'the state dict is not an optimizer\'s: "state" and "param_groups" are expected, found is {found}')
    groups = list(groups)
    for i, group in enumerate(groups):
        if not isinstance(group, dict) or "params" not in group:
            raise ValueError(f"param group {i} of the state dict is not a dict with params, but {group!r}")
        if not isinstance(group.get("gam", {}), dict):
            raise ValueError(f'param group {i} of the state dict: its entry "gam" must be a dict, but is {group["gam"]!r}')
    return groups


def _is_of(optimizer: FusedGAM, extra: dict[str, Any]) -> bool:
    """Whether a state dict's entry "gam" was written by an optimizer of the same method. Version 0.1 did not say."""
    if "method" in extra:
        return bool(extra["method"] == optimizer.method)
    return all((extra[name] is None) == (getattr(optimizer, name) is None) for name in _SCHEDULED)


def _checked_entry(optimizer: FusedGAM, extra: dict[str, Any]) -> dict[str, Any]:
    """The attributes that an entry "gam" stands for."""
    missing = [name for name in (*_COUNTERS, *_SCHEDULED) if name not in extra]
    if missing:
        raise ValueError(f'the entry "gam" of the state dict\'s param groups lacks {", ".join(missing)}; it holds {extra}')
    counts = {name: checks.whole(f'"gam" of the state dict: {name}', extra[name], minimum=0) for name in _COUNTERS}
    values: dict[str, Any] = {
        "_steps_taken": counts["steps_taken"],
        "_counters": (float(counts["skipped_steps"]), float(counts["noise_step"])),
    }
    if not _is_of(optimizer, extra):  # its alpha may mean something else
        return values
    for name in _SCHEDULED:
        value, mine = extra[name], getattr(optimizer, name)
        if (value is None) != (mine is None):
            raise ValueError(f'"gam" of the state dict: {name}={value!r} does not go with method={optimizer.method!r}')
        values[name] = tuple(value) if isinstance(value, list) else value
    return values


def _with_entries(
    optimizer: FusedGAM, saved: list[dict[str, Any]], present: list[dict[str, Any]], own_method: bool
) -> list[dict[str, Any]]:
    """The groups to be loaded: GAM's entries as saved, or the present ones, where they lack them or are another method's."""
    if len(saved) != len(present):
        return saved  # the base optimizer says so
    kept = [mine if not own_method else {} for mine in present]
    return [{**mine, **theirs, **over} for mine, theirs, over in zip(present, saved, kept, strict=True)]


def forget_plan(optimizer: FusedGAM) -> None:
    """Drop everything built from param groups and state that are not the optimizer's any more; counters stay."""
    optimizer._counters, optimizer._plan = device_counters(optimizer), None


def drop_unstarted(optimizer: FusedGAM) -> None:
    """Remove state that a skipped first step created: its parameter has not been updated yet, so torch would have none.

    Waits for the device, if there may be such.
    """
    if optimizer._plan is not None:
        for block in optimizer._plan.blocks:
            block.state.drop_unstarted(optimizer.state)


@torch.no_grad()
def create_state(optimizer: FusedGAM) -> None:
    """`step()` without a closure: one base step with zero gradients at lr 0, which creates the state and changes nothing.

    torch.distributed.checkpoint initialises optimizers that way before it loads into them.
    """
    groups = optimizer.param_groups
    params: list[Tensor] = [p for group in groups for p in group["params"]]
    idle = all(group.get("lr") is not None and float(group["lr"]) == 0.0 for group in groups)
    if not idle or any(p.grad is not None and bool(local(p.grad).count_nonzero()) for p in params):
        raise RuntimeError(
            "FusedGAM.step needs a closure that computes the loss, since every step makes several gradient passes: "
            "optimizer.step(closure). For loops that call it without, see gam_fused.integrations (Lightning, transformers)"
        )
    drop_unstarted(optimizer)
    with hooks.global_step_hooks_called():
        optimizer.base_optimizer.step()
    forget_plan(optimizer)
