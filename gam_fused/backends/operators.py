"""The kernels as torch operators: schemas and fakes, which follow from the records in `operands`.

An operator takes `layout`, which is `Layout.table`; `map`, what `Layout.on` gives for a GPU, or an empty tensor;
`workspace`, what `Layout.workspace` gives; the chunk's size and the code of the dtype of storage; for each list an
int64 tensor of addresses (`TensorList.addresses`, or for a GPU `TensorList.on`); then the rest of the record. Addresses
say nothing of what lies there: `checks.check_lists` has looked, and torch.compile, which could not follow them, is kept
out by `compiled`. Implementations register themselves for their device (`csrc/cpu/bindings.cpp`); `csrc/arguments.h`
checks what can be seen there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gam_fused.backends.operands import KERNELS, Kernel, Scalar

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def schema(kernel: Kernel) -> dict[str, str]:
    """The operator's parameters, name and type."""
    types = {"layout": "Tensor", "map": "Tensor", "workspace": "Tensor(z!)", "chunk": "int", "dtype": "int"}
    types |= dict.fromkeys(kernel.lists, "Tensor")
    letters = iter("abcdefgh")
    for name, kind in kernel.rest.items():
        types[name] = (
            kind.type.__name__ if isinstance(kind, Scalar) else f"Tensor({next(letters)}!)" if kind.written else "Tensor"
        )
    return types


def _fake(names: Sequence[str], rows: Collection[str]) -> Callable[..., None]:
    """The fake of an operator. No kernel returns anything or allocates, so there is nothing to do but to look at devices.

    torch takes it for traced operands, and for real ones too as soon as one of them is on the meta device: nothing would
    then be computed, and nobody told.

    Args:
        names: the operator's parameters. rows: those of them that are rows of addresses.
    """

    def fake(*args: Any, **kwargs: Any) -> None:
        _check_devices(dict(zip(names, args, strict=False)) | kwargs, rows)

    return fake


def _check_devices(arguments: dict[str, Any], rows: Collection[str]) -> None:
    """Raises RuntimeError for an operand that is on another device than the others; names it and both devices.

    The layout is on the CPU, where rows of addresses and an empty map may be as well.
    """
    named = dict(_tensors(arguments))
    devices = Counter(t.device for t in named.values())
    if len(devices) == 1:
        return
    # Sizes are asked only here, where devices differ: they may be symbols.
    on_cpu = {n for n, t in named.items() if t.device.type == "cpu" and (n == "layout" or n in rows or t.numel() == 0)}
    told = Counter(t.device for n, t in named.items() if n not in on_cpu) or devices
    expected = max(told, key=lambda device: (device.type != "meta", told[device]))
    if expected.type == "meta" and any(n in rows and named[n].numel() for n in on_cpu):
        expected = torch.device("cpu")  # addresses are never those of tensors on meta
    for name, t in named.items():
        if t.device != expected and name not in on_cpu:
            raise RuntimeError(f"gam_fused: {name} is on {t.device}, other operands are on {expected}; move it there")


def _tensors(arguments: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    return ((name, value) for name, value in arguments.items() if isinstance(value, Tensor))


_libraries: list[torch.library.Library] = []  # operators last as long as these


def define(namespace: str) -> None:
    """Define every kernel's operator in `namespace`; implementations register themselves there."""
    library: Any = torch.library.Library(namespace, "DEF")
    for name, kernel in KERNELS.items():
        types = schema(kernel)
        library.define(f"{name}({', '.join(f'{t} {n}' for n, t in types.items())}) -> ()")
        torch.library.register_fake(f"{namespace}::{name}", _fake(list(types), kernel.lists), lib=library)
    _libraries.append(library)


define("gam_fused")
