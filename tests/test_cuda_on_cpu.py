"""The CUDA kernels themselves, run on the CPU, against the reference: every kernel, dtype and awkward shape.

`run_under_sanitizers` runs them once more, built with the address and undefined-behaviour sanitizers.
"""

from __future__ import annotations

from dataclasses import dataclass

import cases
import cuda_on_cpu
import pytest
import test_infinite_weights as infinite
import torch
from cases import DTYPES, SHAPES, Problem, assert_same_bits
from gam_helpers import METHODS
from test_against_float64 import test_groups as groups_follow_float64
from test_kernels import ADAM, KERNELS, SGD, TWO, check

from gam_fused import backends
from gam_fused.backends import reference
from gam_fused.backends.operands import Combine, CombinedUpdate, DirectionProducts, Perturb, Restore, SquaredNorm
from gam_fused.backends.tensor_lists import GROUP, Layout, TensorList
from gam_fused.constants import Algorithm, Column, Control, Flag
from gam_fused.methods import TAKES as METHOD_TAKES

pytestmark = pytest.mark.skipif(bool(cuda_on_cpu.reason()), reason=cuda_on_cpu.reason() or "can be built")
NAME = "cuda on cpu"


@pytest.fixture(scope="module", autouse=True)
def backend():
    cases.EXTRA_BACKENDS[NAME] = cuda_on_cpu.backend()
    return cases.EXTRA_BACKENDS[NAME]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [kind for kind in SHAPES if kind != "many chunks"])
