"""The Triton backend through Triton's interpreter, on CPU tensors: kernels of every dtype on awkward shapes, whole steps.

Triton decides when kernels are defined whether to interpret them, so these tests run in processes of their own, which the
first test starts with TRITON_INTERPRET=1. `TRITON_INTERPRET=1 pytest tests/test_triton_interpreter.py` runs them directly.
"""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, SHAPES, Problem, assert_same_bits, get_backend
from gam_helpers import batch, batch_norm_net, close, mlp, regression, trainer
from interpreter import in_the_interpreter
from test_kernels import KERNELS, check

from gam_fused import available_backends
from gam_fused.backends import triton as module
from gam_fused.backends.math import rounding
from gam_fused.backends.operands import Restore
from gam_fused.backends.tensor_lists import GROUP, Layout, TensorList
from gam_fused.backends.triton import backend
from gam_fused.constants import Flag

pytest.importorskip("triton", reason="Triton is not installed: pip install --no-deps triton==3.7.1")
interpreted = pytest.mark.skipif(
    not module.INTERPRETED, reason="runs with TRITON_INTERPRET=1, in the process that the first test starts"
)

EVERY_DTYPE = ("0-dim", "empty tensors", "chunk edges")
OTHERS = ("one element", "misaligned", "channels_last", "transposed")


@pytest.mark.processes
@pytest.mark.skipif(module.INTERPRETED, reason="is what the test starts")
def test_everything_below_in_the_interpreter():
    in_the_interpreter("triton", "tests/test_triton_interpreter.py")


@interpreted
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(k, d) for k in EVERY_DTYPE for d in DTYPES] + [(k, d) for k in OTHERS for d in (torch.float32, torch.bfloat16)],
    ids=str,
)
def test_kernels_on_awkward_shapes(kind, dtype):
    for kernel in KERNELS:
        check("triton", kernel, kind, dtype)


@interpreted
def test_kernels_on_many_tensors_and_chunks():
    for kernel, kind in (("products", "small"), ("second ascent", "chunks"), ("sgd momentum", "chunks")):
        check("triton", kernel, f"many {kind}", torch.float32)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{"loss_scale": 1024.0, "max_norm": 0.5}, {"max_norm": 1e6, "missing": False}], ids=str)
def test_loss_scale_clip_and_complete_lists(options, dtype):
    for kernel in KERNELS:
        check("triton", kernel, "transposed", dtype, **options)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_options_of_the_base_optimizers(dtype):
    sgd = [("sgd", Flag.MAXIMIZE), ("sgd momentum", Flag.NESTEROV | Flag.MAXIMIZE)]
    adam = [("adam", Flag.MAXIMIZE), ("adam", Flag.AMSGRAD), ("adam", Flag.AMSGRAD | Flag.DECOUPLED)]
    for kernel, flags in sgd + adam:
        for steps in (0.0, 3.0):
            check("triton", kernel, "empty tensors", dtype, flags=flags, steps_so_far=steps)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_that_is_not_aligned_gives_the_same_bits(dtype):
    """Masked blocks add up in the order of whole ones."""
    shapes = [(4099,), (33,), (5000,)]
    for kernel in (KERNELS[name] for name in ("adaptive norm", "products", "third ascent", "adam", "combine")):
        results = []
        for kind in ("aligned", "misaligned"):
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(SHAPES, kind, shapes)
                results.append(kernel(get_backend("triton"), Problem(kind, dtype, dtype)))
        assert_same_bits(results[1], results[0])


@interpreted
def test_restore_keeps_every_bit():
    for dtype in DTYPES:
        width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
        backup = torch.randint(-(2**15), 2**15, (5000,)).to(width).view(dtype)
        theta = torch.zeros_like(backup)
        lists = {"theta": TensorList([theta]), "backup": TensorList([backup])}
        backend.restore_(Restore(layout=Layout([5000], [0], [True]), **lists))
        assert torch.equal(theta.view(width), backup.view(width))


