"""The Triton kernels as they are compiled ahead of time for three generations of GPUs: registers, spills, 16-byte accesses.

No GPU is needed: `ptxas` and `cuobjdump` come with Triton.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from gam_fused.backends import triton as backend
from gam_fused.constants import Algorithm

triton = pytest.importorskip("triton", reason="Triton is not installed: pip install --no-deps triton==3.7.1")
pytestmark = pytest.mark.skipif(backend.INTERPRETED, reason="TRITON_INTERPRET is set: nothing is compiled")

SGD, ADAM = int(Algorithm.SGD), int(Algorithm.ADAM)
GENERATIONS = {80: "A100", 90: "H100, H200", 100: "B200"}
DTYPES = [torch.float32, torch.bfloat16, torch.float64]

# As the optimizer launches them: the kernel, the lists that are not used, its constants, 16-byte reads and writes of a block
# (folded counts twice in bfloat16: it is kept in float32).
KERNELS: dict[str, tuple[str, tuple[str, ...], dict[str, Any], str, str]] = {
    "norm": ("squared_norm", ("y", "weight"), {}, "x", ""),
    "norm of a difference": ("squared_norm", ("weight",), {}, "x y", ""),
    "products": ("direction_products", (), {}, "g1 last folded", ""),
    "first ascent": ("perturb_", ("base", "y", "folded"), {"ADAPTIVE": False}, "theta x", "theta backup"),
    "second ascent": ("perturb_", ("folded", "backup"), {"ADAPTIVE": False}, "base x y", "theta"),
    "third ascent": ("perturb_", ("base", "y", "backup"), {"ADAPTIVE": False}, "theta x folded", "theta folded"),
    "combine": ("combine_", (), {"ROWS": 6}, "g1 last folded", "out"),
    "restore": ("restore_", (), {}, "backup", "theta"),
    "sgd": (
        "combined_update_",
        ("g1", "state2", "state3"),
        {"ROWS": 2, "ALGORITHM": SGD},
        "backup last folded state1",
        "theta state1",
    ),
    "adam": (
        "combined_update_",
        ("g1", "state3"),
        {"ROWS": 2, "ALGORITHM": ADAM},
        "backup last folded state1 state2",
        "theta state1 state2",
    ),
}
# The budget. Registers as the backend allows them: 4, 3 and 2 programs of 256 threads on a multiprocessor (norms in float32
# keep more loads in flight instead), 2 of those that keep many numbers for each element. Bytes of stack per thread that may
# spill: numbers that a tensor needs once, read from the first-level cache.
REGISTERS = {torch.float32: 64, torch.bfloat16: 80, torch.float64: 128}
HEAVY = ("products", "third ascent", "sgd", "adam")
SPILLED = {torch.float32: 0, torch.bfloat16: 48, torch.float64: 144}


@cache
def compiled(name: str, dtype: torch.dtype, generation: int) -> Any:
    which, unused, constants, _, _ = KERNELS[name]
    kernel = backend.kernels()[which]
    constants = constants | backend.constants(which, dtype)
    numbers = ("tensors", "chunk", "stride", "columns", "ascent")
    sums = ("workspace", "coefficients", "partials", "control", "realised", "sums_of_d")
    signature, values = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants or argument in unused:
            signature[argument], values[i,] = "constexpr", constants.get(argument)
        else:
            signature[argument] = "i32" if argument in numbers else "*fp64" if argument in sums else "*i64"
    source = triton.compiler.ASTSource(kernel, signature, constexprs=values)
    target = triton.backends.compiler.GPUTarget("cuda", generation, 32)
    return triton.compile(source, target=target, options=backend.options(which, dtype, "cuda", constants.get("ALGORITHM")))


def resources(kernel: Any, folder: Path) -> tuple[int, int]:
    """Registers, and bytes of stack, of a thread."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    printed = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", printed)
    assert found, printed
    return int(found[1]), int(found[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_registers_and_spills(generation, dtype, tmp_path):
    names = KERNELS if generation == 90 else HEAVY
    used = {name: resources(compiled(name, dtype, generation), tmp_path) for name in names}
    for name, (registers, stack) in used.items():
        many = name == "adam" or (dtype == torch.bfloat16 and name in ("sgd", "products"))
        most = 128 if many else max(80, REGISTERS[dtype]) if name.startswith("norm") else REGISTERS[dtype]
        assert registers <= most, f"{name}: {registers} registers"
        assert stack <= max(SPILLED[dtype] if name in HEAVY else 0, 8), f"{name}: {stack} bytes of stack"


def bytes_by_kind(ptx: str) -> Counter:
    """Bytes per thread of every vector access in a kernel's text, by "ld" or "st"."""
    kinds: Counter = Counter()
    for kind, count, bits in re.findall(r"\b(ld|st)\.global(?:\.\w+)*\.v(\d)\.b(\d+)", ptx):
        kinds[kind] += int(count) * int(bits) // 8
        assert int(count) * int(bits) == 128, "a vector access of other than 16 bytes"
    return kinds


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_whole_blocks_are_read_and_written_16_bytes_at_a_time(name, dtype):
    kernel, _, _, reads, writes = KERNELS[name]
    per_thread = backend.constants(kernel, dtype)["BLOCK"] // 256
    wide = max(dtype.itemsize, 4)  # of folded

    def size(lists: str) -> int:
        return sum(per_thread * (wide if lst == "folded" else dtype.itemsize) for lst in lists.split())

    found = bytes_by_kind(compiled(name, dtype, 90).asm["ptx"])
    again = 2 if name == "sgd" or name == "adam" else 1  # a skipped step restores, in a loop of its own
    assert found["ld"] == size(reads) + (again - 1) * size("backup")
    assert found["st"] == size(writes) + (again - 1) * size("theta")


@pytest.mark.parametrize("generation", GENERATIONS)
def test_hardware_rounds_to_nearest_even(generation):
    """`numbers.narrow` leaves this to the conversion; in the interpreter, which cuts off, it rounds by itself."""
    conversions = set(re.findall(r"cvt\.\w+\.(?:bf16|f16)\w*\.f32", compiled("adam", torch.bfloat16, generation).asm["ptx"]))
    assert conversions
    assert all(conversion.startswith("cvt.rn.bf16") for conversion in conversions)


def test_sums_use_no_float_atomics():
    for name in KERNELS:
        atomics = re.findall(r"\b(?:atom|red)\.\S+", compiled(name, torch.float32, 90).asm["ptx"])
        allowed = [] if name == "restore" else ["atom.global.gpu.acq_rel.add.u32"] * 2  # tickets of groups, and of all
        assert atomics == allowed, name
