"""The Triton backend: the kernels for GPUs without a compiler on the machine. `reference` specifies them.

Kernels are in `triton_kernels/`. They are compiled at first use, for each dtype and each combination of lists in use;
numbers that change from step to step are read from device memory, so that nothing is compiled again.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gam_fused.backends.tensor_lists import Layout, TensorList, is_capturing, upload

# Triton decides once, when kernels are defined, whether to compile or to interpret them.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "on", "true", "y", "yes")
DEVICES = ("cpu",) if INTERPRETED else ("cuda", "xpu")

_MINIMUM = (3, 6)
_MEND = "pip install 'gam_fused[triton]'"
_THREADS = 256
# Elements per thread and block, or one 16-byte access where that is more: enough loads in flight for kernels with few
# operands, few enough registers for those with many.
_ELEMENTS = {"squared_norm": 16, "direction_products": 4, "perturb": 4, "combined_update": 4, "combine": 4, "restore": 16}
# Most registers per thread, by bytes per element: 4, 3 and 2 programs on a multiprocessor of NVIDIA's. What spills are
# numbers that a tensor needs once (tests/test_triton_compiled.py has the budget).
_REGISTERS = {4: 64, 2: 80, 8: 128}
_KEPT_TABLES = 256


@cache
def reason() -> str:
    """ "" where Triton can be used, else why not and the mend."""
    try:
        import triton  # type: ignore[import]
    except ImportError as error:
        return f"Triton cannot be imported ({error}); {_MEND}"
    if tuple(int(part) for part in triton.__version__.split("+")[0].split(".")[:2]) < _MINIMUM:
        return f"Triton {triton.__version__} is older than {'.'.join(map(str, _MINIMUM))}; {_MEND}"
    if INTERPRETED or torch.cuda.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available()):
        return ""
    return (
        "Triton is installed, but torch sees no GPU to compile for. With TRITON_INTERPRET=1 in the environment it is "
        "interpreted on CPU tensors, for tests and far slower than the other backends"
    )


def squared_norm(layout: Layout, x: TensorList, y: TensorList, weight: TensorList, partials: Tensor) -> None:
    """See `reference.squared_norm`."""
    _launch("squared_norm", layout, partials.device, (x, y, weight), *_matrix("partials", partials)[:2])


def direction_products(
    layout: Layout, x1: TensorList, x3: TensorList, acc: TensorList, coefficients: Tensor, partials: Tensor
) -> None:
    """See `reference.direction_products`."""
    rest = (_dense("coefficients", coefficients), *_matrix("partials", partials)[:2])
    _launch("direction_products", layout, partials.device, (x1, x3, acc), *rest)


def perturb_(
    layout: Layout,
    theta: TensorList,
    base: TensorList,
    x: TensorList,
    y: TensorList,
    acc: TensorList,
    backup: TensorList,
    coefficients: Tensor,
    partials: Tensor,
    control: Tensor,
    realised: Tensor,
    ascent: int,
    adaptive: bool,
) -> None:
    """See `reference.perturb_`."""
    lists = (theta, base, x, y, acc, backup)
    rest = (*_tables(coefficients, partials, control), _dense("realised", realised), ascent)
    _launch("perturb", layout, control.device, lists, *rest, ADAPTIVE=bool(adaptive))
    theta.written()


def combined_update_(
    layout: Layout,
    theta: TensorList,
    backup: TensorList,
    x1: TensorList,
    x3: TensorList,
    acc: TensorList,
    first: TensorList,
    second: TensorList,
    third: TensorList,
    steps: TensorList,
    coefficients: Tensor,
    partials: Tensor,
    control: Tensor,
    direction: Tensor,
    algorithm: int,
) -> None:
    """See `reference.combined_update_`."""
    lists = (theta, backup, x1, x3, acc, first, second, third, steps)
    rest = (*_tables(coefficients, partials, control), _dense("direction", direction))
    constants = {"ALGORITHM": int(algorithm), "ROWS": len(partials)}
    _launch("combined_update", layout, control.device, lists, *rest, **constants)
    theta.written()


def combine_(
    layout: Layout,
    out: TensorList,
    x1: TensorList,
    x3: TensorList,
    acc: TensorList,
    coefficients: Tensor,
    partials: Tensor,
    control: Tensor,
    direction: Tensor,
) -> None:
    """See `reference.combine_`."""
    rest = (*_tables(coefficients, partials, control), _dense("direction", direction))
    _launch("combine", layout, control.device, (out, x1, x3, acc), *rest, ROWS=len(partials))


def restore_(layout: Layout, theta: TensorList, backup: TensorList) -> None:
    """See `reference.restore_`."""
    if len(theta):
        _launch("restore", layout, theta.tensors[0].device, (theta, backup))
        theta.written()


def copy_(layout: Layout, target: TensorList, source: TensorList) -> None:
    """target <- source, bit for bit, for memory that no graph of autograd has saved."""
    if len(target):
        _launch("restore", layout, target.tensors[0].device, (target, source))


def _tables(coefficients: Tensor, partials: Tensor, control: Tensor) -> tuple[Any, ...]:
    """What kernels that end a reduction read, as kernels take it."""
    return _dense("coefficients", coefficients), *_matrix("partials", partials), _dense("control", control)


def _matrix(name: str, sums: Tensor) -> tuple[Tensor, int, int]:
    """Partial sums as kernels take them: data, stride between rows, columns (of unit stride)."""
    (rows, columns), (stride, step) = sums.shape, sums.stride()
    if (columns > 1 and step != 1) or (rows > 1 and stride < columns):
        raise ValueError(
            f"{name} must have columns of unit stride and rows that do not overlap in memory, but has shape "
            f"{tuple(sums.shape)} and strides {sums.stride()}; pass .contiguous()"
        )
    return sums, stride, columns


def _dense(name: str, table: Tensor) -> Tensor:
    """`table`, through which kernels go without asking for strides."""
    if not table.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous, but has shape {tuple(table.shape)} and strides {table.stride()}; pass .contiguous()"
        )
    return table


@cache
def kernels() -> dict[str, Any]:
    """The kernels by kernel. They import Triton, which takes a while, so only when one is needed."""
    from gam_fused.triton_kernels import (  # type: ignore[import]
        combine,
        combined_update,
        direction_products,
        perturb,
        restore,
        squared_norm,
    )

    return {
        "squared_norm": squared_norm.squared_norm_kernel,
        "direction_products": direction_products.direction_products_kernel,
        "perturb": perturb.perturb_kernel,
        "combined_update": combined_update.combined_update_kernel,
        "combine": combine.combine_kernel,
        "restore": restore.restore_kernel,
    }


@cache
def constants(kernel: str, dtype: torch.dtype) -> dict[str, Any]:
    """What the kernel of `kernel` is compiled with for a dtype of storage.

    Raises:
        TypeError: a dtype that has no kernels.
    """
    import triton.language as tl  # type: ignore[import]

    types = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    if dtype not in types:
        raise TypeError(
            f"the Triton backend serves float32, float64, bfloat16 and float16, not {dtype}; use backend='torch'"
        )
    vector = 16 // dtype.itemsize
    compute = tl.float64 if dtype == torch.float64 else tl.float32
    block = _THREADS * max(vector, _ELEMENTS[kernel])
    return {"DTYPE": types[dtype], "C": compute, "VECTOR": vector, "BLOCK": block}


@cache
def options(kernel: str, dtype: torch.dtype, device_type: str) -> dict[str, int]:
    """How the kernel of `kernel` is compiled."""
    if device_type != "cuda" or torch.version.hip:
        return {"num_warps": _THREADS // (64 if torch.version.hip else 32)}
    registers = 80 if kernel == "squared_norm" and dtype == torch.float32 else _REGISTERS[dtype.itemsize]
    return {"num_warps": _THREADS // 32, "maxnreg": registers}


def _launch(
    kernel: str, layout: Layout, device: torch.device, lists: tuple[TensorList, ...], *rest: Any, **kind: Any
) -> None:
    """Launch `kernel` on `device`, a program per chunk. The first list of every kernel is in the dtype of storage.

    Args:
        rest: the kernel's arguments after the lists. kind: its constants that do not follow from the dtype.
    """
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break()  # addresses are no business of a traced graph
    like = next((t for lst in lists for t in lst.tensors if t is not None), None)
    dtype = torch.float32 if like is None else like.dtype
    compiled_in = constants(kernel, dtype)
    with _on(device):
        tables = [lst.on(device, _TABLES.send) if len(lst) else None for lst in lists]
        launch = kernels()[kernel][(layout.chunks,)]
        shape = (layout.on(device), len(layout.sizes), layout.chunk)
        launch(*shape, *tables, *rest, **kind, **compiled_in, **options(kernel, dtype, device.type))


def _on(device: torch.device) -> Any:
    """Triton launches on torch's current device."""
    if device.type == "cpu":
        return nullcontext()
    devices = torch.get_device_module(device)
    return nullcontext() if device.index == devices.current_device() else devices.device(device)


class _Tables:
    """Address tables on devices, found again by what is in them.

    Gradients are listed anew in every pass, but mostly lie where those of the last step lay: then nothing is sent. A table
    is never overwritten, so kernels that still run on it are safe; it belongs to the stream that it was sent on.
    """

    def __init__(self, size: int):
        self._size = size
        self._tables: OrderedDict[tuple, Tensor] = OrderedDict()

    def send(self, addresses: Tensor, device: torch.device) -> Tensor:
        """int64 addresses on `device`, without waiting for it."""
        if device.type == "cpu":
            return addresses
        if is_capturing(device):  # the copy is made when the graph runs, so the table is the graph's alone
            return upload(addresses, device)
        stream = torch.accelerator.current_stream(device)
        key = (stream.stream_id, device, *addresses.tolist())
        if key in self._tables:
            self._tables.move_to_end(key)
        else:
            self._tables[key] = upload(addresses, device)
            if len(self._tables) > self._size:
                self._tables.popitem(last=False)
        return self._tables[key]


_TABLES = _Tables(_KEPT_TABLES)
