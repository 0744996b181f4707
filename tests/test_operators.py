"""The kernels as torch operators: schemas, torch.compile, version counters, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from cases import Problem, assert_same_bits, get_backend, run_combine, run_combined_update, run_perturb

from gam_fused.backends import cpp
from gam_fused.backends.operators import DTYPES
from gam_fused.backends.tensor_lists import EMPTY, TensorList
from gam_fused.constants import Algorithm

pytestmark = pytest.mark.skipif(bool(cpp.reason()), reason=cpp.reason() or "built")
OPS = torch.ops.gam_fused
FLOAT32 = DTYPES[torch.float32]
NO_MAP = torch.empty(0, dtype=torch.int64)


def problem(**options) -> Problem:
    return Problem("empty tensors", torch.float32, torch.float32, **options)


def samples() -> dict[str, tuple]:
    """Arguments of the list overload of every kernel."""
    p = problem()
    head, tail = (p.layout.table, NO_MAP, p.layout.chunk, FLOAT32), (p.coefficients, p.finished(9.0, 1.0), p.control)
    gradient = [p.values(seed, gradient=True).operands for seed in range(4)]
    weights = [p.values(seed).operands for seed in range(4, 9)]
    steps = p.steps.operands
    return {
        "squared_norm": (*head, gradient[0], gradient[1], weights[0], p.partials[:2]),
        "direction_products": (*head, *gradient[:3], p.coefficients, p.partials),
        "perturb_": (*head, weights[0], [], gradient[0], gradient[1], weights[3], weights[1], *tail, p.sums, 0, True),
        "combined_update_": (*head, *weights[:2], [], gradient[0], gradient[1], weights[2], [], [], steps, *tail, p.sums, 0),
        "combine_": (*head, weights[0], [], gradient[1], gradient[2], *tail, p.sums),
        "restore_": (*head, weights[0], weights[1]),
    }  # fmt: skip


@pytest.mark.parametrize("kernel", samples())
def test_opcheck(kernel):
    torch.library.opcheck(getattr(OPS, kernel).default, samples()[kernel])


@pytest.mark.parametrize(
    ("run", "arguments"),
    [
        (run_perturb, {"ascent": 2}),
        (run_combined_update, {"algorithm": Algorithm.ADAM, "x1": True, "totals": (4.0, 1.0, 1.0, 0.5, 3.0, 0.5)}),
        (run_combine, {"x1": False, "totals": (4.0, 1.0)}),
    ],
)
def test_torch_compile_gives_the_same_bits(run, arguments):
    """`run` prepares operands; the backend it is given records the call, which is then made eagerly and compiled."""

    class Recorder:
        def __getattr__(self, kernel):
            return lambda *args: calls.append((kernel, args))

    results = []
    for mode in ("eager", "compiled"):
        calls: list[tuple] = []
        run(Recorder(), problem(), **arguments)
        ((kernel, (layout, *args)),) = calls
        lists = [a.tensors for a in args if isinstance(a, TensorList)]
        others = [a for a in args if not isinstance(a, TensorList)]

        def call(lists, others, kernel=kernel, layout=layout):
            getattr(cpp, kernel)(layout, *[TensorList(lst) for lst in lists], *others)

        call = call if mode == "eager" else torch.compile(call, fullgraph=True, backend="aot_eager")
        call(lists, others)
        tensors = [o for o in others if isinstance(o, torch.Tensor)]
        results.append({**{f"list {i}": TensorList(lst) for i, lst in enumerate(lists)}, "tensors": TensorList(tensors)})
    assert_same_bits(results[1], results[0])


@pytest.mark.parametrize("kernel", ["perturb_", "combined_update_", "restore_"])
def test_autograd_sees_that_weights_changed(kernel):
    weight = torch.randn(4, requires_grad=True)
    loss = (weight * weight).sum()
    p = Problem("0-dim", torch.float32, torch.float32)
    p.layout = type(p.layout)([4], [0], [True])
    theta, other = TensorList([weight.detach()]), TensorList([torch.randn(4)])
    tail = (p.coefficients, p.finished(1.0, 0.0), p.control, p.sums)
    if kernel == "restore_":
        cpp.restore_(p.layout, theta, other)
    elif kernel == "perturb_":
        cpp.perturb_(p.layout, theta, EMPTY, other, EMPTY, EMPTY, EMPTY, *tail, 0, False)
    else:
        steps = TensorList(p.steps.tensors[:1])
        cpp.combined_update_(p.layout, theta, EMPTY, EMPTY, other, EMPTY, EMPTY, EMPTY, EMPTY, steps, *tail, 0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[:-1], r"x\[1\] has shape \[2\], dtype \w+: 2 elements, the layout says 3"),
        (lambda t: t.double(), r"x\[1\] has shape \[3\], dtype Double, expected dtype Float"),
        (lambda t: torch.stack([t, t], 1)[:, 0], r"x\[1\] \(shape \[3\].*gaps"),
    ],
)
def test_list_overload_names_what_is_wrong(change, message):
    args = list(samples()["squared_norm"])
    args[4] = list(problem(missing=False).values(0).operands)
    args[4][1] = change(args[4][1])
    with pytest.raises(RuntimeError, match=message):
        OPS.squared_norm.default(*args)


def test_list_overload_refuses_other_memory_orders_and_missing_weights():
    p = Problem("transposed", torch.float32, torch.float32, missing=False)
    weights, copies = p.values(0).tensors, [t.contiguous() for t in p.values(1).tensors]
    with pytest.raises(RuntimeError, match=r"backup\[0\].*another order"):
        OPS.restore_.default(p.layout.table, NO_MAP, p.layout.chunk, FLOAT32, weights, copies)
    with pytest.raises(RuntimeError, match=r"backup\[1\] is missing"):
        OPS.restore_.default(
            p.layout.table, NO_MAP, p.layout.chunk, FLOAT32, weights, [p.values(1).tensors[0], torch.empty(0)]
        )
    with pytest.raises(RuntimeError, match="theta has 1 tensors, the layout 2"):
        OPS.restore_.default(p.layout.table, NO_MAP, p.layout.chunk, FLOAT32, weights[:1], weights)


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
    weights, copies = p.values(0).tensors, p.values(1).tensors
    with pytest.raises(RuntimeError, match=message):
        OPS.restore_.addresses(
            change(p.layout.table), NO_MAP, chunk, FLOAT32, TensorList(weights).addresses, TensorList(copies).addresses
        )


def test_unsupported_dtype_is_named():
    p = problem(missing=False)
    integers = TensorList([t.to(torch.int32) for t in p.values(0).tensors])
    with pytest.raises(TypeError, match=r"not torch\.int32"):
        get_backend("cpp").squared_norm(p.layout, integers, EMPTY, EMPTY, p.partials[:2])
