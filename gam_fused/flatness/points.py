"""Shared by the measures: checked parameters, losses and gradients at a point, random directions, restored weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from gam_fused.transaction.interrupts import Interrupts

LossFunction = Callable[[], Tensor]


def checked_params(params: Iterable[Tensor]) -> list[Tensor]:
    """`params` as a list of distinct leaves that require a gradient; errors name the one at fault."""
    result: list[Tensor] = []
    for p in params:
        if not isinstance(p, Tensor):
            raise TypeError(f"params must be tensors, got {type(p).__name__}")
        if not p.is_floating_point() or not p.is_leaf or not p.requires_grad:
            raise ValueError(
                "params must be real floating-point leaf tensors with requires_grad=True; "
                f"got shape {tuple(p.shape)}, {p.dtype}, is_leaf={p.is_leaf}, requires_grad={p.requires_grad}"
            )
        if all(p is not q for q in result):
            result.append(p)
    if not result:
        raise ValueError("params is empty")
    return result


def check_positive(**values: float) -> None:
    """ValueError naming the first argument that is not finite and above zero."""
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be finite and > 0, got {value}")


def loss_at(loss_fn: LossFunction) -> Tensor:
    """The loss at the present weights, checked to be a 0-d real tensor."""
    loss = loss_fn()
    if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.is_floating_point():
        got = f"shape {tuple(loss.shape)}, dtype {loss.dtype}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn must return a 0-d floating-point tensor, got {got}")
    return loss


def gradient(loss: Tensor, params: Sequence[Tensor], create_graph: bool = False) -> list[Tensor]:
    """The gradient of `loss`; zeros for parameters that it does not depend on. `p.grad` and its hooks are not involved."""
    if not loss.requires_grad:
        return [torch.zeros_like(p) for p in params]
    grads = torch.autograd.grad(loss, params, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)]


def derivative_along(grads: Sequence[Tensor], params: Sequence[Tensor], vector: Sequence[Tensor]) -> list[Tensor]:
    """Hessian . vector, by differentiating <grads, vector>; `grads` come from `gradient(..., create_graph=True)`."""
    pairs = [(g, v) for g, v in zip(grads, vector, strict=True) if g.requires_grad]
    if not pairs:  # the loss is linear in these parameters
        return [torch.zeros_like(p) for p in params]
    outputs, weights = zip(*pairs, strict=True)
    products = torch.autograd.grad(outputs, params, grad_outputs=weights, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if h is None else h for p, h in zip(params, products, strict=True)]


def norm(tensors: Iterable[Tensor]) -> float:
    """L2 norm over all elements of all tensors, added up in float64."""
    return math.sqrt(sum(float(t.detach().double().square().sum()) for t in tensors))


def generator(seed: int) -> torch.Generator:
    """A separate CPU generator: results do not depend on the device, and the global random state is untouched."""
    return torch.Generator("cpu").manual_seed(seed)


def random_direction(params: Sequence[Tensor], random: torch.Generator) -> list[Tensor]:
    """Standard normal numbers shaped like `params`."""
    return [torch.randn(p.shape, generator=random, dtype=torch.float64, device="cpu").to(p.device, p.dtype) for p in params]


@contextmanager
def weights_restored(params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yields copies of the weights and writes them back at the end, also after an exception."""
    with Interrupts() as interrupts:
        saved = [p.detach().clone() for p in params]
        interrupts.open()
        try:
            yield saved
        finally:
            interrupts.close()
            with torch.no_grad():
                for p, s in zip(params, saved, strict=True):
                    p.copy_(s)


def move_to(params: Sequence[Tensor], base: Sequence[Tensor], *steps: tuple[float, Sequence[Tensor]]) -> None:
    """params <- base + sum of coefficient * direction over `steps`."""
    with torch.no_grad():
        for i, (p, b) in enumerate(zip(params, base, strict=True)):
            p.copy_(b)
            for coefficient, direction in steps:
                p.add_(direction[i], alpha=coefficient)
