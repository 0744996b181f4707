"""Whole optimizer steps with prepared gradients: every room, flattened or not, against the baselines.

    python -m benchmarks.gpu.steps --out steps.json [--device cuda] [--networks resnet50 ...] [--blocks 3] [--steps 5]

Contestants take turns in blocks: each is built, warmed up, measured for some steps and dropped again, so that a model of a
billion parameters fits; ratios are medians over blocks. Per step, in ms: `queued`, on the GPU with the host ahead of it
(where the launches are more than the driver queues, some host time is in it); `host`, until `step` returns; `wall`, until
its work is done. The closure hands over gradients that are there: `closure alone` is its share of host time.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import shapes
from benchmarks.baselines import AuthorsGAM, ForeachGAM, Settings
from benchmarks.gpu.clock import Clock, launched, rooms_on
from benchmarks.measure import machine, quantiles
from benchmarks.optimizer_only import AUTHORS_BARE, FOREACH, Gradients, fused, parameters, ratio

NETWORKS: dict[str, Callable[[], shapes.Shapes]] = {
    "resnet50": shapes.resnet50,
    "transformer_1b": shapes.transformer_1b,
    "vit_b_32": shapes.vit_b_32,
    "resnet18": shapes.resnet18,
    "tiny": shapes.tiny,
}
COPIES = {AUTHORS_BARE: 15, FOREACH: 12}  # of the model, gradients included, that a contestant holds at most
Contestant = tuple[Callable[[], object], Callable[[], object]]


def contestants(sizes: shapes.Shapes, device: torch.device) -> dict[str, Callable[[], Contestant]]:
    """Name -> a function that builds (prepare, run)."""

    def baseline(kind: Any) -> Contestant:
        params = parameters(sizes, device)
        gradients, optimizer = Gradients(params, 1), kind(params, Settings())
        return gradients.prepare, lambda: optimizer.step(gradients.hand_over)

    def gam(method: str, room: str, flatten: bool) -> Contestant:
        params = parameters(sizes, device)
        return fused(params, Gradients(params, 1), method, room, Settings(), flatten=flatten)

    def torchs_own(kind: type, **options: Any) -> Contestant:
        params = parameters(sizes, device)
        optimizer = kind(params, fused=True, **options)
        for p, g in zip(params, Gradients(params, 1).sources[0], strict=True):
            p.grad = g
        return (lambda: None), optimizer.step

    def closure_alone() -> Contestant:
        gradients = Gradients(parameters(sizes, device), 1)
        return gradients.prepare, lambda: gradients.closures_alone(4)

    entries: dict[str, Callable[[], Contestant]] = {
        AUTHORS_BARE: lambda: baseline(AuthorsGAM),
        FOREACH: lambda: baseline(ForeachGAM),
        "torch SGD, fused": lambda: torchs_own(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-4),
        "torch AdamW, fused": lambda: torchs_own(torch.optim.AdamW, lr=1e-3),
        "closure alone": closure_alone,
    }
    for method in ("finite_difference", "accelerated", "sam"):
        for room in rooms_on(device):
            for flatten in (False, True):
                name = f"{method}, {room}, flatten={flatten}"
                entries[name] = lambda m=method, r=room, f=flatten: gam(m, r, f)
    return entries


def run(sizes: shapes.Shapes, device: torch.device, blocks: int, steps: int, until: float, label: str) -> dict[str, Any]:
    """Rows of every contestant; blocks that would start after `until` (time.monotonic()) are left out, but for the first."""
    clock, elements, entries = Clock(device), sum(map(math.prod, sizes)), contestants(sizes, device)
    rows: dict[str, Any] = {}
    times: dict[str, dict[str, list[float]]] = {}
    for block in tqdm(range(blocks), desc=label):
        if block and time.monotonic() > until:
            break
        for name, build in entries.items():
            if isinstance(rows.get(name), str):
                continue
            copies = COPIES.get(name, 10 if "torch, flatten" not in name else 16)
            if (free := clock.free()) < 4 * elements * copies:
                rows[name] = f"skipped: needs {4 * elements * copies / 2**30:.0f} GiB, {free / 2**30:.0f} are free"
                continue
            measured = times.setdefault(name, {"queued": [], "host": [], "wall": []})
            try:
                launches = measure(clock, build(), steps, measured, count=block == 0)
            except torch.OutOfMemoryError:
                rows[name] = "skipped: out of memory"
                del times[name]
                continue
            rows.setdefault(name, launches)
    for name, measured in times.items():
        rows[name] |= {kind: quantiles(seconds) for kind, seconds in measured.items() if seconds}
        for reference, key in ((AUTHORS_BARE, "authors_over_this"), (FOREACH, "foreach_over_this")):
            if reference in times:
                rows[name][key] = ratio(times[reference]["wall"], measured["wall"])
    return {"tensors": len(sizes), "elements": elements, "contestants": rows}


def measure(
    clock: Clock, contestant: Contestant, steps: int, into: dict[str, list[float]], *, count: bool
) -> dict[str, Any]:
    """Append the seconds of `steps` steps. Returns what one step launches, where that is asked for."""
    prepare, step = contestant
    for _ in range(3):
        prepare()
        step()
    launches: dict[str, Any] = {}
    if count and clock.on_gpu:
        prepare()
        seen = launched(step)
        copies = len(seen["gpu_memcpy"]) + len(seen["gpu_memset"])
        launches = {"kernels_per_step": len(seen["kernel"]), "copies_per_step": copies}
    for _ in range(steps):
        host, wall = clock.host_and_wall(prepare, step)
        into["host"].append(host)
        into["wall"].append(wall)
        if clock.on_gpu:
            into["queued"].append(clock.queued(prepare, step))
    return launches or {"kernels_per_step": None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", type=torch.device, default="cuda")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20.0, help="per network: no further block starts after them")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    for network in arguments.networks:
        until = time.monotonic() + arguments.seconds
        results[network] = run(NETWORKS[network](), arguments.device, arguments.blocks, arguments.steps, until, network)
        arguments.out.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
