"""Stochastic rounding of perturbed low-precision weights, from a counter-based hash; torch's generators are the user's.

An element rounds up with the probability of its distance to the lower neighbour, so that a perturbation below the spacing
of bf16 or fp16 survives on average. `csrc/math/rounding.h` and `triton_kernels/math/rounding.py`
compute the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gam_fused.constants import Control

_MASK = 0xFFFFFFFF


def mix32(x: Any) -> Any:
    """A 32-bit integer hash (two multiplies, three xor-shifts), on Python integers or int64 tensors below 2^32."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def key(seed: float, step: float, ascent: int) -> int:
    """The key of one ascent of one step; `seed` and `step` are whole numbers below 2^32, kept in float64."""
    mixed: int = mix32((int(seed) & _MASK) ^ mix32((int(step) * 4 + ascent) & _MASK))
    return mixed


def key_on_device(control: Tensor, ascent: int) -> Tensor:
    """`key` as a 0-d int64 tensor, from the control block, without asking the host."""
    seed, step = (control[slot].to(torch.int64) for slot in (Control.NOISE_SEED, Control.NOISE_STEP))
    mixed: Tensor = mix32((seed & _MASK) ^ mix32((step * 4 + ascent) & _MASK))
    return mixed


def noise(position: Tensor, key_: int | Tensor) -> Tensor:
    """int64 in [0, 2^32): the hash of each element's position in the flat vector."""
    mixed: Tensor = mix32((mix32((position >> 32) ^ key_) + position) & _MASK)
    return mixed


def stochastic_round(value: Tensor, dtype: torch.dtype, noise_: Tensor) -> Tensor:
    """`value` (float32) rounded to bfloat16 or float16, up or down as `noise_` says.

    To nearest beyond the largest number, where the upper neighbour is infinity; so infinities and NaN stay themselves.
    """
    if dtype == torch.bfloat16:
        rounded = _drop_bits(value, noise_, 16)
    else:
        quantum = 2.0**-24  # spacing of float16 below its smallest normal number, 2^-14
        subnormal = torch.floor(value / quantum + (noise_ >> 8).to(torch.float32) * quantum) * quantum
        rounded = torch.where(value.abs() < 2.0**-14, subnormal, _drop_bits(value, noise_, 13))
    return torch.where(value.abs() < torch.finfo(dtype).max, rounded, value).to(dtype)


def _drop_bits(value: Tensor, noise_: Tensor, bits: int) -> Tensor:
    low = (1 << bits) - 1
    raw = value.contiguous().view(torch.int32).to(torch.int64) & _MASK
    raw = (raw + (noise_ & low)) & _MASK & ~low
    return torch.where(raw >= 1 << 31, raw - (1 << 32), raw).to(torch.int32).view(torch.float32)


def store_(target: Tensor, value: Tensor, key_: int | Tensor, start: int) -> None:
    """target <- value: rounded to nearest in float32 and float64, stochastically in bfloat16 and float16.

    Args:
        value: same shape as `target`, any float dtype.
        start: position of the tensor's first element in the flat vector; elements count in storage order.
    """
    if target.dtype not in (torch.bfloat16, torch.float16):
        target.copy_(value)
        return
    order = sorted(range(target.dim()), key=lambda d: target.stride()[d], reverse=True)  # storage order of a dense tensor
    ordered, source = target.permute(order), value.to(torch.float32).permute(order)
    position = torch.arange(start, start + target.numel(), dtype=torch.int64, device=target.device)
    ordered.copy_(stochastic_round(source, target.dtype, noise(position, key_).view(source.shape)))
