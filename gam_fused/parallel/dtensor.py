"""Parameters that are DTensors (FSDP2, HSDP, tensor parallelism): kernels work on each rank's local shard.

What is global about a step are sums over elements, and those are added over the ranks that hold the other shards
(`memory.reductions`); everything else in a step is element by element.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gam_fused.backends.tensor_lists import TensorList
from gam_fused.checks import Groups, describe
from gam_fused.torch_private import device_types


def is_dtensor(t: Any) -> bool:
    """Whether `t` is a torch.distributed.tensor.DTensor, without importing that."""
    return hasattr(t, "to_local")


def local(t: Any) -> Any:
    """The part of `t` on this rank, detached: the local shard of a DTensor, in its own memory; any other tensor itself."""
    if not is_dtensor(t):
        return t.detach()
    if torch.is_grad_enabled():
        with torch.no_grad():
            return local(t)
    shard = t.to_local()
    return (shard.wait() if hasattr(shard, "wait") else shard).detach()


def check_can_be_written(key: str, value: Any, p: Tensor, groups: Groups) -> None:
    """Raises ValueError where the entry `key` of the state of `p` is an inference tensor, which no update may write to."""
    if isinstance(value, Tensor) and local(value).is_inference():
        raise ValueError(
            f"the optimizer state {key!r} of {describe(p, groups)} was made in torch.inference_mode(), and cannot be "
            "written to outside of it: load the state dict outside of it, and replace tensors that were made there by "
            "t.clone()"
        )


def like(shard: Tensor, p: Any) -> Tensor:
    """`shard` as a DTensor distributed as `p` is, without a copy."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(shard, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def alike(a: Any, b: Any) -> bool:
    """Whether two DTensors are distributed in the same way."""
    same_mesh = a.device_mesh is b.device_mesh or a.device_mesh == b.device_mesh
    return bool(same_mesh and a.placements == b.placements)  # tuples


def adopt(value: Any, p: Any) -> Any:
    """The local shard of `value`, optimizer state of the DTensor `p` that may be distributed otherwise; None stays None.

    Raises:
        TypeError: a plain tensor; whether it is the whole or one rank's part cannot be seen.
    """
    if value is None:
        return None
    if not is_dtensor(value):
        raise TypeError(
            f"optimizer state of shape {tuple(value.shape)} for a DTensor parameter of shape {tuple(p.shape)} is a plain "
            "tensor: load checkpoints of sharded parameters with torch.distributed.checkpoint"
        )
    if not alike(value, p):
        value = value.redistribute(p.device_mesh, p.placements)
    return local(value)


def take(
    params: Sequence[Any], strides: Sequence[tuple[int, ...]], dtype: torch.dtype, groups: Groups, *, keep: bool
) -> TensorList:
    """`gradients.take` for DTensors: the local shard of each gradient, distributed as its parameter is.

    Shards of a reduce-scatter lie side by side in one buffer, so a gradient that is to be kept is copied.
    """
    taken: list[Tensor | None] = []
    for p, stride in zip(params, strides, strict=True):
        gradient, p.grad = p.grad, None
        if gradient is None:
            taken.append(None)
            continue
        if not is_dtensor(gradient) or gradient.layout is not torch.strided:
            raise RuntimeError(
                f"the gradient of {describe(p, groups)} is not a dense DTensor, but {type(gradient).__name__}"
            )
        if not alike(gradient, p):  # tensor parallelism leaves sums pending
            gradient = gradient.redistribute(p.device_mesh, p.placements)
        shard = local(gradient)
        if keep or shard.dtype is not dtype or shard.stride() != stride:
            shard = torch.empty_strided(shard.shape, stride, dtype=dtype, device=shard.device).copy_(shard)
        taken.append(shard)
    return TensorList(taken, empty=1)


def reduction_groups(p: Any) -> tuple[dist.ProcessGroup, ...]:
    """The process groups over which sums over the elements of `p` must be added: one per mesh dimension it is sharded on.

    Ranks that hold a replica are not among them, so each element counts once. () for a plain tensor.
    """
    if not is_dtensor(p):
        return ()
    mesh = p.device_mesh
    return tuple(mesh.get_group(dim) for dim in _sharded_dims(p) if mesh.size(dim) > 1)


def shard_index(p: Any) -> int:
    """The number of this rank's shard among those of `p`; the same on every rank that holds a replica of it."""
    if not is_dtensor(p):
        return 0
    index = 0
    for dim in _sharded_dims(p):
        index = index * p.device_mesh.size(dim) + p.device_mesh.get_local_rank(dim)
    return index


def _sharded_dims(p: Any) -> list[int]:
    """Mesh dimensions that split `p`. Not by `is_shard`, which denies the strided shards of FSDP over tensor parallelism."""
    return [dim for dim, placement in enumerate(p.placements) if not placement.is_replicate()]


def device_for(group: dist.ProcessGroup, home: torch.device) -> torch.device:
    """Where the group can communicate: `home` unless its backends do not serve it (CPU offload with NCCL alone)."""
    kinds = device_types(group)
    if home.type in kinds or not kinds:
        return home
    kind = sorted(kinds)[0]
    return torch.device(kind, torch.get_device_module(kind).current_device())
