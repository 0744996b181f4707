"""What the operators refuse: operands that lie elsewhere than kernels look, on another device, or beyond what they count."""

from __future__ import annotations

import cuda_on_cpu
import pytest
import torch
from cases import Problem
from test_operators import FLOAT32, NO_MAP, OPS, problem, samples
from torch._subclasses import FakeTensorMode

from gam_fused.backends import cpp
from gam_fused.backends.operators import _KERNELS
from gam_fused.backends.tensor_lists import EMPTY, TensorList

pytestmark = pytest.mark.skipif(bool(cpp.reason()), reason=cpp.reason() or "built")
META = torch.device("meta")


def parameters(kernel: str) -> list[str]:
    lists, rest = _KERNELS[kernel]
    return [
        "layout",
        "map",
        "chunk",
        "dtype",
        *lists.replace("!", "").split(),
        *(p.split()[-1] for p in rest.split(", ") if p),
    ]


def address_samples() -> dict[str, tuple]:
    """Arguments of the overload `addresses` of every kernel; of tensors that are gone, so nothing may follow them."""
    return {
        kernel: tuple(TensorList(a).addresses if isinstance(a, list) else a for a in arguments)
        for kernel, arguments in samples().items()
    }


def strided(t: torch.Tensor) -> torch.Tensor:
    """Equal to `t`, with other elements between its own."""
    return torch.stack([t, torch.zeros_like(t)], -1)[..., 0]


# The lists that the samples use: a row of no addresses has no strides.
ROWS = [
    (kernel, name)
    for kernel, arguments in address_samples().items()
    for name in _KERNELS[kernel][0].replace("!", "").split()
    if arguments[parameters(kernel).index(name)].numel()
]
TABLES = [("layout", kernel) for kernel in _KERNELS] + [
    (name, kernel)
    for kernel in _KERNELS
    for name in ("coefficients", "partials", "control", "realised", "direction")
    if name in parameters(kernel)
]


@pytest.mark.parametrize(("kernel", "name"), ROWS)
def test_rows_of_addresses_with_gaps_are_refused(kernel, name):
    arguments = list(address_samples()[kernel])
    position = parameters(kernel).index(name)
    arguments[position] = strided(arguments[position])
    with pytest.raises(RuntimeError, match=rf"{name} must be \d int64 addresses, contiguous.*strides \[2\]"):
        getattr(OPS, kernel).addresses(*arguments)


@pytest.mark.parametrize(("name", "kernel"), TABLES)
def test_tables_with_gaps_are_refused(name, kernel):
    arguments = list(address_samples()[kernel])
    position = parameters(kernel).index(name)
    table = strided(arguments[position])
    arguments[position] = table if table.shape[-1] > 1 else table.expand(2, 2)
    with pytest.raises(RuntimeError, match=rf"{name} must .*strides"):
        getattr(OPS, kernel).addresses(*arguments)


def test_rows_of_sums_that_share_memory_are_refused():
    arguments = list(address_samples()["squared_norm"])
    arguments[-1] = arguments[-1][:1].expand(2, -1)
    with pytest.raises(RuntimeError, match=r"partials must have rows that do not overlap.*strides \[0, 1\]"):
        OPS.squared_norm.addresses(*arguments)


@pytest.mark.parametrize("kernel", _KERNELS)
@pytest.mark.parametrize("overload", ["default", "addresses"])
def test_one_operand_on_meta_is_refused(kernel, overload):
    """torch then takes the fake, which computes nothing."""
    whole = samples()[kernel] if overload == "default" else address_samples()[kernel]
    for position, name in enumerate(parameters(kernel)):
        value = whole[position] if position < len(whole) else None
        changed, named = None, name
        if isinstance(value, torch.Tensor):
            changed = value.to(META)
        elif isinstance(value, list) and value:
            changed, named = [*value[:-1], value[-1].to(META)], rf"{name}\[{len(value) - 1}\]"
        if changed is None:
            continue
        with pytest.raises(RuntimeError, match=f"{named} is on meta, other operands are on cpu"):
            getattr(getattr(OPS, kernel), overload)(*whole[:position], changed, *whole[position + 1 :])


def moved(arguments: tuple, device: torch.device | str, *, but: tuple[str, ...] = (), kernel: str) -> list:
    """The arguments on another device, those named in `but` as they are."""
    result = []
    for name, value in zip(parameters(kernel), arguments, strict=False):
        if name in but:
            result.append(value)
        elif isinstance(value, list):
            result.append([torch.empty(t.shape, dtype=t.dtype, device=device) for t in value])
        elif isinstance(value, torch.Tensor):
            result.append(torch.empty(value.shape, dtype=value.dtype, device=device))
        else:
            result.append(value)
    return result


