"""What a step saw: norms from the reductions that it makes anyway, as 0-d tensors on the device."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gam_fused.backends.uploads import moved
from gam_fused.constants import GUARD, Control
from gam_fused.memory.blocks import Block
from gam_fused.step.precision import noise_ratio
from gam_fused.step.record import Record


def diagnose(record: Record, autocast_eps: float) -> dict[str, Tensor]:
    """Figures of one step; entries that its method does not have are absent. Nothing synchronizes with the device.

    - ``loss``: of pass 1 (NaN if the closure returned no number);
    - ``sharpness``: loss at theta1 minus loss at theta, on the part of the batch if there is one (not for ``exact``);
    - ``gradient_norm``: |g0| over perturbed parameters (with `adaptive`, |g0 * |theta||, and likewise below); on the part of
      the batch if there is one;
    - ``curvature``: |g1 - g0|/rho', or |f| for ``exact``: an estimate of |grad |grad L||;
    - ``first_order_flatness``: rho |g2|, or rho |g_adv|, with rho of the first perturbed group;
    - ``cosine``: of h+ and h- (``accelerated``: of g1 and g3 with g0 and g2; ``gsam``: of g1 with g0); with `max_ratio`, of
      h_norm and h_loss: near -1, the flatness term works against the loss gradient;
    - ``ratio``: with `max_ratio`, alpha |h_norm|/|h_loss| before the bound (``max_ratio`` if alpha is infinite), and
      ``bounded``: 1 if that was above `max_ratio`, so that the term was scaled down, else 0;
    - ``perturbation_0``, ``_1``, ``_2``: norms of the perturbations as stored;
    - ``direction_norm``: |d|, clipped and unscaled; 0 for a skipped step with a fused base;
    - ``noise_ratio``: an estimate of the probe's rounding noise, relative to the probe; see `gam_fused.step.precision`;
    - ``skipped_steps``: since the beginning.

    With ``perturb_sync="local"`` these are each rank's own, except ``direction_norm``, which is that of the averaged d. With
    sharded parameters they are global, and every rank must ask for them: the norms need an all-reduce. Losses are always the
    rank's own.

    Args:
        autocast_eps: `precision.Watch.autocast_eps`.
    """
    shared, control = record.blocks[0].shared, record.blocks[0].control
    result = {"loss": _number(record.losses["theta"], shared.device)}
    if "theta1" in record.losses:
        start = record.losses.get("theta on part", record.losses["theta"])
        result["sharpness"] = _number(record.losses["theta1"], shared.device) - _number(start, shared.device)
    if record.ascents:
        result |= record.method.norms(record)
    elif len(record.losses) == 1:
        result["gradient_norm"] = record.norm(GUARD)
    sums = record.shards.totals(record.blocks, lambda b: _sums(b, record.ascents))
    for i, ascent in enumerate(record.ascents):
        result[f"perturbation_{ascent}"] = sums[i].sqrt()
    result["direction_norm"] = sums[-1].sqrt()
    if record.ascents:
        result["noise_ratio"] = noise_ratio(record, autocast_eps)
    result["skipped_steps"] = control[Control.SKIPPED].clone()
    return result


def _sums(b: Block, ascents: list[int]) -> Tensor:
    """Sums of squares over one block: of each perturbation, and of d."""
    return torch.stack([b.part("realised", ascent).sum() for ascent in ascents] + [b.part("direction").sum()])


def _number(loss: Any, device: torch.device) -> Tensor:
    if isinstance(loss, Tensor):
        value = loss.reshape(()) if loss.numel() == 1 else torch.tensor(math.nan, device="cpu")
    else:
        value = torch.tensor(loss if isinstance(loss, (int, float)) else math.nan, dtype=torch.float64, device="cpu")
    return moved(value, device, torch.float64)
