"""`flatten=True`: parameters as views of one buffer per device and dtype; module code sees no difference."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gam_fused.backends.tensor_lists import ALIGNMENT, flat_views, is_dense
from gam_fused.checks import describe
from gam_fused.memory.parameters import can_be_trained
from gam_fused.parallel.dtensor import is_dtensor


def flatten(param_groups: list[dict[str, Any]], modules: list[nn.Module], made: list[Tensor]) -> list[Tensor]:
    """Move the parameters of each device and dtype into one contiguous buffer, each at a multiple of 128 bytes.

    Parameters that already lie so stay where they are; values, strides and Parameter objects stay the same.

    Args:
        made: what it returned before: parameters may move out of these buffers again, some having left (`.to()`).

    Returns:
        The buffers.

    Raises:
        ValueError: storage that is not ours to move: shared with something else or with another process, with gaps, a
            DTensor's, or known to an existing DDP.
    """
    if any(isinstance(m, DistributedDataParallel) for m in modules):
        raise ValueError(
            "flatten=True must come before DistributedDataParallel, which keeps references to the parameters' memory"
        )
    kinds: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
    for group in param_groups:
        for p in group["params"]:
            if p.requires_grad or (can_be_trained(p) and not p.is_inference()):
                kinds[p.device, p.dtype].append(p)
    for params in kinds.values():
        for p in params:
            if is_dtensor(p):
                raise ValueError(
                    f"flatten=True: {describe(p, param_groups)} is a DTensor, whose shards are in memory that FSDP or the "
                    "mesh manages; leave flatten=False"
                )
    pending = [params for params in kinds.values() if not is_flat(params)]
    ours = {buffer.untyped_storage().data_ptr() for buffer in made}
    for params in pending:
        _check_movable(params, param_groups, ours)
    buffers = list(made)
    for params in pending:
        with torch.inference_mode(False), torch.no_grad():  # a parameter in an inference tensor could not be trained
            buffer, views = flat_views(params)
            buffers.append(buffer)
            for p, view in zip(params, views, strict=True):
                view.copy_(p)
                p.data = view
    in_use = {p.untyped_storage().data_ptr() for params in kinds.values() for p in params}
    return [buffer for buffer in buffers if buffer.untyped_storage().data_ptr() in in_use]


def is_flat(params: list[Tensor]) -> bool:
    """Whether the tensors fill one buffer, one behind the other, as `flatten` leaves them; empty ones lie anywhere."""
    params = [p for p in params if p.numel()]
    if not params:
        return True
    start = expected = params[0].untyped_storage().data_ptr()
    for p in params:
        if p.data_ptr() != expected or p.untyped_storage().data_ptr() != start:
            return False
        expected += -(-p.numel() * p.element_size() // ALIGNMENT) * ALIGNMENT
    return params[0].untyped_storage().nbytes() == expected - start


def _check_movable(params: list[Tensor], param_groups: list[dict[str, Any]], ours: set[int]) -> None:
    storages: dict[int, list[Tensor]] = defaultdict(list)
    for p in params:
        if p.device.type == "cpu" and p.is_shared():
            raise ValueError(
                f"flatten=True: {describe(p, param_groups)} is in memory shared with other processes, which would no longer "
                "see its updates; call share_memory() after creating the optimizer, or leave flatten=False"
            )
        if p.numel():
            storages[p.untyped_storage().data_ptr()].append(p)
    for together in storages.values():
        together.sort(key=lambda p: p.data_ptr())
        # An earlier `flatten` of fewer parameters, or in another order.
        if together[0].untyped_storage().data_ptr() in ours or is_flat(together):
            continue
        for p in together:
            if not is_dense(p):
                raise ValueError(
                    f"flatten=True: {describe(p, param_groups)} has gaps between its elements; make it contiguous"
                )
            if p.untyped_storage().nbytes() != p.numel() * p.element_size():
                raise ValueError(
                    f"flatten=True: {describe(p, param_groups)} shares its storage with other tensors (tied, expanded, or a "
                    "view), which would not move with it"
                )
