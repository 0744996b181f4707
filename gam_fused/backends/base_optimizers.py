"""The base optimizers that the kernels update themselves (torch's own SGD, Adam and AdamW): one record each.

A record says how the optimizer's groups and state map to `combined_update_`. Its update is in `math/`, once per language.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from gam_fused.backends.math.adam import adam, adam_lists_
from gam_fused.backends.math.sgd import sgd, sgd_lists_
from gam_fused.constants import Algorithm, Column, Flag

Group = dict[str, Any]


@dataclass(frozen=True)
class FusedBase:
    """How a base optimizer maps to `combined_update_`.

    Attributes:
        algorithm: which update.
        kinds: exactly which classes it is the update of; not of their subclasses.
        step_key: the state entry with the number of updates, or "" where the state has none.
        needed: names of what the state of a parameter that has been updated holds in any case.
        state_keys: names of the per-element state tensors a param group needs, in the kernels' order.
        coefficients: the group's hyperparameters as columns of the coefficient table; a tensor lr is left to the caller.
        exact: the update of one tensor in float64, the specification. lists_: the same of lists, for the torch backend.
    """

    algorithm: Algorithm
    kinds: tuple[type[Optimizer], ...]
    step_key: str
    needed: tuple[str, ...]
    state_keys: Callable[[Group], tuple[str | None, str | None, str | None]]
    coefficients: Callable[[Group], dict[Column, float]]
    exact: Callable[..., None]
    lists_: Callable[..., None]

    def required(self, entry: dict[str, Any]) -> tuple[str, ...]:
        """Names of what this state of a parameter has to hold."""
        return self.needed if entry else ()


def _sgd_coefficients(group: Group) -> dict[Column, float]:
    flags = Flag.MAXIMIZE * bool(group["maximize"]) | Flag.NESTEROV * bool(group["nesterov"])
    return {
        Column.WEIGHT_DECAY: float(group["weight_decay"]),
        Column.MOMENTUM: float(group["momentum"]),
        Column.DAMPENING: float(group["dampening"]),
        Column.FLAGS: float(flags),
    }


def _adam_coefficients(group: Group) -> dict[Column, float]:
    flags = Flag.MAXIMIZE * bool(group["maximize"]) | Flag.AMSGRAD * bool(group["amsgrad"])
    flags |= Flag.DECOUPLED * bool(group.get("decoupled_weight_decay", False))
    return {
        Column.WEIGHT_DECAY: float(group["weight_decay"]),
        Column.BETA1: float(group["betas"][0]),
        Column.BETA2: float(group["betas"][1]),
        Column.EPS: float(group["eps"]),
        Column.FLAGS: float(flags),
    }


FUSED = (
    FusedBase(
        algorithm=Algorithm.SGD,
        kinds=(torch.optim.SGD,),
        step_key="",
        needed=(),
        state_keys=lambda group: ("momentum_buffer" if group["momentum"] != 0 else None, None, None),
        coefficients=_sgd_coefficients,
        exact=sgd,
        lists_=sgd_lists_,
    ),
    FusedBase(
        algorithm=Algorithm.ADAM,
        kinds=(torch.optim.Adam, torch.optim.AdamW),
        step_key="step",
        needed=("step", "exp_avg", "exp_avg_sq"),
        state_keys=lambda group: ("exp_avg", "exp_avg_sq", "max_exp_avg_sq" if group["amsgrad"] else None),
        coefficients=_adam_coefficients,
        exact=adam,
        lists_=adam_lists_,
    ),
)
UPDATES: dict[int, FusedBase] = {base.algorithm: base for base in FUSED}
_OF_KIND = {kind: base for base in FUSED for kind in base.kinds}


def fused_base(optimizer: Optimizer) -> FusedBase | None:
    """The fused update of exactly the classes that the records name; None for every other optimizer, subclasses too."""
    return _OF_KIND.get(type(optimizer))
