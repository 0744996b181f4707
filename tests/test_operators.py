"""The kernels as torch operators: schemas, fakes, version counters, what checks refuse, and the C++ twin of the records."""

from __future__ import annotations

import re
from dataclasses import fields
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BACKENDS, SHAPES, Problem, get_backend
from torch._subclasses import FakeTensorMode

from gam_fused.backends import checks, cpp
from gam_fused.backends.operands import KERNELS, OfTensors, Restore, Scalar, SquaredNorm
from gam_fused.backends.operators import DTYPES, schema
from gam_fused.backends.tensor_lists import EMPTY, Layout, TensorList
from gam_fused.constants import Algorithm

pytestmark = pytest.mark.skipif(bool(cpp.reason()), reason=cpp.reason() or "built")
OPS = torch.ops.gam_fused
NO_MAP = torch.empty(0, dtype=torch.int64)
CSRC = Path(__file__).parents[1] / "csrc"


def problem(dtype: torch.dtype = torch.float32, **options) -> Problem:
    return Problem("empty tensors", dtype, dtype, **options)


def record(name: str, p: Problem | None = None, **changes: Any) -> Any:
    """Operands of the kernel `name`. Run again, it gives the same: it begins at lists that it does not write to."""
    p = p or problem()
    x, y = (p.values(seed, gradient=True) for seed in range(2))
    g = p.values(2, gradient=True, compute=True)
    theta, base, backup = (p.values(seed) for seed in range(4, 7))
    tables = {"coefficients": p.coefficients, "partials": p.finished(9.0, 1.0), "control": p.control}
    operands: dict[str, Any] = {
        "squared_norm": {"x": x, "y": y, "weight": theta, "partials": p.partials[:2]},
        "direction_products": {"g1": x, "last": y, "folded": g, "partials": p.partials},
        "perturb_": {"theta": theta, "base": base, "x": x, "y": y, "backup": backup, **tables, "realised": p.sums},
        "combined_update_": {"theta": theta, "backup": base, "last": x, "folded": g, "state1": backup, **tables},
        "combine_": {"out": theta, "last": y, "folded": g, **tables, "direction": p.sums},
        "restore_": {"theta": theta, "backup": base},
    }[name]
    if name == "direction_products":
        operands |= {"coefficients": p.coefficients}
    if name == "perturb_":
        operands |= {"ascent": 1, "adaptive": True}
    if name == "combined_update_":
        operands |= {"steps": p.steps, "direction": p.sums, "algorithm": int(Algorithm.SGD)}
    return KERNELS[name].record(**({"layout": p.layout} | operands | changes))


