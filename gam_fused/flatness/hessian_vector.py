"""Hessian-vector products from gradients alone (Appendix D)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from gam_fused.checks import number
from gam_fused.memory.differentiated import check_differentiated
from gam_fused.torch_private import forget_functions_of_weights
from gam_fused.transaction.interrupts import Interrupts
from gam_fused.transaction.randomness import Generators


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
    random numbers. Afterwards weights are as before, bit for bit, and RNG states as after one pass (after an exception: as
    before); `p.grad` of the parameters is not touched.

    Args:
        loss_fn: returns the 0-d loss at the current weights, without calling backward.
        params: tensors that require a gradient.
        vector: one tensor per parameter, of its shape.
        rho_prime: step length of the finite difference, in the units of the weights. If it is too short, rounding dominates;
            if it is too long, higher derivatives do.
        preserve_rng_state: replay random numbers, such as dropout masks, in the second pass.
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
    forget_functions_of_weights()
    with torch.enable_grad():
        loss = loss_fn()
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise RuntimeError(f"loss_fn must return a 0-d tensor that can be differentiated, but returned {loss!r}")
        found = torch.autograd.grad(loss, params, allow_unused=True)
        check_differentiated(loss, found)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, params, strict=True)]
