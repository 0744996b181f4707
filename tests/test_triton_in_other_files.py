"""Tests of other files that run in every backend, here in the interpreted Triton one."""

from __future__ import annotations

import pytest
from interpreter import in_the_interpreter

from gam_fused.backends import triton

pytest.importorskip("triton", reason="Triton is not installed: pip install --no-deps triton==3.7.1")

# Whole steps: by the methods that between them use every operand of every kernel.
CHOSEN = "triton and (not forbidden_transition or finite_difference or accelerated)"


@pytest.mark.processes
@pytest.mark.skipif(triton.INTERPRETED, reason="is what the test starts")
def test_all_of_them():
    in_the_interpreter(
        CHOSEN,
        "tests/test_rounding.py",
        "tests/test_infinite_weights.py",
        "tests/test_kernels.py::TestNotFinite",
        "tests/test_kernels.py::test_zero_step_leaves_the_bits",
    )
