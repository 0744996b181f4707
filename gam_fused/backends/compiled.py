"""The compiled backends, `cpp` for CPU and `cuda` for CUDA tensors: they hand their operands to `operators`.

Kernels are in `csrc/cpu` and `csrc/cuda`. An extension is no Python module: it is loaded once, when the backend is first
asked for, and registers its operators itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gam_fused.backends import stamp
from gam_fused.backends.checks import check_lists
from gam_fused.backends.operands import KERNELS, Kernel, LaunchingBackend, Restore
from gam_fused.backends.operators import DTYPES
from gam_fused.backends.tensor_lists import Layout
from gam_fused.torch_private import break_graph

_OPS = torch.ops.gam_fused
_CPU = torch.device("cpu")
_PACKAGE = Path(__file__).parents[1]
_INSTALL = "pip install --no-build-isolation ."
_NO_MAP = torch.empty(0, dtype=torch.int64, device="cpu")
_addresses_of = attrgetter("addresses")


class CompiledBackend(LaunchingBackend):
    """A backend whose kernels are operators of a shared object.

    Args:
        kind: "CPU" or "CUDA", for messages.
        library: stem of the shared object beside the package's modules, and of the file that says why it was not built.
        unusable: why this process cannot use it even if it is there, or "".
        ops: the namespace its operators are registered in.
    """

    def __init__(self, kind: str, library: str, unusable: Callable[[], str], ops: Any = _OPS):
        self.kind, self.library, self._unusable, self._ops = kind, library, unusable, ops
        self._reason: str | None = None
        self._operators: dict[str, Callable[..., None]] = {}
        super().__init__()

    def reason(self) -> str:
        """Load the extension if that has not happened yet. Returns "" when it is there, else why not and a remedy."""
        if self._reason is None:
            self._reason = self._unusable() or self._load()
        return self._reason

    def _load(self) -> str:
        found = sorted(_PACKAGE.glob(f"{self.library}.*so"))
        if not found:
            return f"the compiled {self.kind} extension was not built: {self._why_not_built()}"
        version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
        if version < (2, 10):
            return f"the compiled {self.kind} extension needs torch 2.10 or newer, this is {torch.__version__}"
        try:
            torch.ops.load_library(str(found[0]))
            built_from = stamp.stamp_of(found[0])
        except (ImportError, OSError, RuntimeError) as error:
            return f"the compiled {self.kind} extension {found[0].name} does not load: {error}; build it anew: {_INSTALL}"
        if stamp.is_of(built_from, self.library.lstrip("_")):
            return ""
        why = (
            f"the compiled {self.kind} extension {found[0].name} was built from other sources ({built_from}) than these "
            f"({stamp.stamp(self.library.lstrip('_'))}); build it anew: {_INSTALL}"
        )
        warnings.warn(f"gam_fused: {why}", stacklevel=2)  # "auto" goes on without it, more slowly
        return why

    def _why_not_built(self) -> str:
        """What setup.py has left."""
        try:
            return (_PACKAGE / f"{self.library}_not_built.txt").read_text().strip()
        except OSError:
            return f"these are bare sources; build them: {_INSTALL}"

    def launch(self, kernel: Kernel, operands: Any, *, saved: bool = True) -> None:
        """Call the kernel's operator."""
        if torch.compiler.is_compiling():
            break_graph()  # addresses are no business of a traced graph
        operator = self._operators.get(kernel.name) or self._find(kernel)
        operator(*self._arguments(kernel, operands))
        if saved and kernel.saved:
            kernel.tell_autograd(operands)

    def copier(self, operands: Restore) -> Callable[[], object]:
        """`copy_` of lists that last, to be called again and again."""
        if self.kind != "CPU":
            return super().copier(operands)  # tables of addresses may have to go along into a graph
        kernel = KERNELS["restore_"]
        return partial(self._find(kernel), *self._arguments(kernel, operands))

    def _arguments(self, kernel: Kernel, operands: Any) -> tuple[Any, ...]:
        """What the kernel's operator takes, once the lists have been checked."""
        layout, lists = operands.layout, kernel.lists_of(operands)
        leading = lists[0].tensors
        like = leading[0] if leading else None
        if like is None:
            like = next((t for lst in lists for t in lst.tensors if t is not None), None)
        dtype = torch.float32 if like is None else like.dtype
        code = DTYPES.get(dtype)
        if code is None:
            raise TypeError(
                f"the compiled {self.kind} backend serves float32, float64, bfloat16 and float16, not {dtype}"
                "; use backend='torch'"
            )
        check_lists(kernel, layout, lists, dtype)
        device = like.device if like is not None else _CPU
        if device.type == "cpu":
            rows = list(map(_addresses_of, lists))
        else:
            rows = [lst.on(device) if lst.lasting else lst.addresses for lst in lists]
        tables = layout.table, self.map_of(layout, device), layout.workspace(device)
        return (*tables, layout.chunk, code, *rows, *kernel.rest_of(operands))

    def _find(self, kernel: Kernel) -> Callable[..., None]:
        operator: Callable[..., None] = getattr(self._ops, kernel.name).default
        self._operators[kernel.name] = operator
        return operator

    def map_of(self, layout: Layout, device: torch.device) -> Tensor:
        """The layout's numbers on a GPU; kernels on the CPU read its table."""
        return _NO_MAP if device.type == "cpu" else layout.on(device)


def _no_cuda() -> str:
    """A torch without CUDA must never load the CUDA extension: its symbols are not there."""
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) has no CUDA; install a CUDA build of torch, then reinstall gam_fused"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return ""


cpp = CompiledBackend("CPU", "_cpu", lambda: "")
cuda = CompiledBackend("CUDA", "_cuda", _no_cuda)
