"""What loading changes of a base optimizer, put back when it fails; and whether a state dict fits its parameters."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from gam_fused.checks import Groups, describe

if TYPE_CHECKING:
    from gam_fused.backends.base_optimizers import FusedBase

# Entries of torch's own optimizers that are shaped as the parameter is. What others have put beside them is theirs.
_SHAPED_AS_THE_PARAMETER = {
    *("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "grad_avg", "acc_delta"),
    *("sum", "prev", "step_size", "ax"),
}
_SHAPED_OTHERWISE = {"Adafactor", "LBFGS"}


class BaseState:
    """Groups, state and attributes of an optimizer as they are now.

    Tensors are not copied, since torch's loading replaces them; but those of an optimizer that loads in its own way are.
    """

    def __init__(self, base: Optimizer):
        self._base = base
        self._attributes = dict(base.__dict__)
        self._groups = [(group, dict(group)) for group in base.param_groups]
        self._state = [(entry, dict(entry)) for entry in base.state.values() if isinstance(entry, dict)]
        # One that keeps them elsewhere is the only one who can put them back; it may write to the tensors that are there.
        own = type(base).load_state_dict is not Optimizer.load_state_dict
        self._saved = copy.deepcopy(base.state_dict()) if own else None

    def put_back(self) -> None:
        if self._saved is not None:
            self._base.load_state_dict(self._saved)
        self._base.__dict__.clear()
        self._base.__dict__.update(self._attributes)
        for entry, kept in [*self._groups, *self._state]:
            if len(entry) != len(kept) or any(entry.get(k) is not v for k, v in kept.items()):
                entry.clear()
                entry.update(kept)
        self._base.param_groups[:] = [group for group, _ in self._groups]


def check_state(
    base: Optimizer, fused: FusedBase | None, groups: Groups, state_dict: dict[str, Any], saved: Sequence[dict[str, Any]]
) -> None:
    """Whether state tensors have their parameter's shape, and a fused base finds all it needs.

    Raises:
        ValueError: one that does not fit. torch would broadcast it in silence.
    """
    kind = type(base)
    if not kind.__module__.startswith("torch.optim") or kind.__name__ in _SHAPED_OTHERWISE:
        return
    for i, group in enumerate(saved):
        for key, value in [*group.items(), *(("params", number) for number in group["params"])]:
            if isinstance(value, Tensor) and value.numel() != 1:  # torch asks it whether it is true, or equal
                shape = tuple(value.shape)
                raise ValueError(f"param group {i} of the state dict: {key!r} must be a number, but has shape {shape}")
        betas = group.get("betas", (0.0, 0.0))
        if not (isinstance(betas, (list, tuple)) and len(betas) >= 2):
            raise ValueError(f"param group {i} of the state dict: betas must be a pair, but is {betas!r}")
    if [len(g["params"]) for g in saved] != [len(g["params"]) for g in groups]:
        return  # torch's own check tells
    params = dict(zip((i for g in saved for i in g["params"]), ((p, g) for g in groups for p in g["params"]), strict=True))
    for number, entry in state_dict["state"].items():
        if number not in params:
            continue
        p = params[number][0]
        if not isinstance(entry, dict):
            raise ValueError(f"the state dict's state of {describe(p, groups)} must be a dict, but is {entry!r}")
        for key, value in entry.items():
            _check_entry(key, value, p, groups)
        missing = [key for key in fused.required(entry) if entry.get(key) is None] if fused else []
        if missing:
            raise ValueError(f"the state dict's state of {describe(p, groups)} lacks {', '.join(missing)}")


def _check_entry(key: str, value: Any, p: Tensor, groups: Groups) -> None:
    if key == "step":
        number = value.item() if isinstance(value, Tensor) and value.numel() == 1 and value.device.type != "meta" else value
        if not (isinstance(number, (int, float)) and math.isfinite(number) and number >= 0):
            raise ValueError(f"the state dict's {key!r} of {describe(p, groups)} must be a number, but is {value!r}")
    elif key in _SHAPED_AS_THE_PARAMETER and value is not None:
        if not isinstance(value, Tensor):
            raise ValueError(f"the state dict's {key!r} of {describe(p, groups)} must be a tensor, but is {value!r}")
        if value.shape != p.shape:
            shape = tuple(value.shape)
            raise ValueError(
                f"the state dict's {key!r} of {describe(p, groups)} has shape {shape}, so it belongs to another parameter"
            )
