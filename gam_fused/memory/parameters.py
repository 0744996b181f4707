"""Checks of parameters, and how errors name them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from gam_fused.backends.tensor_lists import is_dense
from gam_fused.checks import Groups, describe, number
from gam_fused.parallel.dtensor import is_dtensor, local


def check_parameters(groups: Groups) -> None:
    """Raises for parameters that no backend can perturb and restore. Of a DTensor, the local shard is looked at.

    Frozen ones may be of any kind, such as quantized weights: they are looked at when they are unfrozen.

    Raises:
        TypeError: not floating point, complex, sparse, or a DTensor with pending sums.
        ValueError: not initialised yet (a lazy module's), listed twice, expanded, or sharing memory with another parameter.
    """
    seen: set[int] = set()
    extents = []
    for group in groups:
        for p in group["params"]:
            if id(p) in seen:
                raise ValueError(f"{describe(p, groups)} is listed twice; list each parameter once")
            seen.add(id(p))
            if p.requires_grad:
                _check_kind(p, groups)
            elif not can_be_trained(p):
                continue
            t = local(p)
            if t.numel() and t.device.type != "meta" and is_dense(t):
                start = t.data_ptr()
                extents.append((str(t.device), start, start + t.numel() * t.element_size(), p))
    extents.sort(key=lambda e: e[:3])
    for (device, _, end, p), (next_device, start, _, q) in itertools.pairwise(extents):
        if device == next_device and start < end:
            raise ValueError(
                f"{describe(q, groups)} shares memory with {describe(p, groups)}: it would be perturbed twice. "
                "Tie modules by giving them one Parameter object"
            )


def can_be_trained(p: Tensor) -> bool:
    """Whether it is of a kind that backends can perturb and restore."""
    try:
        _check_kind(p, ())
    except (TypeError, ValueError, RuntimeError):  # the last from nested tensors, which have no strides
        return False
    return True


def _overlaps_itself(p: Tensor) -> bool:
    """Whether strides may lead two indices to one element: a dimension must step over all that the smaller ones span."""
    span = 0
    for stride, size in sorted((stride, size) for stride, size in zip(p.stride(), p.shape, strict=True) if size != 1):
        if stride <= span:
            return p.numel() > 0
        span += stride * (size - 1)
    return False


def _check_kind(p: Tensor, groups: Groups) -> None:
    if is_lazy(p):
        raise ValueError(
            f"{describe(p, groups)} is a lazy module's, which the first forward makes: call the model once, on a mini-batch "
            "or a dummy of its shape, before making the optimizer"
        )
    if p.layout is not torch.strided:
        raise TypeError(f"{describe(p, groups)} is sparse ({p.layout}); only dense parameters can be perturbed")
    if p.is_complex():
        raise TypeError(f"{describe(p, groups)} is complex; optimize torch.view_as_real(p) instead")
    if p.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise TypeError(f"{describe(p, groups)} is not of dtype float32, float64, bfloat16 or float16")
    if is_dtensor(p):
        _check_placements(p, groups)
    elif p.numel() and p.device.type != "meta" and not _address(p):
        check_sharded([p], groups)
        raise TypeError(
            f"{describe(p, groups)} is a {type(p).__name__}, whose elements kernels cannot access. "
            "Optimize the tensors that it wraps"
        )
    if _overlaps_itself(local(p)):
        raise ValueError(f"{describe(p, groups)} is expanded or overlaps itself; use p.detach().clone()")


def check_sharded(params: Iterable[Tensor], groups: Groups) -> None:
    """Raises RuntimeError for a whole weight that FSDP had gathered for a pass, and has freed since."""
    for p in params:
        if type(p) is torch.nn.Parameter and p.numel() and not p.untyped_storage().nbytes():
            raise RuntimeError(
                f"{describe(p, groups)} has no memory any more, as whole weights that FSDP gathers and frees: the optimizer "
                "was made after a forward or unshard(). Call reshard() on the model before it is made"
            )


def _address(p: Tensor) -> int:
    """Address of the elements; 0 where there are none."""
    try:
        return p.data_ptr()
    except RuntimeError:
        return 0


def check_materialized(groups: Groups) -> None:
    """Raises RuntimeError for parameters that are to be trained and have no elements yet."""
    for group in groups:
        for p in group["params"]:
            if p.device.type == "meta" and p.requires_grad:
                raise RuntimeError(
                    f"{describe(p, groups)} is on the meta device and has no data: materialize the model "
                    "(model.to_empty(device=...), then initialize or load it) before the first step"
                )


def _check_placements(p: Any, groups: Groups) -> None:
    where = f"{describe(p, groups)}, distributed as {tuple(p.placements)} over {p.device_mesh},"
    if any(placement.is_partial() for placement in p.placements):
        raise TypeError(f"{where} holds partial sums; redistribute it to Shard or Replicate")
    if p.device_mesh.get_coordinate() is None:
        raise TypeError(f"{where} has no shard on this rank; pass each rank only parameters whose mesh contains it")


def check_groups(groups: Groups, rho_key: str = "rho") -> None:
    """Raises ValueError or TypeError for a `rho` or `perturb` entry out of range."""
    for i, group in enumerate(groups):
        number(f"{rho_key} of group {i}", group[rho_key], minimum=0.0)
        if not isinstance(group["perturb"], bool):
            raise TypeError(f"perturb of group {i} must be True or False, but is {group['perturb']!r}")
