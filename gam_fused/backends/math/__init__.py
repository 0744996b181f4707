"""The formulas of the Python backends: the twin of csrc/math and triton_kernels/math, with a file for each topic.

What decides (skip, projection, the ascents' lengths, the noise of rounding) stands here once, on tensors of the block's
device, for `reference` and `torch` alike. What is done to each element stands here twice, one below the other: as the
specification, of one tensor in float64, and of lists in `torch._foreach_*`, in place. All backends are compared with the
first.
"""
