"""Two networks trained to the end by the base optimizer, SAM, GAM at its defaults and GAM on every 10th step.

    python -m benchmarks.gpu.training --out folder [--device cuda] [--seconds 300] [--rehearse]

ResNet-18 on the digits, upscaled, shifted at random and with a fifth of the training labels wrong, judged on the true ones
of others; a character GPT on Python's source text, judged by its loss on unseen text. Seed after seed, until the time is
used; below `FULL` seconds runs are a quarter as long. Writes <machine>.json after every run. Nothing is tuned: it shows how
the defaults fare on networks that a GPU is for, and how long they take; `studies.defaults` compares tuned settings.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from benchmarks.gpu.digits import noisy, upscaled
from benchmarks.machine import machine, slug
from benchmarks.networks import classifier
from gam_fused import FusedGAM
from studies.defaults.networks import gpt
from studies.defaults.training import batches, rate

FULL = 150  # seconds, from which runs have their full length
SEEDS = 5
SHIFT = 3  # pixels
CONTENDERS: dict[str, tuple[dict[str, Any] | None, float]] = {  # options of FusedGAM, and passes in a step
    "base": (None, 1),
    "SAM": ({"method": "sam"}, 2),
    "GAM": ({}, 4),
    "GAM, every 10th step": ({"interval": 10}, 1.3),
}


class Task(NamedTuple):
    """A network, its data and its base optimizer.

    Attributes:
        build: makes the network of a seed.
        data: of a seed: inputs and targets of training, and those it is judged on.
        metric: "accuracy" or "loss".
        augment: of a mini-batch's inputs, by a generator on the device.
    """

    build: Callable[[int, torch.device], nn.Module]
    data: Callable[[int, torch.device], tuple[Tensor, Tensor, Tensor, Tensor]]
    metric: str
    base: type[torch.optim.Optimizer]
    options: dict[str, Any]
    batch: int
    steps: int
    augment: Callable[[Tensor, torch.Generator], Tensor]


def shifted(images: Tensor, random: torch.Generator) -> Tensor:
    """All images of a batch by the same random shift."""
    down, right = torch.randint(2 * SHIFT + 1, (2,), generator=random).tolist()
    height, width = images.shape[-2:]
    return pad(images, [SHIFT] * 4, mode="replicate")[..., down : down + height, right : right + width]


def _digits(side: int) -> Callable[[int, torch.device], tuple[Tensor, Tensor, Tensor, Tensor]]:
    def data(seed: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        s = noisy(seed)
        inputs, judged = (upscaled(s, images, side, device) for images in (s.images, s.test_images))
        return inputs, s.labels.to(device), judged, s.test_labels.to(device)

    return data


def _text(seed: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d = gpt.data(seed, validation=False)
    inputs, targets, judged, wanted = (part.to(device) for part in d)
    return inputs, targets, judged, wanted


def _resnet(seed: int, device: torch.device) -> nn.Module:
    del seed  # the weights are the same; the wrong labels and the order of the data are not
    return classifier("resnet18_cifar", device)


def _gpt(seed: int, device: torch.device) -> nn.Module:
    return gpt.CharacterGPT(seed, width=256, depth=6, heads=8).to(device)


TASKS = {
    "digits, ResNet-18": Task(
        _resnet,
        _digits(32),
        "accuracy",
        torch.optim.SGD,
        {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4},
        64,
        480,
        shifted,
    ),
    "characters, GPT": Task(
        _gpt, _text, "loss", torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.1}, 128, 1000, lambda inputs, random: inputs
    ),
}
TINY = {
    "digits": TASKS["digits, ResNet-18"]._replace(
        build=lambda seed, device: nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 10)), data=_digits(8), steps=8
    ),
    "characters": TASKS["characters, GPT"]._replace(
        build=lambda seed, device: gpt.CharacterGPT(seed, width=16, depth=1), steps=8, batch=4
    ),
}


def run(task: Task, contender: str, seed: int, steps: int, device: torch.device) -> dict[str, Any]:
    """Train and judge."""
    options, passes = CONTENDERS[contender]
    inputs, targets, judged, wanted = task.data(seed, device)
    model = task.build(seed, device).train()
    kind: Any = task.base
    optimizer = (
        kind(model.parameters(), **task.options) if options is None else FusedGAM(model, kind, **options, **task.options)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps, warmup=steps // 10))
    random = torch.Generator().manual_seed(seed)

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())

    losses = []
    _wait(device)
    start = time.perf_counter()
    for index, _ in zip(batches(len(inputs), task.batch, seed), range(steps), strict=False):
        index = index.to(device)
        batch = task.augment(inputs[index], random), targets[index]
        if options is None:
            optimizer.zero_grad()
            value = loss(batch)
            value.backward()
            optimizer.step()
        else:
            value = optimizer.step(lambda batch=batch: loss(batch))
        losses.append(value.detach())
        schedule.step()
    _wait(device)
    seconds = time.perf_counter() - start
    found = {"steps": steps, "passes": passes, "seconds": seconds, "metric": task.metric}
    last = torch.stack(losses[-max(steps // 20, 1) :]).mean().item()
    return found | {"training_loss": last, "judged": judge(task, model, judged, wanted)}


@torch.no_grad()
def judge(task: Task, model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    model.eval()
    logits = torch.cat([model(part).flatten(0, -2) for part in inputs.split(512)])
    if task.metric == "loss":
        return float(cross_entropy(logits, targets.flatten()))
    return float((logits.argmax(-1) == targets.flatten()).float().mean())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def turns(tasks: dict[str, Task], seeds: int) -> Iterator[tuple[int, str, str]]:
    """Seed, task and contender of every run, so that what a time limit leaves is complete."""
    return ((seed, task, contender) for seed in range(seeds) for task in tasks for contender in CONTENDERS)


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.training", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", type=torch.device, default="cuda")
    parser.add_argument("--seconds", type=float, default=600, help="after which no further run begins")
    parser.add_argument("--rehearse", action="store_true", help="tiny networks, a few steps")
    options = parser.parse_args(given)
    end = time.monotonic() + options.seconds
    tasks, seeds = (TINY, 1) if options.rehearse else (TASKS, SEEDS)
    file = options.out / f"{slug(machine(options.device))}.json"
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    found: list[dict[str, Any]] = []
    for seed, name, contender in turns(tasks, seeds):
        if time.monotonic() > end:
            print("no time left for more")
            break
        steps = tasks[name].steps // (1 if options.seconds >= FULL or options.rehearse else 4)
        row = {"task": name, "contender": contender, "seed": seed}
        found.append(row | run(tasks[name], contender, seed, steps, options.device))
        file.write_text(json.dumps({"trained": found}))
        print(f"{name}, {contender}: {found[-1]['judged']:.4f} after {found[-1]['seconds']:.1f} s", flush=True)


if __name__ == "__main__":
    main()
