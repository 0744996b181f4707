"""One run of a client, with its base optimizer alone or with FusedGAM in its place, and many runs over processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from gam_fused import FusedGAM
from studies.clients.catalogue import CLIENTS
from studies.clients.client import Batch, Client
from studies.clients.report import label

Options = dict[str, Any] | None  # FusedGAM's, or None: the base optimizer alone
Job = tuple[str, Options, int, int | None]


def run(name: str, options: Options, seed: int, steps: int | None = None) -> dict[str, Any]:
    """Trains the client `name`. `seed` decides weights and batches for all options.

    Args:
        steps: None means the client's own.

    Returns:
        JSON-ready: "start" and "loss", the loss on the held-out data in eval mode, before and after training.
    """
    client = CLIENTS[name]
    steps = client.steps if steps is None else steps
    with torch.random.fork_rng(devices=[]), _double_backward(options):
        torch.manual_seed(seed)
        model = client.model()
        optimizer = _optimizer(client, model, options)
        start = held_out_loss(client, model)
        model.train()
        for batch in islice(client.batches(seed), steps):
            train_step(model, optimizer, client.loss, batch, options)
        final = held_out_loss(client, model)
    skipped = int(getattr(optimizer, "skipped_steps", 0))
    return {
        "client": name,
        "options": options,
        "seed": seed,
        "steps": steps,
        "start": start,
        "loss": final,
        "skipped_steps": skipped,
    }


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[nn.Module, Batch], Tensor],
    batch: Batch,
    options: Options,
) -> None:
    """One step on a batch, as each optimizer wants it."""
    if options is None:
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    elif "flatness_fraction" in options:  # it cuts the batch, so it must be given it
        optimizer.step(lambda part: loss(model, part), batch)
    else:
        optimizer.step(lambda: loss(model, batch))


@torch.no_grad()
def held_out_loss(client: Client, model: nn.Module) -> float:
    """Of the whole held-out data, in eval mode."""
    model.eval()
    return float(client.loss(model, client.held_out()))


def run_all(jobs: Sequence[Job], workers: int) -> list[dict[str, Any]]:
    """The results of `run(*job)` in the order of `jobs`, with a progress bar; one thread each."""
    context = mp.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = [pool.submit(run, *job) for job in jobs]
        try:
            bar = tqdm(as_completed(futures), total=len(jobs), unit="run", dynamic_ncols=True)
            for future in bar:
                done = future.result()
                bar.set_postfix_str(f"{done['client']}, {label(done['options'])}: {done['loss']:.3g}")
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return [future.result() for future in futures]


def _optimizer(client: Client, model: nn.Module, options: Options) -> torch.optim.Optimizer:
    if options is None:
        return client.base(model.parameters(), **client.base_options)
    return FusedGAM(model, client.base, **options, **client.base_options)


def _double_backward(options: Options) -> Any:
    # `exact` differentiates twice, for which the fused attention kernels have no formula: plain matrix products have.
    exact = options is not None and options.get("method") == "exact"
    return sdpa_kernel(SDPBackend.MATH) if exact else nullcontext()
