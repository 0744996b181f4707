"""Steps of an optimizer alone: its gradients are prepared, its closure only hands them over.

A contestant is a pair (prepare, run), of which only `run` is timed. Gradients are handed over as autograd does, nobody else
holding them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines import BASES, Authors, Foreach, Settings
from gam_fused import FusedGAM

Contestant = tuple[Callable[[], object], Callable[[], object]]
PASSES = {"base": 1, "sam": 2, "finite_difference": 4, "accelerated": 4}
TRAFFIC = {"sam": 11, "finite_difference": 24, "accelerated": 27}  # reads and writes per element, SGD with momentum
AUTHORS, FOREACH, TORCH_FUSED = "authors' order", "torch._foreach", "torch, fused"
BASELINES: dict[str, type[Authors] | type[Foreach]] = {AUTHORS: Authors, FOREACH: Foreach}


@dataclass(frozen=True)
class Implementation:
    """One way to compute a step.

    Attributes:
        base: "SGD" or "AdamW".
        method: "base" (no perturbation), "sam", "finite_difference" or "accelerated".
        by: who computes it: one of `AUTHORS`, `FOREACH`, `TORCH_FUSED`, or a backend of gam_fused.
        flatten: of FusedGAM.
    """

    base: str
    method: str
    by: str
    flatten: bool = False

    def __str__(self) -> str:
        return f"{self.base}, {self.method}, {self.by}{', flatten' * self.flatten}"

    @property
    def copies(self) -> int:
        """Of the model, float32, that it holds at most with AdamW as its base, prepared gradients included."""
        if self.method in ("base", "sam"):
            return 4 if self.method == "base" else 9
        return 15 if self.by == AUTHORS else 11

    def on(self, params: list[Tensor]) -> Contestant:
        """This implementation at work on `params`."""
        settings = Settings(base=self.base)
        gradients = Gradients(params)
        prepare = lambda: gradients.prepare(PASSES[self.method])  # noqa: E731
        if self.by == TORCH_FUSED:
            optimizer = settings.built(params, fused=True)
            for p, g in zip(params, gradients.source, strict=True):
                p.grad = g
            return (lambda: None), optimizer.step
        if self.by in BASELINES:
            baseline = BASELINES[self.by](params, settings, self.method)
            return prepare, lambda: baseline.step(gradients.hand_over)
        fused = fused_gam(params, self.method, settings, backend=self.by, flatten=self.flatten)
        return prepare, lambda: fused.step(gradients.closure)


def fused_gam(params: list[Tensor], method: str, s: Settings, **options: Any) -> FusedGAM:
    """FusedGAM with the settings of the baselines."""
    kind, base_options = BASES[s.base]
    options |= {**base_options, **s.base_options, "method": method, "rho": s.rho}
    if method != "sam":
        options |= {"rho_prime": s.rho_prime, "alpha": s.alpha}
    if method == "finite_difference":
        options["max_ratio"] = None  # the baselines are the paper's
    if method == "accelerated":
        options |= {"beta": (1.0, 1 - s.beta), "gamma": s.gamma}
    return FusedGAM(params, kind, **options)


class Gradients:
    """Prepared gradients that are handed over, not lent: after a pass nobody here holds them."""

    def __init__(self, params: Sequence[Tensor]):
        like = params[0]
        generator = torch.Generator(like.device).manual_seed(1)
        options = {"generator": generator, "device": like.device, "dtype": like.dtype}
        self.params = params
        self.source = [torch.randn(p.shape, **options).mul_(1e-2) for p in params]
        self.ready: list[list[Tensor]] = []

    def prepare(self, passes: int = 4) -> None:
        self.ready = [[g * (1.0 + k) for g in self.source] for k in range(passes)][::-1]

    def hand_over(self) -> list[Tensor]:
        return self.ready.pop()

    def closure(self) -> float:
        for p, g in zip(self.params, self.ready.pop(), strict=True):
            p.grad = g
        return 0.0

    def closures_alone(self, passes: int = 4) -> None:
        """What closures cost in themselves: setting each gradient and dropping it."""
        for _ in range(passes):
            self.closure()
            for p in self.params:
                p.grad = None


def parameters(sizes: Sequence[tuple[int, ...]], device: torch.device | str = "cpu") -> list[Tensor]:
    """Parameters of the given shapes, float32, normal with standard deviation 0.02."""
    options = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    return [torch.nn.Parameter(torch.randn(size, **options).mul_(0.02)) for size in sizes]


def elements(sizes: Sequence[tuple[int, ...]]) -> int:
    return sum(map(math.prod, sizes))


def triad(size: int, device: torch.device) -> Callable[[], object]:
    """a <- b + s c over `size` elements of float32: 12 bytes an element."""
    a, b, c = (torch.ones(size, device=device) for _ in range(3))
    return lambda: torch.add(b, c, alpha=0.5, out=a)


def main_methods(base: str, backends: Sequence[str]) -> Iterator[Implementation]:
    """The base alone, and every method by the baselines and by the first (the fastest) of `backends`."""
    yield Implementation(base, "base", TORCH_FUSED)
    for method in ("sam", "finite_difference", "accelerated"):
        if method != "finite_difference":  # the authors published no code for it
            yield Implementation(base, method, AUTHORS)
        yield Implementation(base, method, FOREACH)
        yield Implementation(base, method, backends[0])
