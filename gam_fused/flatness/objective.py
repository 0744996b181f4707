"""A loss as the measures use it: its value, gradient and Hessian at the present weights, over one pass or mini-batches."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gam_fused.flatness.restoring import Kept, restored
from gam_fused.flatness.vectors import norm, wide
from gam_fused.memory.differentiated import check_differentiated
from gam_fused.memory.parameters import check_materialized, check_parameters
from gam_fused.parallel.dtensor import is_dtensor
from gam_fused.parallel.fsdp import refuse_fsdp1

Result = TypeVar("Result")
Vectors = Sequence[Sequence[Tensor]]
Products = Callable[[Vectors], list[list[Tensor]]]


class BatchedLoss(ABC):
    """A loss that is the mean over mini-batches, with the model that it belongs to; see `over_batches`.

    Attributes:
        model: whose parameters are measured unless others are given. generators: what its data are drawn with.
        group: over whose ranks it is the mean, too; None: of this process alone.
    """

    model: nn.Module
    generators: Sequence[Any]
    group: Any

    @abstractmethod
    def prepare(self) -> None:
        """Before the first pass: the model's mode."""

    @abstractmethod
    def terms(self) -> Iterator[tuple[int, Tensor]]:
        """The number of samples and the mean loss of each mini-batch, in one pass."""

    def __call__(self) -> Tensor:
        """The mean loss at the present weights: 0-d, float64, without a gradient."""
        return measured(self, None, lambda loss: torch.tensor(loss.value(), dtype=torch.float64, device="cpu"))


LossFunction = Callable[[], Tensor] | BatchedLoss
Parameters = Iterable[Tensor] | nn.Module | None


def measured(loss_fn: LossFunction, params: Parameters, body: Callable[[Objective], Result]) -> Result:
    """`body`'s result for the loss at these parameters; everything else is as before afterwards."""
    batched = loss_fn if isinstance(loss_fn, BatchedLoss) else None
    modules = [m for m in (batched and batched.model, params) if isinstance(m, nn.Module)]
    if params is None and batched is None:
        raise TypeError("params may be left out only if loss_fn comes from over_batches, which knows the model")
    weights = _checked(modules[-1] if params is None or isinstance(params, nn.Module) else params, modules)

    def inside(kept: Kept) -> Result:
        if batched:
            batched.prepare()
        return body(Objective(loss_fn, weights, kept))

    return restored(weights, modules, batched.generators if batched else (), inside)


class Objective:
    """The loss at the present weights. Results are of the whole loss, also where it is a mean over mini-batches.

    Attributes:
        params: the N elements that it is differentiated by. centre: copies of them, from before the measure.
    """

    def __init__(self, loss_fn: LossFunction, params: list[Tensor], kept: Kept):
        self.params, self.centre = params, kept.weights
        self._loss_fn, self._kept = loss_fn, kept
        self._batched = loss_fn if isinstance(loss_fn, BatchedLoss) else None
        self._group = self._batched.group if self._batched else None

    def value(self) -> float:
        """L, without a graph."""
        with torch.no_grad():
            return self._mean(lambda loss: [], vectors=0)[0]

    def gradient(self) -> tuple[float, list[Tensor]]:
        """L and its gradient."""
        return self._mean(lambda loss: gradient(loss, self.params), vectors=1)

    def norm_and_ascent(self) -> tuple[float, list[Tensor]]:
        """|grad L| and its own gradient, Hessian . g / |g| (equation 8); zeros where |g| is 0 or not finite."""
        grads, hessian = self._graph() if self._batched is None else (self.gradient()[1], self.hessian())
        size = norm(grads)
        if size == 0.0 or not math.isfinite(size):
            return size, [torch.zeros_like(p) for p in self.params]
        return size, hessian([[g.detach() / size for g in grads]])[0]

    def hessian(self) -> Products:
        """vectors -> Hessian . vector of each, at the present weights."""
        if self._batched is None:
            return self._graph()[1]

        def products(vectors: Vectors) -> list[list[Tensor]]:
            def of_batch(loss: Tensor) -> list[Tensor]:
                grads = gradient(loss, self.params, create_graph=True)
                return [h for v in vectors for h in derivative_along(grads, self.params, v)]

            flat, width = self._mean(of_batch, len(vectors))[1], len(self.params)
            return [flat[i : i + width] for i in range(0, len(flat), width)]

        return products

    def _graph(self) -> tuple[list[Tensor], Products]:
        """The gradient of a loss of one term, and products that all use its graph."""
        self._kept.start_pass()
        ((_, loss),) = self._terms()
        grads = gradient(loss, self.params, create_graph=True)
        return grads, lambda vectors: [derivative_along(grads, self.params, v) for v in vectors]

    def _mean(self, of_term: Callable[[Tensor], list[Tensor]], vectors: int) -> tuple[float, list[Tensor]]:
        """One pass: the mean loss, and the mean over terms of what `of_term` makes of each: `vectors` times N elements."""
        self._kept.start_pass()
        total, count = 0.0, 0
        # Laid out as the parameters are, and there without a term too: ranks add up memory, each as many tensors.
        sums = [torch.zeros_like(p, dtype=wide(p.dtype)) for _ in range(vectors) for p in self.params]
        for n, loss in self._terms():
            total, count = total + n * float(loss.detach()), count + n
            for s, t in zip(sums, of_term(loss), strict=True):
                s.add_(t.detach().to(s.dtype), alpha=n)
            del loss
        if self._group is not None:
            both = torch.tensor([total, count], dtype=torch.float64, device=self.params[0].device)
            for t in (both, *sums):
                dist.all_reduce(t, group=self._group)
            total, count = both.tolist()
        if not count:
            raise ValueError("the loader has no samples: it yields no mini-batch, or empty ones")
        return total / count, [s.div_(count) for s in sums]

    def _terms(self) -> Iterator[tuple[int, Tensor]]:
        for n, loss in self._batched.terms() if self._batched else [(1, self._loss_fn())]:
            _check_loss(loss)
            if self._kept.has_gradients():
                raise RuntimeError("loss_fn called backward: it must only return the loss")
            yield n, loss


