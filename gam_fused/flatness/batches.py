"""A loss that is the mean over the mini-batches of a data loader."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gam_fused.checks import whole
from gam_fused.flatness.loaders import check_all_ranks, generators_of, one_pass
from gam_fused.flatness.objective import BatchedLoss
from gam_fused.torch_private import tree_flatten, tree_unflatten
from gam_fused.transaction.batch_contents import BatchContents


def over_batches(
    model: nn.Module,
    criterion: Callable[..., Tensor] | None,
    loader: Iterable[Any],
    *,
    batch_loss: Callable[[nn.Module, Any], Tensor] | None = None,
    batches: int | None = None,
    training: bool = False,
    all_ranks: bool = False,
    generators: Sequence[Any] = (),
) -> BatchedLoss:
    """The mean loss over the samples of `loader`, for any measure: `hessian_trace(over_batches(model, criterion, loader))`.

    Losses, gradients and Hessian-vector products are accumulated over mini-batches, in float32 or wider, weighted by the
    number of samples, so that memory use is that of one mini-batch. Each pass iterates over the loader once, and all passes
    see the same data: RNG states are restored before each, so that a loader shuffles and augments in the same way, and so
    are buffers. After a measure everything is as before: weights, `p.grad`, `requires_grad`, buffers, each module's training
    mode, and the generators of torch (on the CPU and the model's devices), Python, numpy and the loader.

    Calling the result gives the mean loss at the current weights, a 0-d float64 tensor without a gradient.

    Args:
        model: of any dtype and device. DistributedDataParallel, DataParallel and torch.compile wrappers are removed: the
            module inside is measured.
        criterion: (model's output, target) -> the mean loss over the mini-batch, 0-d; mini-batches are then (input, target)
            or (inputs..., target). None: the model is called with a dict of its arguments and returns the loss itself, as
            Hugging Face models do: as `.loss`, `["loss"]` or the first of a tuple.
        loader: a DataLoader, or a list of mini-batches; every pass iterates over it once. Tensors in it are moved to the
            device of the model's first parameter.
        batch_loss: (model, mini-batch) -> its mean loss, instead of `criterion` (which is then None).
        batches: use only this many of the first mini-batches, in every pass.
        training: measure in training mode (batch norm with the mini-batch's statistics, the same dropout masks in every
            pass).
        all_ranks: take the mean over all ranks of a process group: the model's, if it is a DistributedDataParallel,
            otherwise the default one. Each rank passes its own part of the data, and all must call the same measures.
        generators: other generators that the loader or the model draws from, as for `FusedGAM`.

    Raises:
        TypeError: a loader that can be iterated over only once, or, with `all_ranks`, whose ranks communicate; both
            `criterion` and `batch_loss`, or neither although mini-batches do not name the model's arguments.
        RuntimeError: `all_ranks` without a process group.
    """
    if isinstance(loader, Iterator):  # iter(loader) would draw a random number from a DataLoader's generator
        raise TypeError(f"loader is a {type(loader).__name__}, which is used up after one pass: give a DataLoader or a list")
    if criterion is not None and batch_loss is not None:
        raise TypeError("give criterion, of (output, target), or batch_loss, of (model, batch), but not both")
    if batches is not None:
        whole("batches", batches, minimum=1)
    group = None
    if all_ranks:
        if not dist.is_initialized():
            raise RuntimeError("all_ranks=True needs a process group: torch.distributed.init_process_group")
        check_all_ranks(loader)
        group = model.process_group if isinstance(model, DistributedDataParallel) else dist.group.WORLD
    loss = batch_loss or (_by_name if criterion is None else _with_target(criterion))
    return _OverBatches(_bare(model), loss, loader, batches, training, group, [*generators_of(loader), *generators])


class _OverBatches(BatchedLoss):
    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[nn.Module, Any], Tensor],
        loader: Iterable[Any],
        batches: int | None,
        training: bool,
        group: Any,
        generators: Sequence[Any],
    ):
        self.model, self.group, self.generators = model, group, generators
        self._loss, self._loader, self._batches, self._training = loss, loader, batches, training

    def prepare(self) -> None:
        self.model.train(self._training)

    def terms(self) -> Iterator[tuple[int, Tensor]]:
        device = next(self.model.parameters()).device
        kept = isinstance(self._loader, (list, tuple))  # the next pass is given the very same
        for batch in one_pass(self._loader, self._batches):
            if not (n := _samples(batch)):
                continue
            contents = BatchContents(batch if kept else None)
            try:
                loss = self._loss(self.model, _on(device, batch))
            finally:
                contents.abort()
            contents.check_unwritten()
            yield n, loss


def _with_target(criterion: Callable[..., Tensor]) -> Callable[[nn.Module, Any], Tensor]:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        if not isinstance(batch, (tuple, list)) or len(batch) < 2:
            raise TypeError(
                f"criterion needs mini-batches (input, target), but the loader yields a {type(batch).__name__}: pass "
                "batch_loss=, a function of (model, batch), or criterion=None where the model returns the loss"
            )
        *inputs, target = batch
        return criterion(model(*inputs), target)

    return loss


def _by_name(model: nn.Module, batch: Any) -> Tensor:
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"without a criterion the model gets its arguments by name and returns the loss, but the loader yields a "
            f"{type(batch).__name__}: pass a criterion, of (output, target), or batch_loss=, of (model, batch)"
        )
    output = model(**batch)
    if isinstance(output, Tensor):
        return output
    found = getattr(output, "loss", None)
    if found is None:
        found = output["loss"] if isinstance(output, Mapping) else output[0]
    loss: Tensor = found
    return loss


def _samples(batch: Any) -> int:
    """The length of the first tensor that has one."""
    leaves = tree_flatten(dict(batch) if isinstance(batch, Mapping) else batch)[0]
    lengths = [t.size(0) for t in leaves if isinstance(t, Tensor) and t.dim()]
    if not lengths:
        raise TypeError(f"a mini-batch, a {type(batch).__name__}, has no tensor that tells how many samples it holds")
    return lengths[0]


def _on(device: torch.device, batch: Any) -> Any:
    leaves, spec = tree_flatten(batch)
    return tree_unflatten([leaf.to(device) if hasattr(leaf, "to") else leaf for leaf in leaves], spec)


def _bare(model: nn.Module) -> nn.Module:
    """Without wrappers whose forward cannot be differentiated twice or waits for other ranks."""
    while True:
        if isinstance(model, (DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model