def test_kernels_on_awkward_shapes(kind, dtype):
    for kernel in KERNELS:
        check(NAME, kernel, kind, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_options_of_the_kernels(dtype):
    for options in ({"loss_scale": 1024.0}, {"max_norm": 0.5}, {"missing": False}):
        for kernel in KERNELS:
            check(NAME, kernel, "chunk edges", dtype, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("steps", [0.0, 3.0])
def test_base_optimizers(steps, dtype):
    for flags in (Flag.MAXIMIZE, Flag.NESTEROV, Flag.NESTEROV | Flag.MAXIMIZE):
        check(NAME, "sgd momentum", "chunk edges", dtype, flags=flags, steps_so_far=steps)
    for flags in (Flag.MAXIMIZE, Flag.AMSGRAD, Flag.DECOUPLED, Flag.AMSGRAD | Flag.DECOUPLED):
        check(NAME, "adam", "chunk edges", dtype, flags=flags, steps_so_far=steps)


def test_several_chunks(backend):
    """Sums of chunks that other blocks took, and the last block's count of steps."""
    for kernel in KERNELS:
        check(NAME, kernel, "many chunks", torch.float32)


def test_perturbed_bits_are_those_of_the_reference():
    """Stochastic rounding, across a position that needs more than 32 bits too."""
    for dtype in (torch.bfloat16, torch.float16):
        for kind in ("chunk edges", "misaligned", "channels_last"):
            results = [
                cases.run_perturb(cases.get_backend(name), Problem(kind, dtype, dtype), ascent=1)
                for name in (NAME, "reference")
            ]
            differs = [
                (a != b).double().mean().item()
                for a, b in zip(results[0]["theta"].tensors, results[1]["theta"].tensors, strict=True)
            ]
            assert max(differs) < 2e-3  # the reference rounds a float64 sum; theirs was rounded to float32 first


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("algorithm", [SGD, ADAM])
def test_not_finite(backend, algorithm, bad):
    problem = Problem("chunk edges", torch.bfloat16, torch.bfloat16, flags=Flag.AMSGRAD, steps_so_far=3.0)
    ascent = cases.run_perturb(backend, problem, ascent=1, total=bad)
    assert_same_bits({"theta": ascent["theta"]}, {"theta": problem.values(5)})
    assert ascent["control"][Control.FOUND_INF] == 1
    result = cases.run_combined_update(backend, problem, algorithm, g1=False, totals=(bad, 1.0))
    untouched = {"theta": problem.values(5), "state1": problem.values(7), "state2": problem.values(8, positive=True)}
    assert_same_bits(result, untouched)
    assert {float(s) for s in result["steps"].tensors} == {3.0}
    assert result["control"][Control.SKIPPED] == result["control"][Control.LAST_SKIPPED] == 1
    workspace = problem.layout.workspace(torch.device("cpu"))
    assert not workspace[: -(-problem.layout.chunks // GROUP) + 1].any()  # all tickets are back at 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinite_weights(dtype):
    for update in infinite.UPDATES:
        for weight_decay in (0.0, 0.01):
            infinite.test_updates_are_torchs(NAME, update, weight_decay, dtype)
        infinite.test_lr_0_moves_nothing(NAME, update, dtype)
    for yes in (False, True):
        infinite.test_ascents_leave_what_has_no_gradient(NAME, yes, True, dtype)
        infinite.test_ascents_leave_what_has_no_gradient(NAME, yes, False, dtype)
        infinite.test_adaptive_norms_pass_over_what_has_no_gradient(NAME, yes, dtype)
        infinite.test_nothing_moves_along_a_zero_gradient_without_xi(NAME, 0.125 * yes, dtype)
    infinite.test_gradients_close_to_zero_leave_elements_without_gradient(NAME)


def many(count: int, size: int, dtype: torch.dtype) -> tuple[Layout, list[TensorList]]:
    layout = Layout([size] * count, [0] * count, [True] * count)
    generator = torch.Generator().manual_seed(0)
    return layout, [TensorList(list(torch.randn(count, size, generator=generator).to(dtype))) for _ in range(3)]


@pytest.mark.parametrize("count", [500, 3000])
def test_more_tensors_than_an_argument_block_holds(backend, count):
    """440 words travel in a small block, 4,000 in a large one, and more in several launches."""
    layout, (theta, x, y) = many(count, 3, torch.float32)
    sums = [torch.zeros(2, 1, dtype=torch.float64) for _ in range(2)]
    for one, partials in zip((backend, reference), sums, strict=True):
        one.squared_norm(SquaredNorm(layout=layout, x=x, y=y, weight=theta, partials=partials))
    torch.testing.assert_close(sums[0].sum(1), sums[1].sum(1), rtol=1e-6, atol=0)
    backend.restore_(Restore(layout=layout, theta=theta, backup=x))
    assert all(torch.equal(a, b) for a, b in zip(theta.tensors, x.tensors, strict=True))


def test_a_layout_that_is_not_on_the_device_goes_along(monkeypatch, backend):
    """Without a map the layout travels in the words: the same result."""
    problem = Problem("empty tensors", torch.float32, torch.float32)
    x, expected, partials = problem.values(1), problem.partials[:2].clone(), problem.partials[:2]
    backend.squared_norm(SquaredNorm(layout=problem.layout, x=x, partials=expected))
    monkeypatch.setattr(backend, "map_of", lambda layout, device: torch.empty(0, dtype=torch.int64))
    backend.squared_norm(SquaredNorm(layout=problem.layout, x=x, partials=partials))
    assert torch.equal(partials, expected)


def test_chunks_of_one_tensor_see_the_same_step(backend):
    """Steps are counted by the block that finishes last: a block that counted at once would show the next one step + 1."""
    layout = Layout([3 * 4096], [0], [True])
    problem = Problem("one element", torch.float32, torch.float32)
    steps, theta = TensorList([torch.tensor(0.0)]), TensorList([torch.zeros(3 * 4096)])
    gradient, state = TensorList([torch.ones(3 * 4096)]), [TensorList([torch.zeros(3 * 4096)]) for _ in range(2)]
    coefficients = problem.coefficients[:1].clone()
    coefficients[0, Column.WEIGHT_DECAY] = 0.0
    sums = torch.zeros(1, dtype=torch.float64)
    lists = {"theta": theta, "last": gradient, "state1": state[0], "state2": state[1], "steps": steps}
    tables = {"coefficients": coefficients, "partials": problem.finished(*TWO), "control": problem.control}
    backend.combined_update_(CombinedUpdate(layout=layout, **lists, **tables, direction=sums, algorithm=Algorithm.ADAM))
    assert theta.tensors[0].unique().numel() == 1
    assert steps.tensors[0] == 1


def test_a_removed_barrier_is_seen(backend):
    """That this way of testing can fail: without __syncthreads a block sums what was written for the block before."""

    def sums_of_chunks(radii=0.1):
        problem = Problem("chunk edges", torch.float32, torch.float32, radii=radii)
        cases.run_perturb(backend, problem, ascent=0)
        return problem.sums

    right = sums_of_chunks()
    sums_of_chunks(radii=0.3)  # leaves other numbers in shared memory
    backend.drop_block_barriers(True)
    try:
        wrong = sums_of_chunks()
    finally:
        backend.drop_block_barriers(False)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(wrong, right)


@pytest.mark.parametrize("base", ["sgd-nesterov", "adamw-amsgrad"])
@pytest.mark.parametrize("method", METHODS)
def test_whole_steps(monkeypatch, backend, method, base):
    """Steps of all methods, in three groups, follow the independent float64 implementation."""
    monkeypatch.setitem(backends._BACKENDS, NAME, (backend, ("cpu",)))
    monkeypatch.setattr(backends, "BACKENDS", (*backends.BACKENDS, NAME))
    bounds = ({"max_ratio": 0.02, "max_grad_norm": 0.05}, {"max_ratio": 0.5, "alpha": float("inf"), "xi": 1e-3})
    for options in ({}, {"adaptive": True}, {"max_grad_norm": 0.05}, *(bounds if METHOD_TAKES[method].bound else ())):
        groups_follow_float64(method, base, options, NAME)


def run_under_sanitizers() -> None:
    """What kernels compute is compared above; here they only run."""
    torch.set_num_threads(1)
    backend = cuda_on_cpu.backend(sanitized=True)
    for kind in ("chunk edges", "empty tensors", "misaligned", "0-dim"):
        for dtype in (torch.float32, torch.bfloat16):
            for run in KERNELS.values():
                run(backend, Problem(kind, dtype, dtype))
    test_more_tensors_than_an_argument_block_holds(backend, 500)
    test_chunks_of_one_tensor_see_the_same_step(backend)
    print("done")


def test_under_sanitizers():
    """In a process whose kernels report every access out of bounds, misaligned or undefined."""
    done = cuda_on_cpu.run_sanitized("import test_cuda_on_cpu as t; t.run_under_sanitizers()")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout == "done\n"


def test_sanitizers_see_an_access_out_of_bounds():
    """A layout that promises one element more than the tensor has, which nobody has looked at."""
    done = cuda_on_cpu.run_sanitized(
        "import torch, cuda_on_cpu; from gam_fused.backends import compiled, operands as o\n"
        "from gam_fused.backends.tensor_lists import GROUP, Layout, TensorList; compiled.check_lists = lambda *_: None\n"
        "backend = cuda_on_cpu.backend(sanitized=True); layout = Layout([1001], [0], [True])\n"
        "x = TensorList([torch.ones(1000)])\n"
        "backend.squared_norm(o.SquaredNorm(layout=layout, x=x, partials=torch.zeros(2, 1, dtype=torch.float64)))"
    )
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


def test_what_follows_a_norm_walks_backwards(backend):
    """The first block takes the last chunk, which is still in the cache; norms begin with the first."""
    for name, written, seed in (("first ascent", "theta", 0), ("sgd momentum", "theta", 0), ("combine two", "out", 2)):
        problem = Problem("many chunks", torch.float32, torch.float32, missing=False)
        with backend.one_block_only():
            results = KERNELS[name](backend, problem)
        moved = (cases._flat(results[written]) != cases._flat(problem.values(seed))).nonzero()
        assert moved.min() >= (problem.layout.chunks - 1) * problem.layout.chunk, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_last_chunk_of_a_tensor_of_more_elements_than_32_bits_count(backend, dtype):
    """Nobody touches the memory before it, so it costs none. Norms and copies take the last chunk in the last block."""
    count = 2**31 + 4099
    theta, backup, ones = (torch.empty(count, dtype=dtype) for _ in range(3))
    row = torch.zeros(1, len(Column), dtype=torch.float64)
    row[0, Column.RADIUS_0], row[0, Column.DIRECTION_LAST], row[0, Column.LR] = 0.5, 1.0, 0.125
    control, sums = torch.zeros(len(Control), dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    control[Control.LOSS_SCALE] = 1.0

    def chunk_of_its_own():
        """A layout, whose workspace no other launch has left in the middle, and the elements of its last chunk."""
        layout = Layout([count], [0], [True])
        return layout, slice((layout.chunks - 1) * layout.chunk, count)

    def sum_of_chunk(layout):
        """Where a block leaves its chunk's: behind the tickets."""
        return layout.workspace(torch.device("cpu"))[-(-layout.chunks // GROUP) + layout.chunks].item()

    layout, last = chunk_of_its_own()
    theta[last], backup[last], ones[last] = 0.0, 7.0, 1.0
    before, x = theta[last.start - 1].item(), TensorList([ones])
    tables = {"coefficients": row, "partials": torch.tensor([[4.0], [1.0]], dtype=torch.float64), "control": control}
    with backend.one_block_only(last=True):
        backend.squared_norm(SquaredNorm(layout=layout, x=x, partials=torch.zeros(2, 1, dtype=torch.float64)))
        assert sum_of_chunk(layout) == count - last.start
        layout, _ = chunk_of_its_own()
        products = torch.zeros(2, 1, dtype=torch.float64)
        backend.direction_products(DirectionProducts(layout=layout, last=x, coefficients=row, partials=products))
        assert sum_of_chunk(layout) == count - last.start
    weights, saved = TensorList([theta]), TensorList([backup])
    with backend.one_block_only():
        lists = {"theta": weights, "x": x, "backup": saved}
        backend.perturb_(Perturb(layout=chunk_of_its_own()[0], **lists, **tables, realised=sums, ascent=0))
        assert (theta[last] == 0.25).all()
        assert (backup[last] == 0.0).all()
        lists = {"theta": weights, "last": x, "backup": saved, "steps": TensorList([torch.tensor(0.0)])}
        kwargs = {"direction": sums, "algorithm": Algorithm.SGD}
        backend.combined_update_(CombinedUpdate(layout=chunk_of_its_own()[0], **lists, **tables, **kwargs))
        assert (theta[last] == -0.125).all()
        row[0, Column.DIRECTION_LAST] = 0.5
        backend.combine_(Combine(layout=chunk_of_its_own()[0], out=saved, last=x, **tables, direction=sums))
        assert (backup[last] == 0.5).all()
    with backend.one_block_only(last=True):
        backend.restore_(Restore(layout=chunk_of_its_own()[0], theta=weights, backup=x))
        assert (theta[last] == 1.0).all()
    assert theta[last.start - 1].item() == before


@dataclass
class Shifted(Problem):
    """Operands that lie `by` elements after a 16-byte mark: all, or gradients alone."""

    by: int = 1
    only_gradients: bool = False

    def values(self, seed: int, *, gradient: bool = False, **options) -> TensorList:
        lst = super().values(seed, gradient=gradient, **options)
        if self.only_gradients and not gradient:
            return lst
        return TensorList([None if t is None else self._shifted(t) for t in lst.tensors])

    def _shifted(self, t: torch.Tensor) -> torch.Tensor:
        buffer = torch.empty(t.numel() + 16, dtype=t.dtype)
        start = -buffer.data_ptr() // t.itemsize % (16 // t.itemsize) + self.by
        return buffer[start : start + t.numel()].view(t.shape).copy_(t)


@pytest.mark.parametrize("only_gradients", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_alignment(backend, dtype, only_gradients):
    """What lies off the 16-byte marks is read by whole vectors too, and goes to the same threads."""
    for name, kernel in KERNELS.items():
        expected = kernel(backend, Problem("chunk edges", dtype, dtype))
        for by in range(1, 16 // dtype.itemsize):
            shifted = Shifted("chunk edges", dtype, dtype, by=by, only_gradients=only_gradients)
            actual = kernel(backend, shifted)
            for key, wanted in expected.items():
                assert torch.equal(cases._flat(actual[key]), cases._flat(wanted)), (name, by, key)