@pytest.mark.parametrize("kernel", _KERNELS)
@pytest.mark.parametrize("overload", ["default", "addresses"])
@pytest.mark.parametrize("but", [(), ("layout",), ("layout", "map")])
def test_all_on_meta_is_a_trace(kernel, overload, but):
    whole = samples()[kernel] if overload == "default" else address_samples()[kernel]
    getattr(getattr(OPS, kernel), overload)(*moved(whole, META, but=but, kernel=kernel))


@pytest.mark.parametrize("kernel", _KERNELS)
def test_traced_operands_of_two_devices_are_refused(kernel):
    """Only the layout, an empty map, missing tensors and rows of addresses may be on the CPU, and on no second GPU."""
    rows = address_samples()[kernel]
    with FakeTensorMode():
        layout, no_map = (torch.empty(3, 7, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
        right = moved(samples()[kernel], "cuda:0", kernel=kernel)
        right[:2] = layout, no_map
        operator = getattr(OPS, kernel).default
        operator(*right)
        position = 4  # the first list
        for device in ("cpu", "cuda:1"):
            largest = max(range(len(right[position])), key=lambda i: right[position][i].numel())
            wrong = list(right[position])
            wrong[largest] = torch.empty_like(wrong[largest], device=device)
            with pytest.raises(RuntimeError, match=rf"\w+\[{largest}\] is on {device}, other operands are on cuda:0"):
                operator(*right[:position], wrong, *right[position + 1 :])
        rows = moved(rows, "cuda:0", kernel=kernel)
        rows[:2] = layout, no_map
        getattr(OPS, kernel).addresses(*rows)
        rows[4] = torch.empty(rows[4].shape, dtype=torch.int64)
        getattr(OPS, kernel).addresses(*rows)


LAYOUTS = {
    "elements near 2^63": ([[0, 2**63 - 1], [0, 0], [1, 0]], "elements, more than memory can hold"),
    "elements at 2^62": ([[0, 2**62], [0, 0], [1, 0]], "elements, more than memory can hold"),
    "a start near 2^63": ([[0, 2**63 - 1, 2**63 - 1], [0, 0, 0], [1, 1, 0]], "elements, more than memory can hold"),
    "a start at -2^63": ([[0, -(2**63), 8], [0, 0, 0], [1, 1, 0]], "end at -9223372036854775808, before its begin 0"),
    "many chunks": ([[0, 2**58], [0, 0], [1, 0]], "a chunk of 4096 elements makes 70368744177664 chunks"),
    "a group near 2^63": ([[0, 1], [2**63 - 1, 0], [1, 0]], "names group 9223372036854775807 for tensor 0"),
    "a group at 2^59": ([[0, 1], [2**59, 0], [1, 0]], "names group 576460752303423488 for tensor 0"),
}


def refuse(ops, kernel: str, layout: list, message: str) -> None:
    arguments = list(address_samples()[kernel])
    arguments[0] = torch.tensor(layout)
    with pytest.raises(RuntimeError, match=message):
        getattr(ops, kernel).addresses(*arguments)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("kernel", _KERNELS)
def test_numbers_that_64_bits_do_not_hold(kernel, kind):
    refuse(OPS, kernel, *LAYOUTS[kind])


def test_a_large_chunk_beside_few_elements():
    p = Problem("0-dim", torch.float32, torch.float32, missing=False)
    theta, backup = p.values(0), p.values(1)
    OPS.restore_.addresses(p.layout.table, NO_MAP, 2**30, FLOAT32, theta.addresses, backup.addresses)
    assert all(torch.equal(a, b) for a, b in zip(theta.tensors, backup.tensors, strict=True))


@pytest.mark.skipif(bool(cuda_on_cpu.reason()), reason=cuda_on_cpu.reason() or "can be built")
@pytest.mark.xdist_group("cuda on cpu")
def test_checks_under_sanitizers():
    """The same refusals where every overflow of a signed number ends the process."""
    code = (
        "import cuda_on_cpu, torch, test_operands as t\n"
        "cuda_on_cpu.backend(sanitized=True)\n"
        "ops = getattr(torch.ops, cuda_on_cpu.NAMESPACE)\n"
        "for kernel in t._KERNELS:\n"
        "    for layout, message in t.LAYOUTS.values():\n"
        "        t.refuse(ops, kernel, layout, message)\n"
    )
    done = cuda_on_cpu.run_sanitized(code)
    assert done.returncode == 0, done.stderr[-3000:]


def test_keywords_are_looked_at_too():
    p = problem(missing=False)
    with pytest.raises(RuntimeError, match=r"weight\[0\] is on meta, other operands are on cpu"):
        OPS.squared_norm.default(
            p.layout.table, NO_MAP, p.layout.chunk, FLOAT32, p.values(0).operands, EMPTY.operands,
            weight=[t.to(META) for t in p.values(0).operands], partials=p.partials[:2],
        )  # fmt: skip
