"""All-reduces and their bytes in a training step under DistributedDataParallel, on 1, 2 and 4 processes.

Counted, not computed: the profiler sees every all-reduce of the gloo backend, DDP's own among them. No times: those of
processes that share one machine's cores tell little of a cluster.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from benchmarks.clock import traced
from benchmarks.networks import batch, classifier
from gam_fused import FusedGAM

SGD = {"lr": 0.01, "momentum": 0.9}
CONTESTANTS: dict[str, dict[str, Any] | None] = {
    "SGD": None,
    "SAM, global": {"method": "sam", "perturb_sync": "global"},
    "SAM, local": {"method": "sam", "perturb_sync": "local"},
    "GAM, global": {"method": "finite_difference", "perturb_sync": "global"},
    "GAM, local": {"method": "finite_difference", "perturb_sync": "local"},
}
BYTES = {"float": 4, "double": 8, "c10::BFloat16": 2, "c10::Half": 2, "long int": 8, "int": 4, "unsigned char": 1, "bool": 1}
IMAGES = 2  # per process: what is counted does not depend on it


def measure(network: str, worlds: Sequence[int], limit: float = 120.0) -> dict[str, Any]:
    """{"N processes": {contestant: {"all_reduces", "bytes", "parameters"}}} of one step, as rank 0 sees it.

    A world that fails or does not end within `limit` seconds is {"failed": why}.
    """
    return {f"{world} processes": _on(world, network, limit) for world in worlds}


def _on(world: int, network: str, limit: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        context = mp.spawn(_rank, (world, network, folder), nprocs=world, join=False)
        end = time.monotonic() + limit
        try:
            while not context.join(timeout=1):
                if time.monotonic() > end:
                    return {"failed": f"not done after {limit:.0f} s"}
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            return {"failed": str(error).strip().splitlines()[-1]}
        finally:
            for process in context.processes:
                process.kill()
        return json.loads(Path(folder, "counts.json").read_text())


def _rank(rank: int, world: int, network: str, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ["KINETO_LOG_LEVEL"] = "9"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    rows: dict[str, Any] = {}
    for name, options in CONTESTANTS.items():
        model = DistributedDataParallel(classifier(network, torch.device("cpu")))
        step = _step(model, options, *batch(network, IMAGES, torch.device("cpu")))
        for _ in range(2):  # DDP arranges its blocks after the first pass
            step()
        elements = sum(p.numel() for p in model.parameters())
        events = traced(lambda step=step: (step(), time.sleep(0.2)), record_shapes=True)  # gloo's threads record afterwards
        sent = [event["args"] for event in events if event.get("name") == "gloo:all_reduce"]
        rows[name] = {"all_reduces": len(sent), "bytes": sum(map(_bytes, sent)), "parameters": elements}
    if rank == 0:
        Path(folder, "counts.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def _step(model: torch.nn.Module, options: dict[str, Any] | None, *data: torch.Tensor) -> Callable[[], Any]:
    images, labels = data
    if options is not None:
        gam = FusedGAM(model, torch.optim.SGD, **options, **SGD)
        return functools.partial(gam.step, lambda: cross_entropy(model(images), labels))
    optimizer = torch.optim.SGD(model.parameters(), **SGD)

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def _bytes(arguments: dict[str, Any]) -> int:
    """Of the tensors of an all-reduce, from the profiler's "Input Dims" and "Input type"."""
    pairs = zip(arguments["Input Dims"], arguments["Input type"], strict=True)
    return sum(torch.Size(shape).numel() * BYTES[kind] for shape, kind in pairs if kind)
