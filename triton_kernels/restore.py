"""Kernel `restore_`: theta <- backup, bit for bit."""

from __future__ import annotations

import triton
import triton.language as tl
from gam_fused.triton_kernels.walk import RUNTIME, address, block_at, chunk_of, is_whole, load, span_at, store


@triton.jit
def restore_block(theta_at, backup_at, block, WHOLE: tl.constexpr, DTYPE: tl.constexpr):
    store(theta_at, block, load(backup_at, block, WHOLE, DTYPE), WHOLE, DTYPE)


@triton.jit
def restore_span(theta_at, backup_at, span, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    for offset in range(0, span.high, BLOCK):
        if is_whole(span, offset, theta_at | backup_at, BLOCK):
            restore_block(theta_at, backup_at, block_at(span, offset, BLOCK), True, DTYPE)
        else:
            restore_block(theta_at, backup_at, block_at(span, offset, BLOCK), False, DTYPE)


@triton.jit(do_not_specialize=RUNTIME)
def restore_kernel(
    layout, tensors, chunk, theta, backup,
    DTYPE: tl.constexpr, C: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    _, tensor, position, end = chunk_of(layout, tensors, chunk)
    while position < end:
        span = span_at(layout, tensor, position, end, VECTOR)
        restore_span(address(theta, tensor, span, DTYPE), address(backup, tensor, span, DTYPE), span, DTYPE, BLOCK)
        position = span.end
        tensor += 1
