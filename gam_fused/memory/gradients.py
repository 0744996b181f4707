"""Taking gradients: `p.grad` is taken without a copy where that is safe, and copied where it is not.

Streams: gradients are read on the stream that is current in `step`. `backward` makes the stream that it is called on wait
for all others it has used, so there is nothing to wait for here; a closure that calls it on a stream of its own has to let
the current one wait for that, as before the step of any optimizer. Nor is memory marked by `record_stream`, which would keep
it from being used again for a while in every pass. A gradient that lies in the memory of another stream goes back to that
stream when it is dropped, perhaps before our kernels have read it; but a pass that runs there reads weights which these
kernels write, so it must have waited for them first. What does not wait, such as fetching the next batch, needs a stream
that no backward runs on, as it does with torch's optimizers and `zero_grad`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from gam_fused.backends.tensor_lists import TensorList
from gam_fused.checks import Groups, describe
from gam_fused.memory.likeness import Remembered
from gam_fused.torch_private import is_view, runs_cuda_graphs, storage_address, storage_use_count


def clear(params: Sequence[Tensor]) -> None:
    """Drop every `p.grad`."""
    for p in params:
        p.grad = None


def take(params: Sequence[Tensor], strides: Strides, groups: Groups, *, keep: bool) -> TensorList:
    """The gradients of `params`, each `p.grad` left as `None`, in the strides and dtype of its parameter.

    The next backward then allocates afresh, and autograd hands its buffer over without adding to it.

    Args:
        strides: what each gradient's strides and number of elements, and the dtype of all, shall be.
        groups: the param groups, for errors.
        keep: whether the gradients will be written to, or read after the next pass. Then one that somebody else still
            holds, itself or its memory, is copied: the next pass would overwrite it, or it would change under its owner.
            So are all where torch.compile runs CUDA graphs, which take the memory back unseen.

    Raises:
        RuntimeError: a sparse or complex gradient, or one of a parameter that has been given other memory; names it.
    """
    gradients: list[Any] = [p.grad for p in params]
    clear(params)
    lent = keep and runs_cuda_graphs(strides.device)
    if not lent and strides.fit(gradients) and not (keep and _any_is_held(gradients)):
        return TensorList(gradients, complete=True)
    dtype = strides.dtype
    for i, (p, stride) in enumerate(zip(params, strides, strict=True)):
        gradient, gradients[i] = gradients[i], None
        if gradient is None:
            continue
        check_size(gradient, p, strides.sizes[i], strides.device, groups)
        try:
            fits = gradient.dtype is dtype and gradient.stride() == stride
        except RuntimeError:  # a sparse tensor has no strides
            fits = False
        if not fits or lent or (keep and (sys.getrefcount(gradient) > _OWN_REFERENCES or is_shared(gradient))):
            gradient = _own_copy(gradient, p, stride, dtype, groups)
        gradients[i] = gradient
    return TensorList(gradients)


class Strides(list[tuple[int, ...]]):
    """The strides that the gradients of some parameters shall have.

    Attributes:
        row_major: whether all are those of contiguous tensors, which is asked faster than equality.
        sizes, bytes: the number of elements, and of bytes, of each.
        dtype, device: of all.
        fit: whether gradients are all there, and as they shall be.
    """

    def __init__(self, tensors: Iterable[Tensor], dense: bool):
        tensors = list(tensors)
        self.sizes, self.bytes = [t.numel() for t in tensors], [t.nbytes for t in tensors]
        self.dtype, self.device = tensors[0].dtype, tensors[0].device
        super().__init__(t.stride() if dense else torch.empty(t.shape, device="meta").stride() for t in tensors)
        self.row_major = not dense or all(t.is_contiguous() for t in tensors)
        self.fit = Remembered(self._fit)

    def _fit(self, gradients: Sequence[Any]) -> bool:
        """By whole lists, each asked at once. One tells the device of all."""
        try:
            if list(map(_bytes_of, gradients)) != self.bytes or set(map(_dtype_of, gradients)) != {self.dtype}:
                return False
            if gradients[0].device != self.device:
                return False
            if self.row_major:
                return all(map(_is_contiguous, gradients))
            return list(map(_strides_of, gradients)) == self
        except (AttributeError, TypeError, RuntimeError):  # None; a sparse tensor
            return False


def _any_is_held(gradients: list[Any]) -> bool:
    """Whether other code may still hold one of them, or its memory."""
    if max(map(sys.getrefcount, gradients)) > _LISTED_REFERENCES:
        return True
    if storage_use_count is None or storage_address is None:
        return any(map(is_shared, gradients))
    return bool(max(map(storage_use_count, map(storage_address, gradients))) > 1)


def fit(gradient: Tensor, stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`gradient` in these strides and this dtype."""
    if gradient.stride() == stride and gradient.dtype is dtype:
        return gradient
    return torch.empty_strided(gradient.shape, stride, dtype=dtype, device=gradient.device).copy_(gradient)


def as_kept(gradient: Tensor, p: Tensor) -> Tensor:
    """`gradient` in the dtype that `p.grad` shall have (torch's `p.grad_dtype`): by default that of the parameter."""
    dtype = getattr(p, "grad_dtype", None)
    return gradient if dtype is None else gradient.to(dtype)


def check_size(gradient: Tensor, p: Tensor, size: int, device: torch.device, groups: Groups) -> None:
    """Raises RuntimeError for a gradient of other memory than the parameter had before the step."""
    if gradient.numel() != size or gradient.device != device:
        raise RuntimeError(
            f"the gradient of {describe(p, groups)} has {gradient.numel()} elements on {gradient.device}, but the parameter "
            f"had {size} on {device} before the step: the closure gave it other memory by assigning to .data. Do that "
            "before the step"
        )


def _own_copy(gradient: Tensor, p: Tensor, stride: tuple[int, ...], dtype: torch.dtype, groups: Groups) -> Tensor:
    if gradient.layout is not torch.strided or gradient.is_complex():
        kind = "complex" if gradient.layout is torch.strided else "sparse"
        hint = "" if kind == "complex" else " (for embeddings, use sparse=False)"
        raise RuntimeError(f"the gradient of {describe(p, groups)} is {kind}; only dense real gradients work{hint}")
    return torch.empty_strided(p.shape, stride, dtype=dtype, device=p.device).copy_(gradient)


def is_shared(t: Tensor) -> bool:
    """Whether any other tensor lies in the memory of `t`, as far as it tells: a sparse tensor does not."""
    if storage_use_count is None or storage_address is None:
        return is_view(t)
    try:
        return bool(storage_use_count(storage_address(t)) > 1)
    except RuntimeError:
        return False


def _own_references() -> int:
    """What `sys.getrefcount` says of an object that only a local variable holds, in this interpreter."""
    local = torch.empty(0, device="cpu")
    return sys.getrefcount(local)


_OWN_REFERENCES = _own_references()
_LISTED_REFERENCES = max(map(sys.getrefcount, [torch.empty(0, device="cpu")]))  # of one that only a list holds
_dtype_of, _bytes_of = attrgetter("dtype"), attrgetter("nbytes")
_strides_of, _is_contiguous = torch.Tensor.stride, torch.Tensor.is_contiguous