def arguments(name: str, operands: Any = None) -> dict[str, Any]:
    """What the operator is called with. Its addresses are valid as long as the record is."""
    operands, kernel = operands or record(name), KERNELS[name]
    rows = {n: lst.addresses for n, lst in zip(kernel.lists, kernel.lists_of(operands), strict=True)}
    layout = operands.layout
    head = {"layout": layout.table, "map": NO_MAP, "workspace": layout.workspace(torch.device("cpu"))}
    storage = next(t.dtype for t in kernel.lists_of(operands)[0].tensors if t is not None)
    head |= {"chunk": layout.chunk, "dtype": DTYPES[storage]}
    return head | rows | dict(zip(kernel.rest, kernel.rest_of(operands), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_opcheck(name, dtype):
    operands = record(name, problem(dtype))
    torch.library.opcheck(getattr(OPS, name).default, tuple(arguments(name, operands).values()))


@pytest.mark.parametrize("name", KERNELS)
def test_traced_operands_of_cuda_need_no_gpu(name):
    """The fake is the same for every device: it gives nothing back, and looks at devices."""
    kernel, valid = KERNELS[name], arguments(name)
    on_cpu = {"layout", *kernel.lists}
    with FakeTensorMode():
        given = {
            n: torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device="cpu" if n in on_cpu else "cuda")
            if isinstance(v, torch.Tensor)
            else v
            for n, v in valid.items()
        }
        assert getattr(OPS, name)(**given) is None
        numbers = [n for n, kind in kernel.rest.items() if not isinstance(kind, Scalar)]
        for field in numbers:
            elsewhere = given | {field: torch.empty_like(given[field], device="cpu")}
            with pytest.raises(RuntimeError, match=f"gam_fused: {field} is on cpu, other operands are on cuda"):
                getattr(OPS, name)(**elsewhere)


@pytest.mark.parametrize("name", KERNELS)
def test_cpp_has_the_same_operands_in_the_same_order(name):
    """csrc/operands.h: kinds and names of the fields. A list that must be there has a kind of its own in C++."""
    source = re.sub(r"\\\n\s*", " ", (CSRC / "operands.h").read_text())
    struct, macro = re.search(rf'KERNEL\((\w+), \w+, "{name}", (\w+)\)', source).groups()
    found = re.findall(r"FIELD\((\w+), (\w+)\)", re.search(rf"#define {macro}\(FIELD\)(.*)", source)[1])
    kinds = {field.name: field.type for field in fields(KERNELS[name].record) if field.name != "layout"}
    wanted = [("Source" if (name, n) == ("restore_", "backup") else kind, n) for n, kind in kinds.items()]
    assert struct == KERNELS[name].record.__name__
    assert found == wanted
    assert list(schema(KERNELS[name]))[5:] == [n for _, n in found]


def test_cpp_and_triton_have_the_same_kernels():
    source = (CSRC / "operands.h").read_text()
    assert re.findall(r'KERNEL\(\w+, \w+, "(\w+)"', source) == list(KERNELS)
    for kernel in KERNELS.values():
        for path in (f"csrc/cpu/{kernel.stem}.h", f"csrc/cuda/{kernel.stem}.cuh", f"triton_kernels/{kernel.stem}.py"):
            assert (CSRC.parent / path).exists()


@pytest.mark.parametrize("backend_name", [*BACKENDS, "reference"])
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_write_to_nothing_but_what_the_record_says(backend_name, name):
    p = Problem("chunk edges", torch.float32, torch.float32)
    operands, kernel = record(name, p), KERNELS[name]
    held = {n: getattr(operands, n) for n in (*kernel.lists, *kernel.rest)}
    values = {n: v.tensors if isinstance(v, TensorList) else [v] for n, v in held.items()}
    tensors = {n: [t for t in v if isinstance(t, torch.Tensor)] for n, v in values.items()}
    before = {n: [t.clone() for t in v] for n, v in tensors.items()}
    getattr(get_backend(backend_name), name)(operands)
    written = {n for n, kind in (kernel.lists | kernel.rest).items() if getattr(kind, "written", False)}
    for n, copies in before.items():
        if n not in written:
            assert all(torch.equal(a, b) for a, b in zip(tensors[n], copies, strict=True)), n
    changed = {n for n in before if any(not torch.equal(a, b) for a, b in zip(tensors[n], before[n], strict=True))}
    assert changed


@pytest.mark.parametrize("name", [name for name, kernel in KERNELS.items() if kernel.saved])
def test_autograd_sees_that_weights_changed(name):
    weight = torch.randn(5, requires_grad=True)
    loss = (weight * weight).sum()
    p = Problem("0-dim", torch.float32, torch.float32)
    p.layout = Layout([5], [0], [True])
    lists = {n: TensorList([torch.randn(5)]) for n, kind in KERNELS[name].lists.items() if kind.dtype != "counter"}
    lists |= {"theta": TensorList([weight.detach()])}
    if name == "combined_update_":
        lists |= {"steps": TensorList([torch.tensor(0.0)]), "g1": EMPTY, "state2": EMPTY, "state3": EMPTY}
    p.sums = torch.zeros(1, dtype=torch.float64)
    getattr(cpp, name)(record(name, p, **lists))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def strided(t: torch.Tensor) -> torch.Tensor:
    return torch.stack([t, t], -1)[..., 0]


SPOILED = {
    "too few elements": (lambda t: t[:-1].clone(), r"\[1\] has shape \(2,\).*: 2 elements, the layout says 3"),
    "another dtype": (lambda t: t.double(), r"\[1\] has shape \(3,\), torch.float64.* the first tensor of the list is"),
    "gaps": (strided, r"\[1\] has shape \(3,\).*strides \(2,\): it has gaps or overlaps"),
}


@pytest.mark.parametrize("how", SPOILED)
@pytest.mark.parametrize(
    ("name", "field"),
    [(k, f) for k, kernel in KERNELS.items() for f, kind in kernel.lists.items() if kind.dtype != "counter"],
)
def test_a_tensor_that_does_not_fit_is_named(name, field, how):
    """In every list of every kernel, on the way that the optimizer takes."""
    p, (spoil, message) = problem(missing=False), SPOILED[how]
    operands = record(name, p)
    lst = p.values(0, compute=KERNELS[name].lists[field].dtype == "compute")
    lst.replace(1, spoil(lst.tensors[1]))
    setattr(operands, field, lst)
    with pytest.raises((ValueError, TypeError), match=field + message):
        getattr(cpp, name)(operands)


@pytest.mark.parametrize(
    ("name", "field", "kind"), [(k, f, kind) for k, kernel in KERNELS.items() for f, kind in kernel.lists.items()]
)
def test_a_list_that_does_not_fit_is_named(name, field, kind: OfTensors):
    p = problem(missing=False)
    like = getattr(record(name, p), field)
    like = p.values(0) if like is EMPTY else like
    count, kernel = len(p.layout.sizes), getattr(cpp, name)
    with pytest.raises(ValueError, match=f"{field} has {count - 1} tensors, the layout {count}"):
        kernel(record(name, p, **{field: TensorList(like.tensors[1:])}))
    if field != next(iter(KERNELS[name].lists)):  # the first tells the dtype of storage
        with pytest.raises(TypeError, match=rf"{field} has torch.float64, expected torch.float32"):
            kernel(record(name, p, **{field: TensorList([t.double() for t in like.tensors])}))
    gap = TensorList([None if i == 3 else t for i, t in enumerate(like.tensors)])
    if kind.complete:
        with pytest.raises(ValueError, match=rf"{field}\[3\] is missing, the layout gives it 4100 elements"):
            kernel(record(name, p, **{field: gap}))
    if kind.complete and field in KERNELS[name].required:
        with pytest.raises(ValueError, match=f"{field} must not be an empty list"):
            kernel(record(name, p, **{field: EMPTY}))


def test_the_same_list_is_looked_at_anew_for_another_dtype_and_layout():
    p = Problem("0-dim", torch.bfloat16, torch.bfloat16, missing=False)
    theta, x = p.values(0), p.values(1)
    tables = {"coefficients": p.coefficients, "partials": p.finished(9.0, 1.0), "control": p.control, "realised": p.sums}
    cpp.squared_norm(SquaredNorm(layout=p.layout, x=x, partials=p.partials[:2]))
    with pytest.raises(TypeError, match=r"folded has torch.bfloat16, expected torch.float32"):
        cpp.perturb_(KERNELS["perturb_"].record(layout=p.layout, theta=theta, x=x, folded=x, **tables, ascent=2))
    other = Layout([size + 1 for size in p.layout.sizes], p.layout.groups, p.layout.counted)
    with pytest.raises(ValueError, match=r"x\[0\] has shape \(\).*1 elements, the layout says 2"):
        cpp.squared_norm(SquaredNorm(layout=other, x=x, partials=p.partials[:2]))


@pytest.mark.parametrize("lasting", [True, False])
def test_without_always_a_list_is_looked_at_when_it_lasts_or_is_the_first(monkeypatch, lasting):
    monkeypatch.setattr(checks, "ALWAYS", False)
    looked: list[str] = []
    facts = checks._facts
    monkeypatch.setattr(checks, "_facts", lambda name, *rest: looked.append(name) or facts(name, *rest))
    p = problem(missing=False)
    for _ in range(3):
        x, y = (TensorList(p.values(i).tensors, lasting=lasting) for i in range(2))
        cpp.squared_norm(SquaredNorm(layout=p.layout, x=x, partials=p.partials[:2]))
        cpp.squared_norm(SquaredNorm(layout=p.layout, x=x, y=y, partials=p.partials[:2]))
    assert looked == (["x", "y"] * 3 if lasting else ["x", "y"])
    gaps = TensorList([strided(t) for t in p.values(0).tensors], lasting=lasting)
    if lasting:
        with pytest.raises(ValueError, match="gaps"):
            cpp.squared_norm(SquaredNorm(layout=p.layout, x=gaps, partials=p.partials[:2]))


def test_lists_in_different_memory_orders_are_refused():
    p = Problem("transposed", torch.float32, torch.float32, missing=False)
    weights, copies = p.values(0), TensorList([t.contiguous() for t in p.values(1).tensors])
    with pytest.raises(ValueError, match=r"backup\[0\].*another order"):
        cpp.restore_(Restore(layout=p.layout, theta=weights, backup=copies))
    x, partials = TensorList([None, p.values(1).tensors[1]]), p.partials[:2]
    for ordered in (weights, copies):
        some = TensorList([ordered.tensors[0], None])
        cpp.squared_norm(SquaredNorm(layout=p.layout, x=x, y=some, partials=partials))
    with pytest.raises(ValueError, match=r"weight\[0\].*another order"):
        cpp.squared_norm(SquaredNorm(layout=p.layout, x=x, y=TensorList([copies.tensors[0], None]), weight=weights,
                                     partials=partials))  # fmt: skip


@pytest.mark.parametrize("kind", SHAPES)
def test_what_fits_is_let_through(kind):
    p = Problem(kind, torch.float32, torch.float32)
    for name in KERNELS:
        getattr(cpp, name)(record(name, p))


@pytest.mark.parametrize(
    ("change", "chunk", "message"),
    [
        (lambda t: t, 2**30 + 1, "chunk must be 1 to 1073741824, got 1073741825"),
        (lambda t: t, 0, "chunk must be 1 to"),
        (lambda t: t + torch.tensor([[2**33], [0], [0]]), 4096, "begin at element 0, got 8589934592"),
        (lambda t: t * torch.tensor([[-1], [1], [1]]), 4096, "end at -"),
        (lambda t: t - torch.tensor([[0], [1], [0]]), 4096, "names group -1"),
        (lambda t: t * torch.tensor([[2**33], [1], [1]]), 1, "chunks"),
    ],
)
def test_layouts_that_kernels_cannot_follow_are_refused(change, chunk, message):
    p = Problem("0-dim", torch.float32, torch.float32, missing=False)
    given = arguments("restore_", record("restore_", p))
    with pytest.raises(RuntimeError, match=message):
        OPS.restore_(**given | {"layout": change(p.layout.table), "chunk": chunk})


def numbers_of(name: str) -> dict[str, bool]:
    """The operands in float64, and whether the kernel writes to them."""
    rest = {n: kind.written for n, kind in KERNELS[name].rest.items() if not isinstance(kind, Scalar)}
    return {"workspace": True} | rest


PAIRS = [(name, *pair) for name in KERNELS for pair in combinations(numbers_of(name), 2)]


@pytest.mark.parametrize("shift", ["the same begin", "the last number"])
@pytest.mark.parametrize(("name", "first", "second"), PAIRS)
def test_numbers_in_the_memory_of_others_are_refused_where_one_is_written(name, first, second, shift):
    given = arguments(name, operands := record(name))
    a, b = given[first].contiguous(), given[second].contiguous()
    begin = 0 if shift == "the same begin" else a.numel() - 1
    memory = torch.zeros(begin + max(a.numel(), b.numel()), dtype=torch.float64)
    shared = memory[: a.numel()].view(a.shape).copy_(a), memory[begin : begin + b.numel()].view(b.shape).copy_(b)
    apart = {n: t.clone() for n, t in zip((first, second), shared, strict=True)}
    run = getattr(OPS, name)
    if numbers_of(name)[first] or numbers_of(name)[second]:
        with pytest.raises(RuntimeError, match=f"{second} lies in the memory of {first}; kernels write there meanwhile"):
            run(**given | dict(zip((first, second), shared, strict=True)))
        run(**given | apart)
        return
    kernel, results = KERNELS[name], []
    written = [lst for n, lst in zip(kernel.lists, kernel.lists_of(operands), strict=True) if kernel.lists[n].written]
    before = [t.clone() for lst in written for t in lst.tensors if t is not None]
    for numbers in (apart, dict(zip((first, second), shared, strict=True))):
        tensors = [t for lst in written for t in lst.tensors if t is not None]
        for t, old in zip(tensors, before, strict=True):
            t.copy_(old)
        run(**given | numbers)
        results.append([t.clone() for t in tensors])
    assert all(map(torch.equal, *results))


def test_unsupported_dtype_is_named():
    p = problem(missing=False)
    integers = TensorList([t.to(torch.int32) for t in p.values(0).tensors])
    with pytest.raises(TypeError, match=r"not torch\.int32"):
        get_backend("cpp").squared_norm(SquaredNorm(layout=p.layout, x=integers, partials=p.partials[:2]))