@interpreted
def test_ticket_is_back_at_zero_and_counters_advance_once():
    problem = Problem("many chunks", torch.float32, torch.float32, steps_so_far=2.0, missing=False)
    for k in range(2):
        KERNELS["sgd momentum"](get_backend("triton"), problem)
        assert {float(s) for s in problem.steps.tensors} == {3.0 + k}
        workspace = problem.layout.workspace(torch.device("cpu"))
        assert not workspace[: -(-problem.layout.chunks // GROUP) + 1].any()


METHODS = [
    ("sam", torch.optim.SGD, {"nesterov": True}, torch.float32),
    ("finite_difference", torch.optim.SGD, {"weight_decay": 0.01, "max_grad_norm": 0.1}, torch.float64),
    ("finite_difference", torch.optim.AdamW, {"oracle": "sam", "interval": 2}, torch.float64),
    ("accelerated", torch.optim.Adam, {"amsgrad": True, "adaptive": True}, torch.float64),
    ("accelerated", torch.optim.SGD, {}, torch.float32),
    ("exact", torch.optim.SGD, {}, torch.float64),
    ("finite_difference", torch.optim.RMSprop, {"lr": 0.01}, torch.float64),
    ("finite_difference", torch.optim.SGD, {"max_ratio": 0.02, "max_grad_norm": 0.05}, torch.float64),
    ("gradient_penalty", torch.optim.AdamW, {"max_ratio": 0.5, "alpha": float("inf"), "xi": 1e-3}, torch.float64),
]


@interpreted
@pytest.mark.parametrize(("method", "base", "options", "dtype"), METHODS, ids=str)
def test_whole_steps_equal_the_reference(method, base, options, dtype):
    x, y = batch(dtype=dtype)
    weights = []
    for name in ("triton", "reference"):
        model = mlp(dtype)
        optimizer, closure = trainer(method, model, regression(model, x, y), base, backend=name, **options)
        for _ in range(3):
            optimizer.step(closure)
        weights.append([p.detach().double() for p in model.parameters()])
    close(*weights, tolerance=1e-9 if dtype == torch.float64 else 1e-5)


@interpreted
def test_a_skipped_step_and_a_failed_one_leave_the_weights():
    model = batch_norm_net()
    x, _ = batch(features=(1, 8, 8))
    scale = [1.0]

    def loss_fn():
        if scale[0] is None:
            raise KeyboardInterrupt
        return model(x).square().mean() * scale[0]

    optimizer, closure = trainer("finite_difference", model, loss_fn, backend="triton")
    optimizer.step(closure)
    before = [p.detach().clone() for p in model.parameters()]
    scale[0] = float("nan")
    optimizer.step(closure)
    assert optimizer.skipped_steps == 1
    scale[0] = None
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@interpreted
def test_interpreted_backend_serves_the_cpu_and_is_never_chosen_by_itself():
    from gam_fused.backends import backend_for as choose

    assert available_backends()["triton"] == ""
    assert choose("triton", torch.device("cpu")) is backend
    assert choose("auto", torch.device("cpu")) is not backend
    with pytest.raises(RuntimeError, match="serves cpu tensors, not cuda"):
        choose("triton", torch.device("cuda"))


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_has_the_specified_bits_across_a_multiple_of_2_to_the_32(dtype):
    """Positions in the flat vector beyond 2^32, which no test has the memory for: the rounding of one block on its own."""
    from triton_rounding import round_block

    size, before, first = 2048, 1000, 512
    values, out, key = torch.randn(size), torch.empty(size, dtype=dtype), rounding.key(77, 5, 1)
    starts = torch.tensor([2**32 - before - first, first])
    round_block[(1,)](values, out, torch.tensor([key]), starts, module.constants("perturb_", dtype)["DTYPE"], size)
    noise = rounding.noise(torch.arange(2**32 - before, 2**32 - before + values.numel()), key)
    assert torch.equal(out, rounding.stochastic_round(values, dtype, noise))
    assert not torch.equal(out, values.to(dtype))
