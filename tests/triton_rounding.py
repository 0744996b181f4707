"""A kernel that rounds one block, for tests/test_triton_interpreter.py: kernels see only names of the module they are in."""

from __future__ import annotations

import triton
import triton.language as tl
from gam_fused.triton_kernels.perturb import to_storage
from gam_fused.triton_kernels.walk import Span, block_at


@triton.jit
def round_block(values, out, key, starts, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """out <- values, rounded as perturbed weights. starts: of the tensor in the flat vector, of the block in the tensor."""
    span = Span(tl.load(starts), tl.load(starts), tl.load(starts + 1), 0, BLOCK)
    index = tl.arange(0, BLOCK)
    rounded = to_storage(tl.load(values + index), span, block_at(span, 0, BLOCK), tl.load(key).to(tl.uint32), DTYPE)
    tl.store(out + index, rounded)
