"""torch.optim's hooks, of FusedGAM and of its base optimizer. All of torch's private names for them are here."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

_OWN = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)
_GLOBAL = ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")


def complete(base: Optimizer) -> None:
    """Give the tables of hooks to an optimizer that lacks them: a wrapper that does not call torch's constructor."""
    for name in _OWN:
        if not hasattr(base, name):
            setattr(base, name, OrderedDict())


def has_step_hooks(base: Optimizer) -> bool:
    """Whether hooks of the optimizer's own are to be called around its `step`, with the direction in `p.grad`."""
    return bool(base._optimizer_step_pre_hooks or base._optimizer_step_post_hooks)


@contextmanager
def global_step_hooks_called() -> Iterator[None]:
    """For the time of a base optimizer's `step`: hooks of all optimizers are called for FusedGAM's step, not once more."""
    kept = {name: getattr(torch_optimizer, name) for name in _GLOBAL}
    if not any(kept.values()):
        yield
        return
    for name in _GLOBAL:
        setattr(torch_optimizer, name, type(kept[name])())
    try:
        yield
    finally:
        for name, hooks in kept.items():
            setattr(torch_optimizer, name, hooks)


def before_state_dict(optimizer: Optimizer) -> None:
    for hook in list(optimizer._optimizer_state_dict_pre_hooks.values()):
        hook(optimizer)


def after_state_dict(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """`state_dict`, or what a hook made in its place."""
    for hook in list(optimizer._optimizer_state_dict_post_hooks.values()):
        result = hook(optimizer, state_dict)
        state_dict = state_dict if result is None else result
    return state_dict


def before_load(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A shallow copy of `state_dict`, or what a hook made of it."""
    state_dict = state_dict.copy()
    for hook in list(optimizer._optimizer_load_state_dict_pre_hooks.values()):
        result = hook(optimizer, state_dict)
        state_dict = state_dict if result is None else result
    return state_dict


def after_load(optimizer: Optimizer) -> None:
    for hook in list(optimizer._optimizer_load_state_dict_post_hooks.values()):
        hook(optimizer)


def note_step_of_base(base: Optimizer) -> None:
    """As `base.step` does for an LR scheduler that watches it."""
    base._opt_called = True  # type: ignore[attr-defined]
