"""Host time of whole steps against one foreach step of torch's SGD, and of the digits net's steps against their passes.

    python -m benchmarks.profile_step --ratios [--rounds 40]

One thread. At 161 tensors of 64 elements a step is nothing but host time: its closure hands over gradients that are prepared
(`contestants.Gradients`: it sets each `p.grad`), and that is counted. Contestants take turns in short batches, and every
ratio is of two batches that follow one another, since other work on the machine disturbs: told are the median of the ratios,
their 20 and 80 % quantiles, and the ratio of the shortest batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.baselines import Settings
from benchmarks.contestants import PASSES, Contestant, Gradients, fused_gam, parameters
from benchmarks.networks import batch, classifier, shapes
from benchmarks.suites import quantiles
from gam_fused import FusedGAM

STEPS = 5  # in a batch
BLOCKS = 53  # convolutions with batch norm, as in ResNet-50
BASE = "SGD, foreach"
Seconds = dict[str, list[float]]


def tell(rounds: int) -> None:
    """Measure all and print it."""
    torch.set_num_threads(1)
    print(f"{'of ' + BASE:44} median     20 to 80 %    of minima")
    seconds = measured(contestants(), rounds)
    base = seconds[BASE]
    for name in seconds:
        if name != BASE:
            _print(name, seconds[name], base)
    added = [with_model - without for with_model, without in zip(seconds[MODEL], seconds[NO_MODEL], strict=True)]
    _print(f"model= with {BLOCKS} conv-BN blocks adds", added, base, min(seconds[MODEL]) - min(seconds[NO_MODEL]))
    print(f"\n{BASE}: {1e6 * min(base) / STEPS:.0f} us at least, {1e6 * quantiles(base)[1] / STEPS:.0f} in the median")
    print(f"\n{'the digits net, 64 images':44} median     20 to 80 %    of minima")
    digits(rounds)


def _print(name: str, seconds: Sequence[float], base: Sequence[float], least: float | None = None) -> None:
    low, median, high = quantiles([s / b for s, b in zip(seconds, base, strict=True)])
    least = min(seconds) if least is None else least
    print(f"{name:44} {median:6.3f}   {low:6.3f} {high:6.3f}     {least / min(base):6.3f}", flush=True)


def measured(contestants: dict[str, Contestant], rounds: int) -> Seconds:
    """Seconds of one batch of steps of each contestant, `rounds` times, in turn."""
    for prepare, run in contestants.values():
        for _ in range(5):  # plan, state, scratch
            prepare()
            run()
    seconds: Seconds = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, (prepare, run) in contestants.items():
            seconds[name].append(sum(_timed(prepare, run) for _ in range(STEPS)))
    return seconds


def _timed(prepare: Callable[[], object], run: Callable[[], object]) -> float:
    prepare()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


MODEL, NO_MODEL = f"finite_difference, {BLOCKS} conv-BN, model=", f"finite_difference, {BLOCKS} conv-BN"


def contestants() -> dict[str, Contestant]:
    tiny = shapes("tiny")
    result = {BASE: _base(parameters(tiny))}
    for method in ("sam", "finite_difference", "accelerated"):
        result[method] = _gam(parameters(tiny), method)
    closures = Gradients(parameters(tiny))
    result["closures alone, 4 passes"] = closures.prepare, closures.closures_alone
    for name in (NO_MODEL, MODEL):
        model = conv_bn_blocks()
        result[name] = _gam(list(model.parameters()), "finite_difference", model if name == MODEL else None)
    return result


def conv_bn_blocks() -> nn.Sequential:
    blocks = [nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(BLOCKS)]
    return nn.Sequential(*blocks, nn.Linear(8, 8))


def _base(params: list[Tensor]) -> Contestant:
    optimizer = Settings().built(params, foreach=True)
    for p, g in zip(params, Gradients(params).source, strict=True):
        p.grad = g
    return (lambda: None), optimizer.step


def _gam(params: list[Tensor], method: str, model: nn.Module | None = None) -> Contestant:
    gradients = Gradients(params)
    optimizer = fused_gam(params, method, Settings(), backend="cpp", model=model)
    return (lambda: gradients.prepare(PASSES[method])), lambda: optimizer.step(gradients.closure)


def digits(rounds: int) -> None:
    """How much the digits net's steps take beyond their passes, and beyond its base's steps with `interval=10`."""
    for name, options in (("SAM", {"method": "sam"}), ("GAM", {}), ("GAM, max_ratio=None", {"max_ratio": None})):
        job = Digits(**options)
        whole, passes = zip(*(job.over_passes() for _ in range(rounds)), strict=True)
        _print(f"{name}: a step over its passes", whole, passes)
    base, tenth = Digits(base=True), Digits(interval=10)
    seconds = [(base.window(), tenth.window()) for _ in range(rounds)]
    a, b = zip(*seconds, strict=True)
    _print("GAM, interval=10: 10 steps over the base's", b, a)


class Digits:
    """The digits net in training, by SGD alone or by FusedGAM."""

    def __init__(self, base: bool = False, **options: object):
        device = torch.device("cpu")
        self.model = classifier("digits", device)
        self.images, self.labels = batch("digits", 64, device)
        self.passes = 0.0
        sgd = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4}
        self.base = torch.optim.SGD(self.model.parameters(), foreach=True, **sgd) if base else None
        self.gam = None if base else FusedGAM(self.model, torch.optim.SGD, **options, **sgd)
        for _ in range(20):
            self.step()

    def step(self) -> None:
        if self.base:
            self.base.zero_grad()
            self.one_pass()
            self.base.step()
        else:
            self.gam.step(self.one_pass)

    def one_pass(self) -> Tensor:
        start = time.perf_counter()
        loss = cross_entropy(self.model(self.images), self.labels)
        loss.backward()
        self.passes += time.perf_counter() - start
        return loss

    def over_passes(self) -> tuple[float, float]:
        """Seconds of a batch of steps, and of the passes in them."""
        self.passes, start = 0.0, time.perf_counter()
        for _ in range(STEPS):
            self.step()
        return time.perf_counter() - start, self.passes

    def window(self) -> float:
        """Seconds of ten steps."""
        start = time.perf_counter()
        for _ in range(10):
            self.step()
        return time.perf_counter() - start
