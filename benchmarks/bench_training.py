"""Training steps: a network's forward and backward alone, with its base optimizer, with SAM, with GAM by each method.

Random images; weights start anew for every contestant. How much a step takes beyond its passes is measured within steps, the
whole over the forwards and backwards in it, since two contestants are some seconds of the machine's drift apart. Peak
memory is what the optimizer's construction and its first two steps hold at a time beyond the weights and their copy,
tensors only; where a graph is captured, with what capturing holds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from benchmarks.cases import Case, Plan, blocks_of
from benchmarks.clock import Clock, Moment, on_device
from benchmarks.graphed import graphed
from benchmarks.networks import batch, classifier
from gam_fused import FusedGAM
from gam_fused.graphs import capture_step

Interval = tuple[Moment | float, Moment | float]
FORWARD_BACKWARD, WINDOW = "forward and backward", 10
GAM = {  # options, and passes in whole batches
    "SAM": ({"method": "sam"}, 2),
    "GAM, finite_difference": ({"method": "finite_difference"}, 4),
    "GAM, accelerated": ({"method": "accelerated"}, 4),
    "SAM, a quarter": ({"method": "sam", "flatness_fraction": 1 / 4}, 1.5),
    "GAM, an eighth": ({"method": "finite_difference", "flatness_fraction": 1 / 8}, 1.5),
    f"GAM, every {WINDOW}th step": ({"method": "finite_difference", "interval": WINDOW}, (WINDOW + 3) / WINDOW),
    "GAM, exact": ({"method": "exact"}, None),  # its passes are differentiated twice
}
EAGER_ONLY = (f"GAM, every {WINDOW}th step", "GAM, exact")
CONTESTANTS = (FORWARD_BACKWARD, "base", *GAM)
MAIN = (FORWARD_BACKWARD, "base", "SAM", "GAM, finite_difference")


class Setting(NamedTuple):
    """What is trained, and how; `brief`: few steps of few contestants, where a step takes many seconds."""

    network: str
    images: int
    precision: str
    mode: str
    brief: bool = False

    def steps(self, clock: Clock) -> int:
        """Steps that are timed together: a GPU is waited for once in so many that this does not count."""
        return (WINDOW if self.network == "resnet18_cifar" else 3) if clock.on_gpu else 1

    def contestants(self) -> list[str]:
        names = MAIN if self.brief else CONTESTANTS
        return [name for name in names if self.mode == "eager" or name not in EAGER_ONLY]


ON_CPU = [
    *(Setting("digits", 64, "fp32", "eager"), Setting("resnet18_cifar", 16, "fp32", "eager")),
    *(Setting("vit_s_32", 8, "fp32", "eager"), Setting("digits", 64, "fp32", "compiled")),
    *(Setting("resnet18_cifar", 128, "fp32", "eager", brief=True), Setting("vit_s_32", 32, "fp32", "eager", brief=True)),
    *(Setting("vit_s_32", 8, "bf16", "eager"), Setting("resnet18_cifar", 16, "bf16", "eager")),
    *(Setting("vit_s_32", 8, "fp32", "compiled"), Setting("resnet18_cifar", 16, "fp32", "compiled")),
    *(Setting("vit_b_32", 8, "fp32", "eager"), Setting("resnet50", 4, "fp32", "eager")),
]
ON_GPU = [
    Setting(network, images, precision, mode)
    for mode in ("eager", "graphed", "compiled")
    for precision in ("tf32", "bf16")
    for network, images in (("resnet18_cifar", 128), ("resnet50", 64), ("vit_b_32", 128))
]


def cases(plan: Plan) -> list[Case]:
    """The important settings first."""
    on_gpu = plan.device.type == "cuda"
    settings = ON_GPU if on_gpu else ON_CPU
    if plan.rehearse:
        settings = [Setting("digits", 8, "bf16", "eager")]
    result = []
    for s in settings:
        cell = f"{s.network}, {s.images} images, {s.precision}, {s.mode}"
        result += blocks_of(cell, dict.fromkeys(s.contestants(), s), plan, blocks=1 if on_gpu else None)
    return result


def bench_training(benchmark: Any, case: Case, plan: Plan, clock: Clock) -> None:
    setting: Setting = case.what
    job = _job(setting, plan.device)
    clock.free()  # drops what the contestant before has left
    job.reset()
    options, passes = GAM.get(case.contestant, ({}, 1))
    steps = WINDOW if "interval" in options else setting.steps(clock)
    facts: dict[str, Any] = {**setting._asdict(), "passes": passes, "steps": steps, "parameters": job.elements}
    job.forward_backward()  # compiles
    if case.block == 0:
        facts["peak_bytes"] = clock.peak(lambda: _repeat(job.step(case.contestant, options), 2))
        job.reset()
    step = job.step(case.contestant, options)
    step()
    rounds = 1 if setting.brief else max(3 // steps, 1)
    rounds = 2 if plan.rehearse else 3 if clock.on_gpu else 10 if setting.network == "digits" else rounds
    if setting.mode != "graphed" and case.contestant not in (FORWARD_BACKWARD, "GAM, exact"):
        facts["over_passes"] = [job.over_passes(lambda: _repeat(step, steps)) for _ in range(rounds)]
    benchmark.extra_info.update(facts)
    benchmark.pedantic(_repeat, args=(step, steps), rounds=rounds)


def _repeat(step: Callable[[], object], times: int) -> None:
    for _ in range(times):
        step()


class Job:
    """A network with its data, trained from the same weights by one contestant after the other."""

    def __init__(self, setting: Setting, device: torch.device):
        self.setting, self.device = setting, device
        torch.set_float32_matmul_precision("high" if setting.precision == "tf32" else "highest")
        self.model = classifier(setting.network, device)
        self.images, self.labels = batch(setting.network, setting.images, device)
        torch._dynamo.reset()  # shapes of one network are static, whatever another's were
        self.forward: nn.Module = torch.compile(self.model, dynamic=False) if setting.mode == "compiled" else self.model
        self.start = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.elements = sum(p.numel() for p in self.model.parameters())
        self.passes: list[Interval] | None = None  # begin and end of each, where they are asked for

    def reset(self) -> None:
        self.model.load_state_dict(self.start)
        self.model.zero_grad()

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.setting.precision == "bf16"):
            return cross_entropy(self.forward(images), labels)

    def twice_differentiable_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """The same with torch's own arithmetic for attention: its fused kernels have no second derivative."""
        with sdpa_kernel(SDPBackend.MATH):
            return self.loss(images, labels)

    def forward_backward(self) -> None:
        self.one_pass()
        self.model.zero_grad()

    def one_pass(self, images: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """A forward and its backward, as closures run them: of all images, or of some."""
        start = on_device() if self.passes is not None else 0.0
        loss = self.loss(self.images if images is None else images, self.labels if labels is None else labels)
        loss.backward()
        if self.passes is not None:
            self.passes.append((start, on_device()))
        return loss

    def over_passes(self, run: Callable[[], object]) -> float:
        """The time of `run` over that of the passes in it."""
        self.passes = passes = []
        start = on_device()
        run()
        whole = on_device() - start
        self.passes = None
        return whole / sum(end - begin for begin, end in passes)

    def step(self, contestant: str, options: dict[str, Any]) -> Callable[[], object]:
        """A training step of `contestant`, its optimizer built here."""
        graph = self.setting.mode == "graphed"
        if contestant == FORWARD_BACKWARD:
            return graphed(self.forward_backward) if graph else self.forward_backward
        kind, base = torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4}
        if self.setting.network.startswith("vit"):
            kind, base = torch.optim.AdamW, {"lr": 1e-5, "weight_decay": 1e-2}
        if contestant == "base":
            capturable = {"capturable": True} if graph and kind is torch.optim.AdamW else {}
            optimizer = kind(self.model.parameters(), fused=True, **base, **capturable)
            return graphed(lambda: self._base_step(optimizer)) if graph else (lambda: self._base_step(optimizer))
        gam = FusedGAM(self.model, kind, **options, **base)
        if graph:
            captured = capture_step(gam, self.loss, (self.images, self.labels))
            return lambda: captured(self.images, self.labels)
        if options["method"] == "exact":
            return lambda: gam.step(lambda: self.twice_differentiable_loss(self.images, self.labels))
        return lambda: gam.step(lambda some: self.one_pass(*some), (self.images, self.labels))

    def _base_step(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        self.one_pass()
        optimizer.step()


@lru_cache(maxsize=1)
def _job(setting: Setting, device: torch.device) -> Job:
    return Job(setting, device)
