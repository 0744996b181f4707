"""What the operators refuse: operands that lie elsewhere than kernels look, on another device, or beyond what they count."""

from __future__ import annotations

import cuda_on_cpu
import pytest
import torch
from cases import Problem
from test_operators import OPS, arguments, record
from torch._subclasses import FakeTensorMode

from gam_fused.backends import cpp
from gam_fused.backends.operands import KERNELS
from gam_fused.backends.operators import schema

pytestmark = pytest.mark.skipif(bool(cpp.reason()), reason=cpp.reason() or "built")
META = torch.device("meta")


def samples(kernel: str) -> dict:
    """Arguments of the operator, with addresses of tensors that are gone, so nothing may follow them."""
    return arguments(kernel)


def strided(t: torch.Tensor) -> torch.Tensor:
    """Equal to `t`, with other elements between its own."""
    return torch.stack([t, torch.zeros_like(t)], -1)[..., 0]


# Rows that the samples use: one of no addresses has no strides.
ROWS = [(name, row) for name, kernel in KERNELS.items() for row in kernel.lists if samples(name)[row].numel()]
TABLES = [(table, name) for name in KERNELS for table in ("layout", "workspace")] + [
    (table, name) for name, kernel in KERNELS.items() for table in kernel.rest if schema(kernel)[table].startswith("Tensor")
]


@pytest.mark.parametrize(("kernel", "name"), ROWS)
def test_rows_of_addresses_with_gaps_are_refused(kernel, name):
    given = samples(kernel)
    with pytest.raises(RuntimeError, match=rf"{name} must be \d int64 addresses, contiguous.*strides \[2\]"):
        getattr(OPS, kernel)(**given | {name: strided(given[name])})


@pytest.mark.parametrize(("name", "kernel"), TABLES)
def test_tables_with_gaps_are_refused(name, kernel):
    given = samples(kernel)
    table = strided(given[name])
    given[name] = table if table.shape[-1] > 1 else table.expand(*table.shape[:-1], 2)
    with pytest.raises(RuntimeError, match=rf"{name} must .*strides"):
        getattr(OPS, kernel)(**given)


def test_rows_of_sums_that_share_memory_are_refused():
    given = samples("squared_norm")
    given["partials"] = given["partials"][:1].expand(2, -1)
    with pytest.raises(RuntimeError, match=r"partials must have rows that do not overlap.*strides \[0, 1\]"):
        OPS.squared_norm(**given)


def test_sums_fill_one_column():
    given = samples("squared_norm")
    given["partials"] = torch.zeros(2, 2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"partials must have one column, got shape \[2, 2\]"):
        OPS.squared_norm(**given)


def test_a_workspace_for_fewer_chunks_is_refused():
    given = samples("squared_norm")
    with pytest.raises(RuntimeError, match=r"workspace must be what Layout.workspace gives, \d+ numbers, got shape"):
        OPS.squared_norm(**given | {"workspace": given["workspace"][:-1]})


@pytest.mark.parametrize("g1", [True, False])
def test_products_have_as_many_rows_as_there_are(g1):
    p = Problem("0-dim", torch.float32, torch.float32)
    given = arguments("direction_products", record("direction_products", p))
    given |= {"partials": p.partials[:2]} if g1 else {"g1": given["g1"][:0]}
    with pytest.raises(RuntimeError, match=f"partials must have {6 if g1 else 2} rows, got {2 if g1 else 6}"):
        OPS.direction_products(**given)


@pytest.mark.parametrize(
    "change", [{"ascent": 3}, {"ascent": -1}, {"algorithm": 2}, {"algorithm": -1}, {"dtype": 4}], ids=str
)
def test_numbers_that_stand_for_nothing_are_refused(change):
    for kernel in KERNELS:
        if change.keys() <= samples(kernel).keys():
            with pytest.raises(RuntimeError, match=rf"{next(iter(change))}.* {next(iter(change.values()))}"):
                getattr(OPS, kernel)(**samples(kernel) | change)


def test_state_that_the_update_would_write_must_be_there():
    given = samples("combined_update_")
    for name in ("state1", "state2"):
        full = given | {"algorithm": 1, "state1": given["theta"], "state2": given["theta"], name: given["theta"][:0]}
        with pytest.raises(RuntimeError, match=rf"{name}\[1\] is missing"):
            OPS.combined_update_(**full)
    with pytest.raises(RuntimeError, match=r"steps\[1\] is missing"):
        OPS.combined_update_(**given | {"steps": given["steps"][:0]})


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_operand_on_meta_is_refused(kernel):
    """torch then takes the fake, which computes nothing."""
    given = samples(kernel)
    for name, value in given.items():
        if isinstance(value, torch.Tensor):
            with pytest.raises(RuntimeError, match=f"{name} is on meta, other operands are on cpu"):
                getattr(OPS, kernel)(**given | {name: value.to(META)})


