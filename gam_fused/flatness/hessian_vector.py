"""Hessian-vector products: exact, by double backward, and from gradients alone (Appendix D)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gam_fused.backends.tensor_lists import TensorList
from gam_fused.checks import number
from gam_fused.transaction.interrupts import Interrupts
from gam_fused.transaction.randomness import Generators

if TYPE_CHECKING:
    from gam_fused.step.step import Step


def hessian_vector_product(
    gradients: Sequence[Tensor | None], params: Sequence[Tensor], vector: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Hessian . vector by differentiating the gradients once more.

    Args:
        gradients: of the loss with respect to `params`, made with `create_graph=True`; None where there is none.
        vector: shaped as `params`; None where the gradient is None.
    """
    used = [(g, v) for g, v in zip(gradients, vector, strict=True) if g is not None and v is not None and g.requires_grad]
    if not used:
        return [None] * len(params)
    outputs, weights = zip(*used, strict=True)
    with torch.enable_grad():
        return list(torch.autograd.grad(outputs, list(params), grad_outputs=weights, allow_unused=True))


def ascent(lists: Sequence[TensorList], step: Step) -> tuple[list[Tensor | None], Tensor]:
    """The direction v in which the first-order probe of `finite_difference` would go, and the norm |g|.

    v = g / (|g| + xi) over the perturbed parameters; with `adaptive`, theta^2 g / (|theta g| + xi); the sign turned in
    groups that maximise. None where a gradient is missing or not perturbed. All of it is NaN where a gradient that is not
    counted is not finite, so that the step is skipped.
    """
    optimizer, params = step.optimizer, step.plan.params
    gradients = [g for lst in lists for g in lst.tensors]
    counted = [c for b in step.blocks for c in b.layout.counted]
    signs = [-1 if optimizer.param_groups[g].get("maximize") else 1 for b in step.blocks for g in b.groups]
    weights = [p.detach() if optimizer.adaptive else 1 for p in params]
    rows = [_times(g, w) if g is not None and c else None for w, g, c in zip(weights, gradients, counted, strict=True)]
    others = [g for g, c in zip(gradients, counted, strict=True) if g is not None and not c]
    scale, device = optimizer._amp.current_scale(params[0].device), params[0].device
    norm = _norm([g for g in rows if g is not None], device) + 0.0 * _norm(others, device)
    divisor = norm + optimizer.xi * scale
    v = [
        None if g is None else sign * _times(g, w) / _divisor(divisor.to(g.device, _precise(g)))
        for sign, w, g in zip(signs, weights, rows, strict=True)
    ]
    return v, norm / scale


def _times(g: Tensor, weight: Tensor | int) -> Tensor:
    """g * weight; 0 where g is 0, though the weight may be infinite."""
    return torch.where(g == 0, g, g * weight) if isinstance(weight, Tensor) else g


def _divisor(norm: Tensor) -> Tensor:
    """`norm`, or 1 where it is 0: 0 / 0 is along a zero gradient, where nothing moves."""
    return torch.where(norm == 0, 1.0, norm)


def _norm(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    squares = [torch.linalg.vector_norm(g, dtype=torch.float64).to(device).square() for g in tensors]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros((), dtype=torch.float64, device=device)


def _precise(g: Tensor) -> torch.dtype:
    return torch.float64 if g.dtype == torch.float64 else torch.float32


def finite_difference_hvp(
    loss_fn: Callable[[], Tensor],
    params: Iterable[Tensor],
    vector: Iterable[Tensor],
    rho_prime: float = 0.05,
    *,
    preserve_rng_state: bool = True,
    generators: Sequence[Any] = (),
) -> list[Tensor]:
    """Hessian . vector ~ |vector| (grad L(theta + rho' vector/|vector|) - grad L(theta)) / rho', Appendix D.

    Two plain gradients and no double backward, so it works where second derivatives are missing. Both passes see the same
    random numbers. Afterwards weights are as before, bit for bit, and generators as one pass leaves them (after an
    exception: as before); `p.grad` of the parameters is not touched.

    Args:
        loss_fn: returns the 0-d loss at the current weights, without calling backward.
        params: tensors that require a gradient.
        vector: one tensor per parameter, of its shape.
        rho_prime: length of the probing step, in the units of the weights. Small ones drown in rounding, large ones in
            higher derivatives.
        preserve_rng_state: replay dropout masks in the second pass.
        generators: generators of your own that `loss_fn` draws from, as for `FusedGAM`.

    Returns:
        One tensor per parameter, of its shape and dtype.

    Raises:
        ValueError: shapes that do not agree, or rho_prime <= 0.
        RuntimeError: a loss that is not a differentiable 0-d tensor.
    """
    params, vector = list(params), list(vector)
    rho_prime = number("rho_prime", rho_prime, above=0.0)
    if [p.shape for p in params] != [v.shape for v in vector]:
        shapes = f"{[tuple(v.shape) for v in vector]} for parameters of {[tuple(p.shape) for p in params]}"
        raise ValueError(f"vector must hold one tensor of each parameter's shape, but has {shapes}")
    if not params:
        return []
    norm = torch.stack([torch.linalg.vector_norm(v.detach().double()) for v in vector]).square().sum().sqrt()
    if norm == 0:
        return [torch.zeros_like(p) for p in params]
    random = Generators({p.device for p in params}, generators).begin() if preserve_rng_state else None
    with Interrupts() as interrupts:
        backup = [p.detach().clone() for p in params]
        try:
            at_theta = interrupts.let_through(lambda: _gradient(loss_fn, params))
            if random:
                random.first_pass_done()
                random.replay()
            with torch.no_grad():
                torch._foreach_add_(params, torch._foreach_mul(vector, (rho_prime / norm).item()))
            at_probe = interrupts.let_through(lambda: _gradient(loss_fn, params))
        except BaseException:
            if random:
                random.abort()
            raise
        finally:
            with torch.no_grad():
                torch._foreach_copy_(params, backup)
        if random:
            random.finish()
    difference = torch._foreach_sub(at_probe, at_theta)
    return list(torch._foreach_mul(difference, (norm / rho_prime).item()))


def _gradient(loss_fn: Callable[[], Tensor], params: list[Tensor]) -> list[Tensor]:
    torch.clear_autocast_cache()
    with torch.enable_grad():
        loss = loss_fn()
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise RuntimeError(f"loss_fn must return a 0-d tensor that can be differentiated, but returned {loss!r}")
        found = torch.autograd.grad(loss, params, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, params, strict=True)]
