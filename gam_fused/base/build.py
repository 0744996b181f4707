"""The base optimizer, from a class, a factory or an instance."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from gam_fused.base.keywords import name_of
from gam_fused.migration import explain


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
            raise ValueError("params=None needs an optimizer instance; otherwise pass the parameters to be optimized")
        try:
            base = base_optimizer(params, **keywords)
        except TypeError as error:
            if "unexpected keyword" in str(error):
                name = name_of(base_optimizer)
                hint = "; FusedGAM's own guard of divisions is xi" if "'eps'" in str(error) else ""
                hint += "".join(f"; {told}" for keyword in keywords if (told := explain(keyword)))
                raise TypeError(
                    f"neither FusedGAM nor its base optimizer {name} takes this argument: {error}{hint}"
                ) from error
            raise
    else:
        raise TypeError(f"base_optimizer must be an optimizer class, a factory or an instance, but is {base_optimizer!r}")
    if not isinstance(base, Optimizer):
        raise TypeError(f"base_optimizer returned a {type(base).__name__}, not a torch.optim.Optimizer")
    clash = sorted({"perturb", "gam"} & base.defaults.keys())
    if clash:
        raise TypeError(f"the base optimizer {type(base).__name__} has param group entries that FusedGAM uses: {clash}")
    if isinstance(base, torch.optim.LBFGS):
        raise TypeError("LBFGS evaluates the closure itself and cannot be a base optimizer; use SGD, Adam, AdamW or another")
    if isinstance(base, torch.optim.SparseAdam):
        raise TypeError(
            "SparseAdam takes sparse gradients only, and the direction is dense: it cannot be a base optimizer; use Adam, "
            "and embeddings with sparse=False"
        )
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
