"""Every formula once, for Triton kernels: the twin of csrc/math, with the same names in the same files."""
