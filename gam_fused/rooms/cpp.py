"""The compiled CPU room. The verbs are specified in `reference`; here they are handed to the operators of `ops`.

Kernels are in `csrc/cpu`. The extension is no Python module: it is loaded once, when the room is first asked for, and
registers its operators itself.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gam_fused.ops import DTYPES
from gam_fused.tensor_lists import Layout, TensorList

_OPS = torch.ops.gam_fused
_MEND = "reinstall with a compiler: pip install --no-build-isolation ."


@cache
def reason() -> str:
    """Load the extension if that has not happened yet. Returns "" when it is there, else why not and the mend."""
    found = sorted(Path(__file__).parents[1].glob("_cpu*.so"))
    if not found:
        return f"the compiled CPU extension was not built; {_MEND}"
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < (2, 10):
        return f"the compiled CPU extension needs torch 2.10 or newer, this is {torch.__version__}"
    try:
        torch.ops.load_library(str(found[0]))
    except (ImportError, OSError, RuntimeError) as error:
        return f"the compiled CPU extension {found[0].name} does not load: {error}; {_MEND}"
    return ""


def squared_norm(layout: Layout, x: TensorList, y: TensorList, weight: TensorList, partials: Tensor) -> None:
    """See `reference.squared_norm`."""
    _run(_OPS.squared_norm, layout, (x, y, weight), partials)


def direction_products(
    layout: Layout, x1: TensorList, x3: TensorList, acc: TensorList, coefficients: Tensor, partials: Tensor
) -> None:
    """See `reference.direction_products`."""
    _run(_OPS.direction_products, layout, (x1, x3, acc), coefficients, partials)


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
    _run(_OPS.perturb_, layout, lists, coefficients, partials, control, realised, ascent, adaptive, mutates=theta)


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
    _run(_OPS.combined_update_, layout, lists, coefficients, partials, control, direction, algorithm, mutates=theta)


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
    _run(_OPS.combine_, layout, (out, x1, x3, acc), coefficients, partials, control, direction)


def restore_(layout: Layout, theta: TensorList, backup: TensorList) -> None:
    """See `reference.restore_`."""
    _run(_OPS.restore_, layout, (theta, backup), mutates=theta)


def _run(verb: Any, layout: Layout, lists: tuple[TensorList, ...], *rest: Any, mutates: TensorList | None = None) -> None:
    """Call the operator `verb`. `mutates`: tensors that a graph may have saved; autograd is told that they changed."""
    dtype = _dtype_code(lists)
    if torch.compiler.is_compiling():
        verb.default(layout.table, layout.chunk, dtype, *[lst.operands for lst in lists], *rest)
        return
    verb.addresses(layout.table, layout.chunk, dtype, *[lst.addresses for lst in lists], *rest)
    if mutates is not None:
        torch.autograd.graph.increment_version(mutates.tensors)


def _dtype_code(lists: tuple[TensorList, ...]) -> int:
    """The code of the first tensor's dtype; the first list of every verb is in the dtype of storage."""
    for lst in lists:
        for t in lst.tensors:
            if t is not None:
                if t.dtype not in DTYPES:
                    raise TypeError(
                        f"the compiled CPU room serves float32, float64, bfloat16 and float16, not {t.dtype} "
                        f"(a tensor of shape {tuple(t.shape)}); use backend='torch'"
                    )
                return DTYPES[t.dtype]
    return DTYPES[torch.float32]
