"""State dicts, and state that is made before there was a step.

State dicts are the base optimizer's own, made and loaded by itself. What FusedGAM adds are entries of the param groups, the
one place that every tool that saves optimizers keeps (torch.distributed.checkpoint knows no others): "rho" (or "gam_rho"),
"perturb", and under "gam" the method, its hyperparameters and the counters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gam_fused import torch_private
from gam_fused.base.state import BaseState, check_state
from gam_fused.checks import whole
from gam_fused.parallel.dtensor import check_can_be_written, local
from gam_fused.settings import SCHEDULED, SCHEDULED_LATER, Settings
from gam_fused.step.method import Method
from gam_fused.step.session import Session

_COUNTERS = ("steps_taken", "skipped_steps", "noise_step")


def save(session: Session, settings: Settings) -> dict[str, Any]:
    """The base optimizer's state dict, with GAM's entries in its param groups."""
    session.drop_unstarted()
    session.entries.complete()
    skipped, noise_step = session.counters
    entry = {"steps_taken": session.steps_taken, "skipped_steps": int(skipped), "noise_step": int(noise_step)}
    entry |= {"method": settings.method} | {n: getattr(settings, n) for n in (*SCHEDULED, *SCHEDULED_LATER)}
    for group in session.param_groups:
        group["gam"] = entry
    state_dict: dict[str, Any] = session.base.state_dict()
    saved = state_dict.get("param_groups", [])
    if len(saved) == len(session.param_groups):  # of a base optimizer that makes it from others than its own groups
        for mine, group in zip(session.entries.present(), saved, strict=True):
            for name, value in mine.items():
                group.setdefault(name, value)
    return state_dict


@contextmanager
def loading(session: Session, settings: Settings, method: Method, state_dict: dict[str, Any]) -> Iterator[Settings]:
    """Load a state dict of FusedGAM or of its base optimizer's class; entries it lacks keep their present values.

    Yields:
        The settings, with those that the state dict holds. When what is done with them raises, nothing has changed.

    Raises:
        ValueError, TypeError, KeyError: what cannot be loaded, named. Nothing has changed.
    """
    saved = _groups_of(state_dict)
    extra: dict[str, Any] = next((group["gam"] for group in saved if group.get("gam")), {})
    loaded = _checked_entry(settings, extra) if extra else None
    before = BaseState(session.base)
    session.entries.complete()
    groups = _with_entries(saved, session.entries.present(), own_method=not extra or _is_of(settings, extra))
    undo: Callable[[], None] | None = None
    try:
        check_state(session.base, session.fused, session.param_groups, state_dict, saved)
        session.base.load_state_dict({**state_dict, "param_groups": groups})
        _check_can_be_written(session)
        session.entries.enter(groups)
        told = replace(settings, **loaded.scheduled) if loaded else settings
        session.tables(told, method)  # raises for numbers that cannot be
        if loaded:
            undo = session.restart(loaded.steps_taken, loaded.counters)
        yield told
    except BaseException:
        if undo:
            undo()
        before.put_back()
        raise


@dataclass(frozen=True)
class _Entry:
    """What an entry "gam" says."""

    steps_taken: int
    counters: tuple[float, float]
    scheduled: dict[str, Any]


def _groups_of(state_dict: Any) -> list[dict[str, Any]]:
    groups = state_dict.get("param_groups") if isinstance(state_dict, dict) else None
    if not isinstance(groups, Iterable) or not isinstance(state_dict.get("state"), dict):
        found = sorted(map(str, state_dict)) if isinstance(state_dict, dict) else type(state_dict).__name__
        raise ValueError(f'the state dict is not an optimizer\'s: it must have "state" and "param_groups", but has {found}')
    groups = list(groups)
    for i, group in enumerate(groups):
        if not isinstance(group, dict) or "params" not in group:
            raise ValueError(f"param group {i} of the state dict is not a dict with params, but {group!r}")
        if not isinstance(group.get("gam", {}), dict):
            raise ValueError(f'param group {i} of the state dict: its entry "gam" must be a dict, but is {group["gam"]!r}')
    return groups


def _is_of(settings: Settings, extra: dict[str, Any]) -> bool:
    """Whether an entry "gam" was written by an optimizer of the same method. Version 0.1 did not say."""
    if "method" in extra:
        return bool(extra["method"] == settings.method)
    return all((extra[name] is None) == (getattr(settings, name) is None) for name in SCHEDULED)


def _checked_entry(settings: Settings, extra: dict[str, Any]) -> _Entry:
    missing = [name for name in (*_COUNTERS, *SCHEDULED) if name not in extra]
    if missing:
        raise ValueError(f'the entry "gam" of the state dict\'s param groups lacks {", ".join(missing)}; it holds {extra}')
    counts = {name: whole(f'"gam" of the state dict: {name}', extra[name], minimum=0) for name in _COUNTERS}
    values: dict[str, Any] = {}
    if _is_of(settings, extra):  # another method's alpha may mean something else
        for name in SCHEDULED:
            value, mine = extra[name], getattr(settings, name)
            if (value is None) != (mine is None):
                raise ValueError(f'"gam" of the state dict: {name}={value!r} is not valid for method={settings.method!r}')
            values[name] = tuple(value) if isinstance(value, list) else value
        values |= {name: extra[name] for name in SCHEDULED_LATER if name in extra}
    return _Entry(counts["steps_taken"], (float(counts["skipped_steps"]), float(counts["noise_step"])), values)


def _check_can_be_written(session: Session) -> None:
    for p, entry in session.state.items():
        for key, value in entry.items() if isinstance(entry, dict) else ():
            check_can_be_written(key, value, p, session.param_groups)


def _with_entries(saved: list[dict[str, Any]], present: list[dict[str, Any]], *, own_method: bool) -> list[dict[str, Any]]:
    """The groups to be loaded: GAM's entries as saved, or the present ones, where they lack them or are another method's."""
    if len(saved) != len(present):
        return saved  # the base optimizer says so
    kept = [mine if not own_method else {} for mine in present]
    return [{**mine, **theirs, **over} for mine, theirs, over in zip(present, saved, kept, strict=True)]


@torch.no_grad()
def create_state(session: Session) -> None:
    """`step()` without a closure: one base step with zero gradients at lr 0, which creates the state and changes nothing.

    torch.distributed.checkpoint initialises optimizers that way before it loads into them.
    """
    groups = session.param_groups
    params: list[Tensor] = [p for group in groups for p in group["params"]]
    idle = all(group.get("lr") is not None and float(group["lr"]) == 0.0 for group in groups)
    if not idle or any(p.grad is not None and bool(local(p.grad).count_nonzero()) for p in params):
        raise RuntimeError(
            "FusedGAM.step needs a closure that computes the loss, since every step makes several gradient passes: "
            "optimizer.step(closure). For loops that pass none, see gam_fused.integrations (Lightning, transformers)"
        )
    session.drop_unstarted()
    with torch_private.global_step_hooks_called():
        session.base.step()
    session.forget_plan()
