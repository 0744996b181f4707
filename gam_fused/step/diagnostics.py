"""What a step saw: norms from the reductions it made anyway, as 0-d tensors on the device."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gam_fused.backends.tensor_lists import moved
from gam_fused.constants import GUARD, Control
from gam_fused.step import precision

if TYPE_CHECKING:
    from gam_fused.memory.plan import Block
    from gam_fused.optimizer import FusedGAM
    from gam_fused.step.step import Step


def diagnose(optimizer: FusedGAM) -> dict[str, Tensor]:
    """Figures of the last step; keys that its method does not have are absent. Nothing waits for the device.

    - ``loss``: of pass 1 (NaN if the closure returned no number);
    - ``sharpness``: loss at theta1 minus loss (every method but ``exact``);
    - ``gradient_norm``: |g0| over perturbed parameters (with `adaptive`, |g0 * |theta||, and likewise below);
    - ``curvature``: |g1 - g0|/rho', or |f| of ``exact``: an estimate of |grad |grad L||;
    - ``first_order_flatness``: rho |g2|, or rho |g_adv|: rho of the first perturbed group;
    - ``cosine``: of h+ and h- (``accelerated``);
    - ``perturbation_0``, ``_1``, ``_2``: norms of the perturbations as stored;
    - ``direction_norm``: |d|, clipped and unscaled; 0 for a skipped step of a fused base;
    - ``noise_ratio``: rounding noise of the probe over the probe, an estimate; see `gam_fused.step.precision`;
    - ``skipped_steps``: since the beginning.

    With ``perturb_sync="local"`` these are each rank's own, but ``direction_norm`` is of the averaged d. With sharded
    parameters they are global, and every rank must ask for them: the norms need an all-reduce. Losses are always the rank's.

    Raises:
        RuntimeError: before the first step.
    """
    step = optimizer._last
    if step is None:
        raise RuntimeError("diagnostics() describes the last step, and there was none yet")
    shared, control = step.blocks[0].shared, step.blocks[0].control
    result = {"loss": _number(step.losses["theta"], shared.device)}
    if "theta1" in step.losses:
        result["sharpness"] = _number(step.losses["theta1"], shared.device) - result["loss"]
    result |= _norms(optimizer, step)
    sums = step.plan.shards.totals(step.blocks, lambda b: _sums(b, step.ascents))
    for i, ascent in enumerate(step.ascents):
        result[f"perturbation_{ascent}"] = sums[i].sqrt()
    result["direction_norm"] = sums[-1].sqrt()
    if step.ascents:
        result["noise_ratio"] = precision.noise_ratio(optimizer, step)
    result["skipped_steps"] = control[Control.SKIPPED].clone()
    return result


def _norms(optimizer: FusedGAM, step: Step) -> dict[str, Tensor]:
    shared, control = step.blocks[0].shared, step.blocks[0].control
    scale = control[Control.LOSS_SCALE]
    norm = shared.partials[:, 0].sum(1).sqrt() / scale
    if not step.ascents:
        return {"gradient_norm": norm[GUARD]} if len(step.losses) == 1 else {}
    rho = next((float(g[optimizer.rho_key]) for g in optimizer.param_groups if g["perturb"]), 0.0)
    if optimizer.method == "exact":
        gradient, adversarial = step.extras["gradient_norm"], step.extras["adversarial_gradient_norm"]
        return {"gradient_norm": gradient, "curvature": norm[0], "first_order_flatness": rho * adversarial}
    result = {"gradient_norm": norm[0]}
    if optimizer.method == "sam":
        return result
    result |= {"curvature": norm[1] / optimizer.rho_prime, "first_order_flatness": rho * norm[2]}
    if optimizer.method == "accelerated":
        plus, _, cross, _, minus, _ = step.extras.get("products", shared.partials[GUARD].sum(1))
        result["cosine"] = cross / (plus.sqrt() * minus.sqrt())
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
