"""The compiled backends, `cpp` for CPU and `cuda` for CUDA tensors: they hand their operands to `operators`.

Kernels are in `csrc/cpu` and `csrc/cuda`. An extension is no Python module: it is loaded once, when the backend is first
asked for, and registers its operators itself.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gam_fused.backends.operators import DTYPES
from gam_fused.backends.tensor_lists import Layout, TensorList

_OPS = torch.ops.gam_fused
_NO_MAP = torch.empty(0, dtype=torch.int64, device="cpu")


class CompiledBackend:
    """A backend whose kernels are operators of a shared object.

    Args:
        kind: "CPU" or "CUDA", for messages.
        library: stem of the shared object beside the package's modules.
        mend: what to do when it is not there.
        unusable: why this process cannot use it even if it is there, or "".
        ops: the namespace its operators are registered in.
    """

    def __init__(self, kind: str, library: str, mend: str, unusable: Callable[[], str], ops: Any = _OPS):
        self.kind, self.library, self.mend, self._unusable, self._ops = kind, library, mend, unusable, ops
        self._reason: str | None = None

    def reason(self) -> str:
        """Load the extension if that has not happened yet. Returns "" when it is there, else why not and the mend."""
        if self._reason is None:
            self._reason = self._unusable() or self._load()
        return self._reason

    def _load(self) -> str:
        found = sorted(Path(__file__).parents[1].glob(f"{self.library}*.so"))
        if not found:
            return f"the compiled {self.kind} extension was not built; {self.mend}"
        version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
        if version < (2, 10):
            return f"the compiled {self.kind} extension needs torch 2.10 or newer, this is {torch.__version__}"
        try:
            torch.ops.load_library(str(found[0]))
        except (ImportError, OSError, RuntimeError) as error:
            return f"the compiled {self.kind} extension {found[0].name} does not load: {error}; {self.mend}"
        return ""

    def squared_norm(self, layout: Layout, x: TensorList, y: TensorList, weight: TensorList, partials: Tensor) -> None:
        """See `reference.squared_norm`."""
        self._run("squared_norm", layout, (x, y, weight), partials)

    def direction_products(
        self, layout: Layout, x1: TensorList, x3: TensorList, acc: TensorList, coefficients: Tensor, partials: Tensor
    ) -> None:
        """See `reference.direction_products`."""
        self._run("direction_products", layout, (x1, x3, acc), coefficients, partials)

    def perturb_(
        self,
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
        self._run("perturb_", layout, lists, coefficients, partials, control, realised, ascent, adaptive, mutates=theta)

    def combined_update_(
        self,
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
        self._run("combined_update_", layout, lists, coefficients, partials, control, direction, algorithm, mutates=theta)

    def combine_(
        self,
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
        self._run("combine_", layout, (out, x1, x3, acc), coefficients, partials, control, direction)

    def restore_(self, layout: Layout, theta: TensorList, backup: TensorList) -> None:
        """See `reference.restore_`."""
        self._run("restore_", layout, (theta, backup), mutates=theta)

    def copy_(self, layout: Layout, target: TensorList, source: TensorList) -> None:
        """target <- source, bit for bit, for memory that no graph of autograd has saved."""
        self._run("restore_", layout, (target, source))

    def _run(
        self, kernel: str, layout: Layout, lists: tuple[TensorList, ...], *rest: Any, mutates: TensorList | None = None
    ) -> None:
        """Call the operator `kernel`. `mutates`: tensors that a graph may have saved; autograd is told that they changed."""
        leading = lists[0].tensors
        like = leading[0] if leading else None
        if like is None:
            like = next((t for lst in lists for t in lst.tensors if t is not None), None)
        operator, dtype = getattr(self._ops, kernel), self._dtype_code(like)
        if torch.compiler.is_compiling():
            operator.default(layout.table, _NO_MAP, layout.chunk, dtype, *[lst.operands for lst in lists], *rest)
            return
        device = like.device if like is not None else torch.device("cpu")
        if device.type == "cpu":
            rows = [lst.addresses for lst in lists]
        else:
            rows = [lst.on(device) if lst.lasting else lst.addresses for lst in lists]
        operator.addresses(layout.table, self.map_of(layout, device), layout.chunk, dtype, *rows, *rest)
        if mutates is not None:
            mutates.written()

    def map_of(self, layout: Layout, device: torch.device) -> Tensor:
        """The layout's numbers on a GPU; kernels on the CPU read its table."""
        return _NO_MAP if device.type == "cpu" else layout.on(device)

    def _dtype_code(self, like: Tensor | None) -> int:
        """The code of the first tensor's dtype; the first list of every kernel is in the dtype of storage."""
        if like is None:
            return DTYPES[torch.float32]
        if like.dtype not in DTYPES:
            raise TypeError(
                f"the compiled {self.kind} backend serves float32, float64, bfloat16 and float16, not {like.dtype} "
                f"(a tensor of shape {tuple(like.shape)}); use backend='torch'"
            )
        return DTYPES[like.dtype]


def _no_cuda() -> str:
    """A torch without CUDA must never load the CUDA extension: its symbols are not there."""
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) has no CUDA; install a CUDA build of torch, then reinstall gam_fused"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return ""


_REINSTALL = "pip install --no-build-isolation ."
cpp = CompiledBackend("CPU", "_cpu", f"reinstall with a compiler: {_REINSTALL}", lambda: "")
cuda = CompiledBackend("CUDA", "_cuda", f"reinstall with a CUDA toolkit (nvcc 12 or newer): {_REINSTALL}", _no_cuda)
