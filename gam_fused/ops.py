"""The verbs as torch operators: their schemas and fakes. `rooms/reference.py` specifies what they do.

Each verb has two overloads with the same arguments. The default takes lists as `Tensor[]`, with mutation declared, for
torch.compile and direct callers; a tensor without elements stands for a missing one. `addresses` is the hot path: an int64
tensor of addresses (`TensorList.addresses`, or for a GPU `TensorList.on`) in place of each list, which the caller vouches
for. `layout` is `Layout.table`, `map` what `Layout.on` gives for a GPU; it may be empty.

Implementations register themselves for their device (`csrc/cpu/bindings.cpp`); `csrc/arguments.h` checks arguments.
"""

from __future__ import annotations

import torch

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

# Lists of each verb (those it writes end in "!"), then its other arguments.
_VERBS = {
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


def _schema(verb: str, lists: str, rest: str, *, addresses: bool) -> str:
    """The schema of one overload, e.g. `restore_(Tensor layout, Tensor map, ..., Tensor(c!)[] theta, ...) -> ()`."""
    parameters = ["Tensor layout", "Tensor map", "int chunk", "int dtype"]
    letters = iter("cdefghijklm")
    for name in lists.split():
        if addresses:
            parameters.append(f"Tensor {name.rstrip('!')}")
        else:
            alias = f"({next(letters)}!)" if name.endswith("!") else ""
            parameters.append(f"Tensor{alias}[] {name.rstrip('!')}")
    parameters += [rest] if rest else []
    return f"{verb}{'.addresses' if addresses else ''}({', '.join(parameters)}) -> ()"


def _fake(*_: object) -> None:
    """No verb returns anything or allocates."""


_libraries: list[torch.library.Library] = []  # operators last as long as these


def define(namespace: str) -> None:
    """Define every verb's operators in `namespace`; implementations register themselves there."""
    library = torch.library.Library(namespace, "DEF")
    for verb, (lists, rest) in _VERBS.items():
        for addresses in (False, True):
            library.define(_schema(verb, lists, rest, addresses=addresses))
            torch.library.register_fake(f"{namespace}::{verb}{'.addresses' if addresses else ''}", _fake, lib=library)
    _libraries.append(library)


define("gam_fused")
