"""Low-precision storage in every backend: conversions of every number, and stochastic rounding of perturbed weights."""

from __future__ import annotations

import pytest
import torch
from cases import BACKENDS, get_backend

from gam_fused import FusedGAM
from gam_fused.backends.math import rounding
from gam_fused.backends.operands import Combine, Perturb
from gam_fused.backends.tensor_lists import Layout, TensorList
from gam_fused.constants import Column, Control
from gam_fused.parallel import dtensor

SEED, STEP, SCALE = 77, 5, 2.0**-6

backend_names = pytest.mark.parametrize("backend_name", BACKENDS)
low_precision = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def tables(**columns: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A coefficient table of one group, and a control block with a loss scale of 1, no xi, and a seed."""
    coefficients = torch.zeros(1, len(Column), dtype=torch.float64)
    for name, value in columns.items():
        coefficients[0, Column[name]] = value
    control = torch.zeros(len(Control), dtype=torch.float64)
    control[Control.LOSS_SCALE], control[Control.NOISE_SEED], control[Control.NOISE_STEP] = 1.0, SEED, STEP
    return coefficients, control


def ascend(backend_name: str, theta: list, x: list, ascent: int = 0, radius: float = SCALE) -> None:
    """theta <- theta + radius * x, in place."""
    layout = Layout([t.numel() for t in theta], [0] * len(theta), [True] * len(theta))
    coefficients, control = tables(**{f"RADIUS_{ascent}": radius})
    partials, realised = torch.tensor([[1.0], [0.0]], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    tables_ = {"coefficients": coefficients, "partials": partials, "control": control, "realised": realised}
    get_backend(backend_name).perturb_(
        Perturb(layout=layout, theta=TensorList(theta), x=TensorList(x), **tables_, ascent=ascent)
    )


def combine(backend_name: str, out: torch.Tensor, last: torch.Tensor | None, folded: torch.Tensor | None) -> torch.Tensor:
    """out <- last + folded."""
    layout = Layout([out.numel()], [0], [True])
    coefficients, control = tables(DIRECTION_LAST=1.0, DIRECTION_FOLDED=1.0)
    sums, partials = torch.zeros(1, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64)
    lists = {"out": TensorList([out]), "last": TensorList([last]), "folded": TensorList([folded])}
    tables_ = {"coefficients": coefficients, "partials": partials, "control": control, "direction": sums}
    get_backend(backend_name).combine_(Combine(layout=layout, **lists, **tables_))
    return out


def every_number(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


@backend_names
@low_precision
def test_every_number_is_read_and_written(backend_name, dtype):
    numbers = every_number(dtype)
    written = combine(backend_name, torch.empty_like(numbers), numbers, None)
    torch.testing.assert_close(written, numbers, rtol=0, atol=0, equal_nan=True)


@backend_names
@low_precision
def test_updates_round_to_nearest_even(backend_name, dtype):
    """Every number, its neighbours in float32, and the halfway points between numbers."""
    exact = every_number(dtype).float()
    step = torch.nextafter(exact, torch.tensor(torch.inf))
    half = torch.nn.functional.pad((exact[1:] + exact[:-1]) / 2, (0, 1))
    values = torch.cat(
        [exact, step, half, torch.nextafter(half, torch.tensor(torch.inf)), torch.tensor([1e9, -3e38, 1e-45])]
    )
    out = combine(backend_name, torch.empty(values.numel(), dtype=dtype), None, values)
    torch.testing.assert_close(out, values.to(dtype), rtol=0, atol=0, equal_nan=True)


@backend_names
@low_precision
@pytest.mark.parametrize("ascent", [0, 1, 2])
def test_bits_are_those_of_the_specification(backend_name, dtype, ascent):
    sizes = (5000, 1, 3333)
    theta = [torch.randn(n).mul(torch.logspace(-6, 3, n)).to(dtype) for n in sizes]
    x = [torch.randn(n).mul(torch.logspace(-6, 3, n)).to(dtype) for n in sizes]
    key, start, expected = rounding.key(SEED, STEP, ascent), 0, []
    for t, g in zip(theta, x, strict=True):
        noise = rounding.noise(torch.arange(start, start + t.numel()), key).view(t.shape)
        expected.append(rounding.stochastic_round(t.float() + SCALE * g.float(), dtype, noise))
        start += t.numel()
    ascend(backend_name, theta, x, ascent)
    for actual, wanted in zip(theta, expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("backend_name", [*BACKENDS, "reference"])
@low_precision
def test_the_largest_number_does_not_become_infinite(backend_name, dtype):
    """The upper neighbour is infinity: a quarter of a spacing beyond, rounding to nearest stays."""
    largest = torch.finfo(dtype).max
    signs = torch.tensor([1.0, -1.0], dtype=dtype).repeat(2000)
    quarter = largest * torch.finfo(dtype).eps / 8
    theta = [signs * largest]
    ascend(backend_name, theta, [signs * quarter], radius=1.0)
    assert torch.equal(theta[0], signs * largest)


@backend_names
@low_precision
def test_a_step_below_the_spacing_survives_on_average(backend_name, dtype):
    count = 40_000
    theta = [torch.ones(count, dtype=dtype)]
    spacing = torch.finfo(dtype).eps
    ascend(backend_name, theta, [torch.ones(count, dtype=dtype)], radius=0.1 * spacing)
    moved = (theta[0].double() - 1) / spacing
    assert set(moved.tolist()) == {0.0, 1.0}
    assert abs(moved.mean() - 0.1) < 5 * (0.1 * 0.9 / count) ** 0.5


def seeds_and_weights(monkeypatch, shard: int) -> tuple[set[float], torch.Tensor]:
    """Of an optimizer that holds this shard of its parameters: its blocks' seeds, and weights where the second pass is."""
    monkeypatch.setattr(dtensor, "shard_index", lambda p: shard)
    weight = torch.nn.Parameter(torch.ones(4000, dtype=torch.bfloat16))
    other = torch.nn.Parameter(torch.ones(4000, dtype=torch.float16))
    optimizer, points = FusedGAM([weight, other], lr=0.1, rho=0.1, method="sam"), []

    def closure():
        points.append(weight.detach().clone())
        return (weight.float() + other.float()).sum()

    optimizer.step(closure)
    return {float(block.control[Control.NOISE_SEED]) for block in optimizer.session.plan.blocks}, points[1]


def test_every_block_of_every_shard_has_noise_of_its_own(monkeypatch):
    """The same weights and gradients on three ranks: the same perturbation, rounded otherwise."""
    seeds, points = zip(*(seeds_and_weights(monkeypatch, shard) for shard in range(3)), strict=True)
    assert len(set.union(*seeds)) == sum(map(len, seeds)) == 6
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert not torch.equal(points[i], points[j])
