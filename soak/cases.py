"""Random lists of tensors, groups, options, and gradients that are missing: what a step of FusedGAM may meet."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from float64_gam import Gam64
from gam_helpers import METHODS, PASSES, SETTINGS
from hypothesis import strategies as st
from torch import Tensor

from gam_fused import FusedGAM

SHAPES = [(), (1,), (0,), (3,), (2, 0), (7,), (5, 3), (2, 3, 4, 5), (33, 31), (4095,), (4097,), (2, 4096)]
LARGE = [(40_000,), (150, 211), (70_001,)]
ORDERS = ["contiguous", "transposed", "misaligned", "channels_last"]
BASES = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
WITH_ORACLE = ("finite_difference", "exact", "gradient_penalty")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RUNS = Counter[str]()  # optimizers that were run, by backend


@dataclass
class Case:
    """One optimizer's parameters, groups, options and losses. Values follow from `seed`.

    Attributes:
        tensors: shape and order in memory of each. groups: each tensor's. group_options: each group's.
        missing: pairs (tensor, pass) that get no gradient.
    """

    tensors: list[tuple[tuple[int, ...], str]]
    groups: list[int]
    group_options: list[dict]
    method: str
    base: str
    options: dict
    missing: set = field(default_factory=set)
    dtype: torch.dtype = torch.float64
    seed: int = 0
    scale: float = 1.0  # of the loss

    def values(self, seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1000 * self.seed + seed)
        return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape, _ in self.tensors]

    def parameters(self) -> list[Tensor]:
        pairs = zip(self.values(0), self.tensors, strict=True)
        return [laid_out(value.to(self.dtype), order).requires_grad_() for value, (_, order) in pairs]

    def param_groups(self, params: list[Tensor], order: list[int] | None = None) -> list[dict]:
        """`order`: in which tensors are listed inside their groups."""
        order = order or list(range(len(params)))
        members = [[params[i] for i in order if self.groups[i] == g] for g in range(len(self.group_options))]
        pairs = zip(members, self.group_options, strict=True)
        return [{"params": tensors, **options} for tensors, options in pairs if tensors]

    def loss(self, params: list[Tensor], k: int) -> Tensor:
        """Smooth, bounded curvature, every tensor coupled to every other; in float64, whatever the weights are held in."""
        total = coupled = torch.zeros((), dtype=torch.float64)
        for i, (p, w, v) in enumerate(zip(params, self.values(1), self.values(2), strict=True)):
            if (i, k) not in self.missing:
                total = total + (w * torch.sin(p.double() + v)).sum()
                coupled = coupled + (v * torch.tanh(p.double())).sum() / max(p.numel(), 1) ** 0.5
        return self.scale * (total + 0.25 * coupled * coupled)

    def optimizer(self, params: list[Tensor], backend: str, **changes: Any) -> FusedGAM:
        groups = changes.pop("groups", None) or self.param_groups(params)
        settings = {**SETTINGS[self.method], **self.options, **changes}
        return FusedGAM(groups, BASES[self.base], method=self.method, backend=backend, lr=0.05, **settings)

    def run(self, backend: str, steps: int = 3, threads: int = 1, groups: Any = None, **changes: Any) -> list[Tensor]:
        """The parameters after some steps. `groups`: makes param groups of the parameters."""
        RUNS[backend] += 1
        params = self.parameters()
        if groups is not None:
            changes["groups"] = groups(params)
        optimizer, before = self.optimizer(params, backend, **changes), torch.get_num_threads()
        calls = 0

        def closure() -> Tensor:
            nonlocal calls
            torch.set_num_threads(1)  # torch's own sums depend on it
            for p in params:
                p.grad = None
            loss = self.loss(params, calls)
            calls += 1
            if self.method != "exact" and loss.requires_grad:
                loss.backward()
            torch.set_num_threads(threads)
            return loss

        try:
            for _ in range(steps):
                calls = 0
                optimizer.step(closure)
        finally:
            torch.set_num_threads(before)
        return [p.detach() for p in params]

    def exact(self, steps: int = 3) -> list[Tensor]:
        """The same by `Gam64`, in the order of `tensors`."""
        params = self.parameters()
        order = [i for g in range(len(self.group_options)) for i in range(len(params)) if self.groups[i] == g]
        settings = {**SETTINGS[self.method], **self.options}
        common = {"lr": 0.05, "rho": settings.pop("rho")}
        groups = [{**common, **g} for g in self.param_groups(params)]
        gam = Gam64(groups, method=self.method, base=self.base, **settings)
        place = {i: at for at, i in enumerate(order)}
        for _ in range(steps):
            gam.step(lambda p, k: self.loss([p[place[i]] for i in range(len(p))], k))
        return [gam.theta[place[i]].detach() for i in range(len(params))]


def laid_out(value: Tensor, order: str) -> Tensor:
    """The same values, lying in memory in another way where the shape allows it."""
    if order == "transposed" and value.dim() >= 2:
        return value.transpose(0, -1).contiguous().transpose(0, -1)
    if order == "channels_last" and value.dim() == 4:
        return value.contiguous(memory_format=torch.channels_last)
    if order == "misaligned":
        return torch.empty(value.numel() + 1, dtype=value.dtype)[1:].view(value.shape).copy_(value)
    return value.clone()


def base_options(base: str) -> st.SearchStrategy[dict]:
    decay = st.sampled_from([0.0, 0.01, 0.2])
    if base == "sgd":
        momenta = st.sampled_from([(0.0, 0.0, False), (0.9, 0.0, False), (0.9, 0.4, False), (0.8, 0.0, True)])
        return st.builds(
            lambda m, w: {"momentum": m[0], "dampening": m[1], "nesterov": m[2], "weight_decay": w}, momenta, decay
        )
    # A large eps: where a gradient is almost 0, Adam's direction would tell of rounding alone.
    return st.builds(lambda w, a: {"weight_decay": w, "amsgrad": a, "eps": 1e-3}, decay, st.booleans())


@st.composite
def options_of(draw: Any, method: str) -> dict:
    options: dict[str, Any] = {"adaptive": draw(st.booleans())}
    if draw(st.booleans()):
        options["max_grad_norm"] = draw(st.sampled_from([0.05, 1.0, 100.0]))
    if method in WITH_ORACLE:
        if draw(st.booleans()):
            options |= {"max_ratio": draw(st.sampled_from([0.0, 0.02, 0.5])), "alpha": draw(st.sampled_from([0.7, 100.0]))}
        if draw(st.booleans()):
            options |= {"oracle": "sam", "sam_rho": draw(st.sampled_from([0.05, 0.2]))}
    if method == "accelerated":
        options |= draw(st.sampled_from([{}, {"gamma": 0.0}, {"alpha": (0.4, 0.9), "beta": (1.0, 0.3)}]))
    return options


@st.composite
def cases(draw: Any, dtypes: tuple = (torch.float64,), large: bool = False) -> Case:
    method, base = draw(st.sampled_from(METHODS)), draw(st.sampled_from(sorted(BASES)))
    shapes = st.sampled_from(LARGE + SHAPES if large else SHAPES)
    tensors = draw(st.lists(st.tuples(shapes, st.sampled_from(ORDERS)), min_size=1, max_size=8))
    tensors.append(((11, 3), "contiguous"))  # of a size that no norm is 0, in group 0, and never missing
    count = draw(st.integers(1, 3))
    groups = [*draw(st.lists(st.integers(0, count - 1), min_size=len(tensors) - 1, max_size=len(tensors) - 1)), 0]
    options = draw(options_of(method))
    group_options = [draw(base_options(base)) for _ in range(count)]
    for g in group_options:
        g |= {"rho": draw(st.sampled_from([0.05, 0.1, 0.3])), "lr": draw(st.sampled_from([0.01, 0.05]))}
    for g in group_options[1:]:
        g |= {"perturb": draw(st.booleans()), "maximize": draw(st.booleans())}
    # An oracle's own pass is another one here than there, so with one a gradient is missing always or never.
    passes = list(range(PASSES[method] + 1))
    pairs = draw(st.sets(st.tuples(st.integers(0, len(tensors) - 2), st.sampled_from(passes)), max_size=6))
    if "oracle" in options:
        pairs = {(i, k) for i, _ in pairs for k in passes}
    seed, dtype = draw(st.integers(0, 10_000)), draw(st.sampled_from(dtypes))
    return Case(tensors, groups, group_options, method, base, options, pairs, dtype, seed)
