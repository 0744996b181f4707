"""The kernels as torch operators: their schemas and fakes. `backends/reference.py` specifies what they do.

Each kernel has two overloads with the same arguments. The default takes lists as `Tensor[]`, with mutation declared, for
torch.compile and direct callers; a tensor without elements stands for a missing one. `addresses` is the hot path: an int64
tensor of addresses (`TensorList.addresses`, or for a GPU `TensorList.on`) in place of each list, which the caller vouches
for. `layout` is `Layout.table`, `map` what `Layout.on` gives for a GPU; it may be empty.

Implementations register themselves for their device (`csrc/cpu/bindings.cpp`); `csrc/arguments.h` checks arguments.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

# Lists of each kernel (those it writes end in "!"), then its other arguments.
_KERNELS = {
    "squared_norm": ("x y weight", "Tensor(a!) partials"),
    "direction_products": ("x1 x3 acc", "Tensor coefficients, Tensor(a!) partials"),
    "perturb_": (
        "theta! base x y acc! backup!",
        "Tensor coefficients, Tensor partials, Tensor(a!) control, Tensor(b!) realised, int ascent, bool adaptive",
    ),
    "combined_update_": (
        "theta! backup x1 x3 acc first! second! third! steps!",
        "Tensor coefficients, Tensor partials, Tensor(a!) control, Tensor(b!) direction, int algorithm",
    ),
    "combine_": (
        "out! x1 x3 acc",
        "Tensor coefficients, Tensor partials, Tensor(a!) control, Tensor(b!) direction",
    ),
    "restore_": ("theta! backup", ""),
}


def _parameters(lists: str, rest: str, *, addresses: bool) -> list[str]:
    """The parameters of one overload, as in its schema."""
    parameters = ["Tensor layout", "Tensor map", "int chunk", "int dtype"]
    letters = iter("cdefghijklm")
    for name in lists.split():
        if addresses:
            parameters.append(f"Tensor {name.rstrip('!')}")
        else:
            alias = f"({next(letters)}!)" if name.endswith("!") else ""
            parameters.append(f"Tensor{alias}[] {name.rstrip('!')}")
    return parameters + (rest.split(", ") if rest else [])


def _fake(names: Sequence[str], rows: Sequence[str]) -> Callable[..., None]:
    """The fake of an operator. No kernel returns anything or allocates, so there is nothing to do but to look at devices.

    torch takes it for traced operands, and for real ones too as soon as one of them is on the meta device: nothing would
    then be computed, and nobody told.

    Args:
        names: the operator's parameters. rows: those of them that are rows of addresses.
    """

    def fake(*args: Any, **kwargs: Any) -> None:
        _check_devices(dict(zip(names, args, strict=False)) | kwargs, rows)

    return fake


def _check_devices(arguments: dict[str, Any], rows: Sequence[str]) -> None:
    """Raises RuntimeError for an operand that is on another device than the others; names it and both devices.

    The layout is on the CPU, where rows of addresses, missing tensors and an empty map may be as well.
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
    """Every tensor among them, those of lists as `x[0]`, `x[1]`, ..."""
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, (list, tuple)):
            yield from ((f"{name}[{i}]", t) for i, t in enumerate(value))


_libraries: list[torch.library.Library] = []  # operators last as long as these


def define(namespace: str) -> None:
    """Define every kernel's operators in `namespace`; implementations register themselves there."""
    library = torch.library.Library(namespace, "DEF")
    for kernel, (lists, rest) in _KERNELS.items():
        for addresses in (False, True):
            name, parameters = kernel + ".addresses" * addresses, _parameters(lists, rest, addresses=addresses)
            library.define(f"{name}({', '.join(parameters)}) -> ()")
            names = [parameter.split()[-1] for parameter in parameters]
            rows = lists.replace("!", "").split() if addresses else []
            torch.library.register_fake(f"{namespace}::{name}", _fake(names, rows), lib=library)
    _libraries.append(library)


define("gam_fused")
