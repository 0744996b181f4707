"""Host time of whole steps against one foreach step of torch's SGD, and of the digits net's steps against their passes.

At 161 tensors of 64 elements a step is nothing but host time. Its closure hands over gradients that are prepared
(`contestants.Gradients.closure`: it sets each `p.grad`), which is counted, as is dropping them; SGD's stay where they are.
One thread, and the time is that thread's own, since other work on the machine interrupts it. Contestants take turns step by
step, and a ratio is of two steps of the same turn. What other work costs by way of shared caches stays in: gradients that
come from elsewhere feel it more than SGD's, which are warm.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.baselines import BASES, Settings
from benchmarks.contestants import PASSES, Contestant, Gradients, fused_gam, parameters
from benchmarks.networks import batch, classifier, shapes
from benchmarks.suites import quantiles
from gam_fused import FusedGAM

CONV_BN = 53  # blocks, as many as in ResNet-50
BASE, CLOSURES = "SGD, foreach", "closures alone, 4 passes"
MODEL, NO_MODEL = f"finite_difference, {CONV_BN} conv-BN, model=", f"finite_difference, {CONV_BN} conv-BN"
WINDOW = 10
Seconds = dict[str, list[float]]


def tell(rounds: int) -> None:
    """Measure all and print it: median of the ratios, their 20 and 80 % quantiles, ratio of the shortest."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _print(f"in steps of {BASE}")
        seconds = in_turn(steps_alone(), rounds)
        base = seconds[BASE]
        for name in seconds:
            _print(name, seconds[name], base)
        added = [a - b for a, b in zip(seconds[MODEL], seconds[NO_MODEL], strict=True)]
        _print(f"model= with {CONV_BN} conv-BN blocks adds", added, base, min(seconds[MODEL]) - min(seconds[NO_MODEL]))
        print(f"{BASE}: {1e6 * min(base):.0f} us at least, {1e6 * quantiles(base)[1]:.0f} in the median\n")
        _print("the digits net, 64 images")
        digits(rounds)
    finally:
        torch.set_num_threads(threads)


def _print(name: str, seconds: Sequence[float] = (), base: Sequence[float] = (), least: float | None = None) -> None:
    if not seconds:
        print(f"{name:45} median  20 %   80 %   of minima")
        return
    low, median, high = quantiles([s / b for s, b in zip(seconds, base, strict=True)])
    least = min(seconds) if least is None else least
    print(f"{name:45} {median:6.3f} {low:6.3f} {high:6.3f}   {least / min(base):6.3f}", flush=True)


def in_turn(contestants: dict[str, Contestant], rounds: int) -> Seconds:
    """Seconds of a step of each, `rounds` times in turn."""
    seconds: Seconds = {name: [] for name in contestants}
    for i in range(-5, rounds):  # the first make plan, state, scratch
        for name, (prepare, run) in contestants.items():
            prepare()
            taken = timed(run)
            if i >= 0:
                seconds[name].append(taken)
    return seconds


def timed(run: Callable[[], object]) -> float:
    start = time.thread_time()
    run()
    return time.thread_time() - start


def steps_alone() -> dict[str, Contestant]:
    tiny = shapes("tiny")
    result = {BASE: _sgd(parameters(tiny))}
    result |= {method: _gam(parameters(tiny), method) for method in ("sam", "finite_difference", "accelerated")}
    closures = Gradients(parameters(tiny))
    result[CLOSURES] = closures.prepare, closures.closures_alone
    for name in (NO_MODEL, MODEL):
        model = conv_bn_blocks()
        result[name] = _gam(list(model.parameters()), "finite_difference", model if name == MODEL else None)
    return result


def conv_bn_blocks() -> nn.Sequential:
    """161 small parameters, and the buffers of the batch norms."""
    blocks = [nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(CONV_BN)]
    return nn.Sequential(*blocks, nn.Linear(8, 8))


def _sgd(params: list[Tensor]) -> Contestant:
    optimizer = Settings().built(params, foreach=True)
    for p, g in zip(params, Gradients(params).source, strict=True):
        p.grad = g
    return (lambda: None), optimizer.step


def _gam(params: list[Tensor], method: str, model: nn.Module | None = None) -> Contestant:
    gradients = Gradients(params)
    optimizer = fused_gam(params, method, Settings(), backend="cpp", model=model)
    return (lambda: gradients.prepare(PASSES[method])), lambda: optimizer.step(gradients.closure)


def digits(rounds: int) -> None:
    """What steps of the digits net take over their passes, and with `interval` over the base's steps."""
    trainings = {
        "base: a step over its pass": Digits(base=True),
        "SAM: a step over its passes": Digits(method="sam"),
        "GAM: a step over its passes": Digits(),
        "GAM, a plain step: over its pass": Digits(interval=10**9),
    }
    steps = {name: [training.step() for _ in range(rounds)] for name, training in trainings.items()}
    for name, pairs in steps.items():
        whole, passes = zip(*pairs, strict=True)
        _print(name, whole, passes)
    base, tenth = Digits(base=True), Digits(interval=WINDOW)
    windows = [(base.window(), tenth.window()) for _ in range(rounds)]
    a, b = zip(*windows, strict=True)
    _print(f"GAM, interval={WINDOW}: {WINDOW} steps over the base's", b, a)


class Digits:
    """The digits net in training, by SGD alone or by FusedGAM with its defaults."""

    def __init__(self, base: bool = False, **options: object):
        self.model = classifier("digits", torch.device("cpu"))
        self.images, self.labels = batch("digits", 64, torch.device("cpu"))
        kind, settings = BASES["SGD"]
        settings = {**settings, "lr": 1e-3}
        self.optimizer = (
            kind(self.model.parameters(), **settings) if base else FusedGAM(self.model, kind, **options, **settings)
        )
        self.passes = 0.0
        for _ in range(WINDOW):
            self.step()

    def step(self) -> tuple[float, float]:
        """Seconds of a step, and of the passes in it."""
        self.passes, start = 0.0, time.thread_time()
        if isinstance(self.optimizer, FusedGAM):
            self.optimizer.step(self._one_pass)
        else:
            self.optimizer.zero_grad()
            self._one_pass()
            self.optimizer.step()
        return time.thread_time() - start, self.passes

    def window(self) -> float:
        """Seconds of `WINDOW` steps."""
        return sum(self.step()[0] for _ in range(WINDOW))

    def _one_pass(self) -> Tensor:
        start = time.thread_time()
        loss = cross_entropy(self.model(self.images), self.labels)
        loss.backward()
        self.passes += time.thread_time() - start
        return loss
