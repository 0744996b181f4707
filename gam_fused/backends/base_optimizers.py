"""The base optimizer: building it, and which ones the kernels can update themselves (torch's own SGD, Adam and AdamW)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from gam_fused.base.keywords import name_of
from gam_fused.constants import Algorithm, Column, Flag


@dataclass(frozen=True)
class FusedBase:
    """How a base optimizer maps to `combined_update_`.

    Attributes:
        algorithm: which update.
        step_key: the state entry with the number of updates, or "" where the state has none.
    """

    algorithm: Algorithm
    step_key: str

    def state_keys(self, group: dict[str, Any]) -> tuple[str | None, str | None, str | None]:
        """Names of the per-element state tensors a param group needs, in the kernels' order."""
        if self.algorithm == Algorithm.SGD:
            return ("momentum_buffer" if group["momentum"] != 0 else None, None, None)
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq" if group["amsgrad"] else None)

    def required(self, entry: dict[str, Any]) -> tuple[str, ...]:
        """Names of what the state of a parameter that has been updated holds in any case."""
        return ("step", "exp_avg", "exp_avg_sq") if entry and self.algorithm == Algorithm.ADAM else ()

    def coefficients(self, group: dict[str, Any]) -> dict[Column, float]:
        """The group's hyperparameters as columns of the coefficient table; a tensor lr is left to the caller."""
        flags = Flag.MAXIMIZE * bool(group["maximize"])
        row = {Column.WEIGHT_DECAY: float(group["weight_decay"])}
        if self.algorithm == Algorithm.SGD:
            flags |= Flag.NESTEROV * bool(group["nesterov"])
            row |= {Column.MOMENTUM: float(group["momentum"]), Column.DAMPENING: float(group["dampening"])}
        else:
            flags |= Flag.AMSGRAD * bool(group["amsgrad"])
            flags |= Flag.DECOUPLED * bool(group.get("decoupled_weight_decay", False))
            beta1, beta2 = group["betas"]
            row |= {Column.BETA1: float(beta1), Column.BETA2: float(beta2), Column.EPS: float(group["eps"])}
        return row | {Column.FLAGS: float(flags)}


_SGD = FusedBase(Algorithm.SGD, "")
_ADAM = FusedBase(Algorithm.ADAM, "step")
_FUSED = {torch.optim.SGD: _SGD, torch.optim.Adam: _ADAM, torch.optim.AdamW: _ADAM}


def fused_base(optimizer: Optimizer) -> FusedBase | None:
    """The fused update of exactly torch's SGD, Adam and AdamW; None for every other optimizer, subclasses too."""
    return _FUSED.get(type(optimizer))


def rho_key(base: Optimizer) -> str:
    """The group entry that holds GAM's radius: "rho", or "gam_rho" where the base optimizer has a rho of its own."""
    return "gam_rho" if "rho" in base.defaults and "gam_rho" not in base.defaults else "rho"


def build(
    params: Iterable[Any] | None,
    base_optimizer: Callable[..., Optimizer] | Optimizer,
    keywords: dict[str, Any],
) -> Optimizer:
    """The base optimizer from a class, a factory or an instance.

    Raises:
        TypeError: not something that gives a torch optimizer, keywords beside an instance, or one the class does not know.
        ValueError: parameters beside an instance that are not its own, or none at all.
    """
    if isinstance(base_optimizer, Optimizer):
        if keywords:
            raise TypeError(f"base_optimizer is an instance: set {', '.join(keywords)} on it, not on FusedGAM")
        _same_parameters(params, base_optimizer)
        base = base_optimizer
    elif callable(base_optimizer):
        if params is None:
            raise ValueError("params=None goes with an instance of an optimizer; pass the parameters to be optimized")
        try:
            base = base_optimizer(params, **keywords)
        except TypeError as error:
            if "unexpected keyword" in str(error):
                name = name_of(base_optimizer)
                hint = "; FusedGAM's own guard of divisions is xi" if "'eps'" in str(error) else ""
                raise TypeError(
                    f"neither FusedGAM nor its base optimizer {name} takes this argument: {error}{hint}"
                ) from error
            raise
    else:
        raise TypeError(f"base_optimizer must be an optimizer class, a factory or an instance, but is {base_optimizer!r}")
    if not isinstance(base, Optimizer):
        raise TypeError(f"base_optimizer gave a {type(base).__name__}, not a torch.optim.Optimizer")
    clash = sorted({"perturb", "gam"} & base.defaults.keys())
    if clash:
        raise TypeError(f"the base optimizer {type(base).__name__} has param group entries that FusedGAM uses: {clash}")
    if isinstance(base, torch.optim.LBFGS):
        raise TypeError("LBFGS evaluates the closure itself and cannot be a base optimizer; use SGD, Adam, AdamW or another")
    if any(group.get("differentiable") for group in base.param_groups):
        raise ValueError("differentiable=True is not supported: the update is not recorded by autograd")
    return base


def _same_parameters(params: Iterable[Any] | None, base: Optimizer) -> None:
    if params is None:
        return
    given = set()
    for item in params:
        entries = item["params"] if isinstance(item, dict) else [item]
        for entry in [entries] if isinstance(entries, torch.Tensor) else entries:
            given.add(id(entry[1] if isinstance(entry, tuple) else entry))
    if given != {id(p) for group in base.param_groups for p in group["params"]}:
        raise ValueError("params are not the parameters of the base optimizer instance; pass params=None to use its own")