def moved(given: dict, device: torch.device | str, *, but: tuple[str, ...] = ()) -> dict:
    """The arguments on another device, those named in `but` as they are."""
    there = {name: value for name, value in given.items() if isinstance(value, torch.Tensor) and name not in but}
    return given | {name: torch.empty(t.shape, dtype=t.dtype, device=device) for name, t in there.items()}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("but", [(), ("layout",), ("layout", "map")])
def test_all_on_meta_is_a_trace(kernel, but):
    getattr(OPS, kernel)(**moved(samples(kernel), META, but=but))


@pytest.mark.parametrize("kernel", KERNELS)
def test_traced_operands_of_two_devices_are_refused(kernel):
    """Only the layout, an empty map and rows of addresses may be on the CPU, and on no second GPU."""
    given = samples(kernel)
    with FakeTensorMode():
        layout, no_map = (torch.empty(3, 7, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
        right = moved(given, "cuda:0") | {"layout": layout, "map": no_map}
        operator, row = getattr(OPS, kernel), list(KERNELS[kernel].lists)[-1]
        operator(**right)
        operator(**right | {row: torch.empty(given[row].shape, dtype=torch.int64)})
        names = [row, *(n for n in KERNELS[kernel].rest if isinstance(given[n], torch.Tensor))]
        for name, device in [(n, "cuda:1") for n in names] + [(n, "cpu") for n in names[1:]]:
            wrong = torch.empty(given[name].shape, dtype=given[name].dtype, device=device)
            with pytest.raises(RuntimeError, match=rf"{name} is on {device}, other operands are on cuda:0"):
                operator(**right | {name: wrong})


LAYOUTS = {
    "elements near 2^63": ([[0, 2**63 - 1], [0, 0], [1, 0]], "elements, more than memory can hold"),
    "elements at 2^62": ([[0, 2**62], [0, 0], [1, 0]], "elements, more than memory can hold"),
    "a start near 2^63": ([[0, 2**63 - 1, 2**63 - 1], [0, 0, 0], [1, 1, 0]], "elements, more than memory can hold"),
    "a start at -2^63": ([[0, -(2**63), 8], [0, 0, 0], [1, 1, 0]], "end at -9223372036854775808, before its begin 0"),
    "many chunks": ([[0, 2**58], [0, 0], [1, 0]], "a chunk of 1024 elements makes 281474976710656 chunks"),
    "a group near 2^63": ([[0, 1], [2**63 - 1, 0], [1, 0]], "names group 9223372036854775807 for tensor 0"),
    "a group at 2^59": ([[0, 1], [2**59, 0], [1, 0]], "names group 576460752303423488 for tensor 0"),
}


def refuse(ops, kernel: str, layout: list, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        getattr(ops, kernel)(**samples(kernel) | {"layout": torch.tensor(layout)})


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_numbers_that_64_bits_do_not_hold(kernel, kind):
    refuse(OPS, kernel, *LAYOUTS[kind])


def test_a_large_chunk_beside_few_elements():
    p = Problem("0-dim", torch.float32, torch.float32, missing=False)
    operands = record("restore_", p)
    OPS.restore_(**arguments("restore_", operands) | {"chunk": 2**30})
    assert all(torch.equal(a, b) for a, b in zip(operands.theta.tensors, operands.backup.tensors, strict=True))


@pytest.mark.skipif(bool(cuda_on_cpu.reason()), reason=cuda_on_cpu.reason() or "can be built")
def test_checks_under_sanitizers():
    """The same refusals where every overflow of a signed number ends the process."""
    code = (
        "import cuda_on_cpu, torch, test_operands as t\n"
        "cuda_on_cpu.backend(sanitized=True)\n"
        "ops = getattr(torch.ops, cuda_on_cpu.NAMESPACE)\n"
        "for kernel in t.KERNELS:\n"
        "    for layout, message in t.LAYOUTS.values():\n"
        "        t.refuse(ops, kernel, layout, message)\n"
    )
    done = cuda_on_cpu.run_sanitized(code)
    assert done.returncode == 0, done.stderr[-3000:]
