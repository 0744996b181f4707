"""Real processes for the distributed tests: a function on every rank of a gloo group on the loopback device.

Processes are forked from a server that has imported torch once, so starting a group takes a fraction of a second.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

TIMEOUT = 240  # seconds until a test of several ranks counts as hung

_PRELOAD = ["pytest", "unittest.mock", "torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch.testing"]
_PRELOAD += ["torch.distributed.checkpoint.state_dict", "torch.nn.parallel", "torch._dynamo", "gam_helpers", "float64_gam"]
multiprocessing.set_forkserver_preload(_PRELOAD)
FORKED = multiprocessing.get_context("forkserver")


def run(world: int, function: Callable, *args: Any, limit: float = TIMEOUT) -> list[Any]:
    """function(rank, *args) on `world` processes; what each returned, by rank.

    Args:
        function: at the top of a module, so that a process can find it by name. limit: seconds until they count as hung.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a rank raised; with its traceback.
        TimeoutError: the ranks did not end.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = torch.multiprocessing.start_processes(
            _rank, (world, folder, function, args), nprocs=world, join=False, start_method="forkserver"
        )
        end = time.monotonic() + limit
        try:
            while not context.join(timeout=1):
                if time.monotonic() > end:
                    raise TimeoutError(f"{function.__name__} on {world} ranks did not end within {limit} s")
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
        return [torch.load(Path(folder, f"result-{rank}"), weights_only=False) for rank in range(world)]


def run_to_their_ends(world: int, function: Callable, *args: Any) -> list[int | None]:
    """As `run`, where ranks may be killed: the exit codes, by rank; negative ones are numbers of signals."""
    with tempfile.TemporaryDirectory() as folder:
        processes = [FORKED.Process(target=_rank, args=(rank, world, folder, function, args)) for rank in range(world)]
        try:
            for process in processes:
                process.start()
            for process in processes:
                process.join(TIMEOUT)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
        return [process.exitcode for process in processes]


def _rank(rank: int, world: int, folder: str, function: Callable, args: tuple) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with group(rank, world, f"{folder}/rendezvous"):
        torch.save(function(rank, *args), Path(folder, f"result-{rank}"))


@contextmanager
def group(rank: int, world: int, path: str, timeout: float = TIMEOUT) -> Iterator[None]:
    """The process group of what runs inside; one inside another takes its place. `path`: a file that is not there yet."""
    if dist.is_initialized():
        dist.destroy_process_group()
    limit = timedelta(seconds=timeout)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world, timeout=limit)
    try:
        dist.barrier()  # a rank that leaves at once would hang up on others that are still connecting
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """A hash of the bits of all tensors."""
    digest = hashlib.sha256()
    for t in tensors:
        digest.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def agree(value: Any) -> bool:
    """Whether all ranks have the same."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return all(v == values[0] for v in values)


def shard_of(rank: int, *tensors: Tensor) -> list[Tensor]:
    """This rank's rows of tensors that all ranks hold: rows rank, rank + world, ..."""
    return [t[rank :: dist.get_world_size()] for t in tensors]


# A network of uneven shards.


def net(dtype=torch.float64, seed=0, hidden=(7, 5)):
    """Rows that do not divide evenly: 7, 5 and 1; over three ranks one of them has no row of the last layer."""
    torch.manual_seed(seed)
    a, b = hidden
    return nn.Sequential(nn.Linear(3, a), nn.Tanh(), nn.Linear(a, b), nn.Tanh(), nn.Linear(b, 1)).to(dtype)


def shard(model, **options):
    for layer in (model[0], model[2]):
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def loss_of(model, x, y):
    return lambda: (model(x) - y).square().mean()


def full(params):
    return [p.detach().full_tensor() if isinstance(p, DTensor) else p.detach() for p in params]