def gradient(loss: Tensor, params: Sequence[Tensor], create_graph: bool = False) -> list[Tensor]:
    """The gradient of `loss`; zeros for parameters that it does not depend on. `p.grad` and its hooks are not involved."""
    if not loss.requires_grad:
        return [torch.zeros_like(p) for p in params]
    grads = torch.autograd.grad(loss, params, create_graph=create_graph, allow_unused=True)
    check_differentiated(loss, grads, again=create_graph)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)]


def derivative_along(grads: Sequence[Tensor], params: Sequence[Tensor], vector: Sequence[Tensor]) -> list[Tensor]:
    """Hessian . vector, by differentiating <grads, vector>; `grads` come from `gradient(..., create_graph=True)`."""
    pairs = [(g, v.to(g.device, g.dtype)) for g, v in zip(grads, vector, strict=True) if g.requires_grad]
    if not pairs:  # the loss is linear in these parameters
        return [torch.zeros_like(p) for p in params]
    outputs, weights = zip(*pairs, strict=True)
    products = torch.autograd.grad(outputs, params, grad_outputs=weights, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if h is None else h for p, h in zip(params, products, strict=True)]


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.is_floating_point():
        got = f"shape {tuple(loss.shape)}, dtype {loss.dtype}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn must return a 0-d floating-point tensor, got {got}")


def _checked(params: Iterable[Tensor] | nn.Module, modules: Sequence[nn.Module]) -> list[Tensor]:
    """Distinct leaves that require a gradient; errors name the one at fault."""
    if isinstance(params, nn.Module):
        params = [p for p in params.parameters() if p.requires_grad]
    result: list[Tensor] = []
    seen: set[int] = set()
    for p in params:
        if not isinstance(p, Tensor):
            raise TypeError(f"params must be tensors, got {type(p).__name__}")
        facts = f"shape {tuple(p.shape)}, {p.dtype}, is_leaf={p.is_leaf}, requires_grad={p.requires_grad}"
        if not p.is_floating_point() or not p.is_leaf or not p.requires_grad:
            raise ValueError(f"params must be real floating-point leaf tensors with requires_grad=True; got {facts}")
        if is_dtensor(p):
            raise TypeError(f"params must not be sharded: gather the DTensor first, p.full_tensor(); got {facts}")
        if id(p) not in seen:
            seen.add(id(p))
            result.append(p)
    if not result:
        raise ValueError("params is empty")
    groups = [{"params": result}]
    refuse_fsdp1(modules, groups)
    check_parameters(groups)
    check_materialized(groups)
    return result
