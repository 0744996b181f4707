"""The Triton backend: the kernels for GPUs without a compiler on the machine. `reference` specifies them.

Kernels are in `triton_kernels/`. They are compiled at first use, for each dtype and each combination of lists in use;
numbers that change from step to step are read from device memory, so that nothing is compiled again.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from contextlib import nullcontext
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from gam_fused.backends.checks import check_lists
from gam_fused.backends.operands import KERNELS, Kernel, LaunchingBackend, OfNumbers, OfSums
from gam_fused.backends.uploads import is_capturing, upload
from gam_fused.constants import Algorithm
from gam_fused.torch_private import break_graph

# Triton decides once, when kernels are defined, whether to compile or to interpret them.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "on", "true", "y", "yes")
DEVICES = ("cpu",) if INTERPRETED else ("cuda", "xpu")

_MINIMUM = (3, 6)
_REMEDY = "pip install 'gam_fused[triton]'"
_THREADS = 256
# Elements per thread and block, or one 16-byte access where that is more: enough loads in flight for kernels with few
# operands, few enough registers for those with many.
_ELEMENTS, _ELEMENTS_OF_FEW = 4, {"squared_norm": 16, "restore_": 16}
# Most registers per thread, by bytes per element: 4, 3 and 2 programs on a multiprocessor of NVIDIA's; 2 of those that
# keep many numbers for each element. What little spills are numbers that a tensor needs once (tests/test_triton_compiled.py
# has the budget).
_REGISTERS, _REGISTERS_OF_MANY = {4: 64, 2: 80, 8: 128}, 128
_MANY: set[tuple[str, int | None, int]] = {
    ("combined_update_", Algorithm.ADAM, 4),
    ("combined_update_", Algorithm.ADAM, 2),
    ("combined_update_", Algorithm.SGD, 2),
    ("direction_products", None, 2),
}
_KEPT_TABLES = 256


@cache
def reason() -> str:
    """ "" where Triton can be used, else why not and what to do about it."""
    try:
        import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
    except ImportError as error:
        return f"Triton cannot be imported ({error}); {_REMEDY}"
    if tuple(int(part) for part in triton.__version__.split("+")[0].split(".")[:2]) < _MINIMUM:
        return f"Triton {triton.__version__} is older than {'.'.join(map(str, _MINIMUM))}; {_REMEDY}"
    if INTERPRETED or torch.cuda.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available()):
        return ""
    return (
        "Triton is installed, but torch sees no GPU to compile for. With TRITON_INTERPRET=1 in the environment it is "
        "interpreted on CPU tensors, for tests and far slower than the other backends"
    )


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
    """The Triton kernels by name. They import Triton, which takes a while, so only when one is needed."""
    modules = {name: import_module(f"gam_fused.triton_kernels.{kernel.stem}") for name, kernel in KERNELS.items()}
    return {name: getattr(module, f"{KERNELS[name].stem}_kernel") for name, module in modules.items()}


@cache
def constants(kernel: str, dtype: torch.dtype) -> dict[str, Any]:
    """What `kernel` is compiled with for a dtype of storage.

    Raises:
        TypeError: a dtype that has no kernels.
    """
    import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]

    types = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    if dtype not in types:
        raise TypeError(
            f"the Triton backend serves float32, float64, bfloat16 and float16, not {dtype}; use backend='torch'"
        )
    vector = 16 // dtype.itemsize
    compute = tl.float64 if dtype == torch.float64 else tl.float32
    block = _THREADS * max(vector, _ELEMENTS_OF_FEW.get(kernel, _ELEMENTS))
    return {"DTYPE": types[dtype], "C": compute, "VECTOR": vector, "BLOCK": block}


@cache
def options(kernel: str, dtype: torch.dtype, device_type: str, algorithm: int | None = None) -> dict[str, int]:
    """How `kernel` is compiled. `algorithm`: of an update."""
    if device_type != "cuda" or torch.version.hip:
        return {"num_warps": _THREADS // (64 if torch.version.hip else 32)}
    registers = 80 if kernel == "squared_norm" and dtype == torch.float32 else _REGISTERS[dtype.itemsize]
    if (kernel, algorithm, dtype.itemsize) in _MANY:
        registers = _REGISTERS_OF_MANY
    return {"num_warps": _THREADS // 32, "maxnreg": registers}


class TritonBackend(LaunchingBackend):
    """The backend: a program per chunk.

    Attributes:
        prepared: compiled kernels, by everything they are compiled for. Triton finds them too, but looks at each argument of
            each launch for that, which takes the host longer than the launch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.prepared: dict[tuple[Any, ...], Any] = {}

    def reason(self) -> str:
        return reason()

    def launch(self, kernel: Kernel, operands: Any, *, saved: bool = True) -> None:
        """Launch `kernel`."""
        if torch.compiler.is_compiling():
            break_graph()  # addresses are no business of a traced graph
        layout, lists = operands.layout, kernel.lists_of(operands)
        tables, options_ = _arguments(kernel, operands)
        like = next((t for lst in lists for t in lst.tensors if t is not None), None)
        dtype = torch.float32 if like is None else like.dtype
        device = tables[0].device if tables else like.device if like is not None else torch.device("cpu")
        if not tables and like is None:
            return
        check_lists(kernel, layout, lists, dtype)
        shape = [layout.on(device), len(layout.sizes), layout.chunk]
        if kernel.sums:
            shape.append(layout.workspace(device))
        with _on(device):
            rows = [lst.on(device, _TABLES.send) if len(lst) else None for lst in lists]
            self._run(kernel.name, (layout.chunks, 1, 1), (*shape, *rows, *tables), options_, dtype, device)
        if saved and kernel.saved:
            kernel.tell_autograd(operands)

    def _run(
        self,
        name: str,
        grid: tuple[int, int, int],
        arguments: tuple[Any, ...],
        compiled_in: dict[str, Any],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        key = (name, dtype, device, *map(_is_none, arguments), *compiled_in.values())
        if key in self.prepared:
            prepared, constants_ = self.prepared[key]
            prepared[grid](*arguments, *constants_)
            return
        how = options(name, dtype, device.type, compiled_in.get("ALGORITHM"))
        kernel, values = kernels()[name], compiled_in | constants(name, dtype)
        compiled = kernel[grid](*arguments, **values, **how)
        if compiled is not None:  # as in the interpreter
            self.prepared[key] = compiled, tuple(values[n] for n in kernel.arg_names[len(arguments) :])


def _is_none(argument: Any) -> bool:
    return argument is None


def _arguments(kernel: Kernel, operands: Any) -> tuple[list[Any], dict[str, Any]]:
    """What the kernel takes after its lists: pointers and numbers, and what it is compiled for."""
    run_time: list[Any] = []
    compiled_in: dict[str, Any] = {}
    for (name, kind), value in zip(kernel.rest.items(), kernel.rest_of(operands), strict=True):
        if isinstance(kind, OfSums) and kind.rows != (1,):
            sums, stride, columns = _matrix(name, value)
            run_time += [sums, stride] if kind.written else [sums, stride, columns]
            if len(kind.rows) > 1 and not kind.written:
                compiled_in["ROWS"] = len(value)
        elif isinstance(kind, (OfNumbers, OfSums)):
            run_time.append(_dense(name, value))
        elif kind.compiled_in:
            compiled_in[name.upper()] = kind.type(value)
        else:
            run_time.append(value)
    return run_time, compiled_in


backend = TritonBackend()


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
        self._tables: OrderedDict[tuple[Any, ...], Tensor] = OrderedDict()

    def send(self, addresses: Tensor, device: torch.device) -> Tensor:
        """int64 addresses on `device`, without waiting for it."""
        if device.type == "cpu":
            return addresses
        if is_capturing(device):  # the table is the graph's alone
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
