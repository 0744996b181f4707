"""One run of the study: train a network as a contender does, judge it on validation or test data."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gam_fused.flatness import hessian_eigenvalues
from studies.defaults.contender import Contender
from studies.defaults.networks import NETWORKS, Data, Network
from studies.defaults.steps import loss, stepper

CHUNK = 256  # samples judged at a time
CURVATURE_SAMPLES = 500  # that the largest Hessian eigenvalue is of


class Job(NamedTuple):
    """One run. `split` is "validation" or "test"; `limit` is the most steps it takes (None: as many as the network says)."""

    network: str
    contender: Contender
    seed: int
    split: str
    limit: int | None = None

    @property
    def digest(self) -> str:
        """Equal for equal options of everything, so that a recorded run need not be run again."""
        facts = [self.network, NETWORKS[self.network].settings(), asdict(self.contender), self.seed, self.split, self.limit]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def run(network: str, contender: Contender, seed: int, split: str, limit: int | None = None) -> dict[str, Any]:
    """Trains once; `seed` decides wrong labels, starting weights and order of batches for all contenders alike.

    Returns:
        What was run, and JSON-ready numbers: "value", the network's metric; "failed", see `Network.is_failure`; "loss", the
        mean training loss of the last tenth of the steps; "passes" per step and "cost" of the training, by count; "step_ms",
        the median time of a step, "training_s", the time of all of them, and "steps".
    """
    record = once(NETWORKS[network], contender, seed, split, limit)
    return {"digest": Job(network, contender, seed, split, limit).digest, "network": network, **record}


def once(net: Network, contender: Contender, seed: int, split: str, limit: int | None = None) -> dict[str, Any]:
    """As `run`, of any network."""
    start = time.perf_counter()
    data, model = net.load(seed, split == "validation"), net.model(seed)
    optimizer = contender.optimizer(model, net)
    # Attention by plain products for all: other kernels have no second derivative, which `exact` and eigenvalues need.
    with sdpa_kernel(SDPBackend.MATH):
        losses, times = train(net, contender, data, model, optimizer, seed, limit)
        value = judge(net, model, data)
        eigenvalue = largest_eigenvalue(model, data) if net.eigenvalue and split == "test" else None
    return {
        **asdict(contender),
        "label": contender.label,
        "seed": seed,
        "split": split,
        "value": value,
        "failed": net.is_failure(value, data.judged_targets),
        "loss": statistics.fmean(losses[-max(1, len(losses) // 10) :]),
        "passes": contender.passes,
        "cost": contender.cost,
        "eigenvalue": eigenvalue,
        "step_ms": 1e3 * statistics.median(times),
        "training_s": sum(times),
        "steps": len(times),
        "seconds": time.perf_counter() - start,
        "skipped_steps": int(getattr(optimizer, "skipped_steps", 0)),
    }


def train(
    net: Network,
    contender: Contender,
    data: Data,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    seed: int,
    limit: int | None,
) -> tuple[list[float], list[float]]:
    """The training loss and the seconds of every step."""
    batch_size = contender.batch_size or net.batch_size
    steps = number_of_steps(net, contender, len(data.inputs))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps, net.warmup_steps))
    step = stepper(contender, model, optimizer)
    losses, times = [], []
    model.train()
    for index, _ in zip(batches(len(data.inputs), batch_size, seed), range(min(steps, limit or steps)), strict=False):
        x, y = data.inputs[index], data.targets[index]
        start = time.perf_counter()
        losses.append(step(x, y))
        times.append(time.perf_counter() - start)
        schedule.step()
    return torch.stack(losses).tolist(), times


def number_of_steps(net: Network, contender: Contender, samples: int) -> int:
    """As many as the network's epochs or steps are at this contender's batch size and length."""
    batch_size = contender.batch_size or net.batch_size
    if net.epochs:
        return round(contender.length * net.epochs * math.ceil(samples / batch_size))
    return round(contender.length * net.steps * net.batch_size / batch_size)


def rate(step: int, steps: int, warmup: int) -> float:
    """Times the learning rate: a straight line up during the warm-up, then a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def batches(samples: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Indices of batches, epoch after epoch without an end, each in another random order."""
    random = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(samples, generator=random).split(batch_size)


@torch.no_grad()
def judge(net: Network, model: nn.Module, data: Data) -> float:
    """The metric on the judged data, in eval mode."""
    model.eval()
    total = 0.0
    for x, y in zip(data.judged_inputs.split(CHUNK), data.judged_targets.split(CHUNK), strict=True):
        if net.metric == "loss":
            total += float(loss(model, x, y)) * len(x)
        else:
            total += float((model(x).argmax(dim=-1) == y).sum())
    return total / len(data.judged_inputs)


def largest_eigenvalue(model: nn.Module, data: Data) -> float:
    """Of the Hessian of the loss on the first training samples, in eval mode; NaN where the curvature is not finite."""
    model.eval()
    x, y = data.inputs[:CURVATURE_SAMPLES], data.targets[:CURVATURE_SAMPLES]
    try:
        return float(hessian_eigenvalues(lambda: loss(model, x, y), model.parameters(), tolerance=1e-2))
    except ValueError:
        return math.nan
