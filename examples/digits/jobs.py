"""Many runs over worker processes, one thread each: on nets this small a second thread per run costs more than it gives."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch
import torch.multiprocessing as mp
from tqdm import tqdm

from examples.digits.methods import Method
from examples.digits.training import Settings, run

Job = tuple[Method, int, Settings]
BAR = "{desc} {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}{postfix}]"


def default_workers() -> int:
    """Usable processors, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 8)


def accuracy_note(result: dict[str, Any]) -> str:
    """What the progress bar tells of the run that ended last."""
    return f"{result['label']}: {100 * result['test']:.1f} %"


def run_all(
    jobs: Iterable[tuple[Any, ...]],
    workers: int,
    run: Callable[..., dict[str, Any]] = run,
    note: Callable[[dict[str, Any]], str] = accuracy_note,
    weights: Sequence[float] | None = None,
    done: Callable[[dict[str, Any]], object] = lambda result: None,
) -> list[dict[str, Any]]:
    """The results of `run(*job)` in the order of `jobs`, with a progress bar. All runs meet the same conditions.

    Args:
        weights: how long each job is expected to take, in any unit, for the time left; by default all take equally long.
        done: called with each result as soon as it is there, in this process.
    """
    jobs = list(jobs)
    weights = [1.0] * len(jobs) if weights is None else weights
    results: dict[int, dict[str, Any]] = {}
    pool = ProcessPoolExecutor(workers, mp_context=mp.get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,))
    try:
        pending = {pool.submit(run, *job): i for i, job in enumerate(jobs)}
        with tqdm(total=len(jobs), dynamic_ncols=True, smoothing=0.1, bar_format=BAR) as bar:
            share = len(jobs) / (sum(weights) or 1)
            for future in as_completed(pending):
                i = pending[future]
                result = results[i] = future.result()
                done(result)
                bar.set_description_str(f"{len(results)}/{len(jobs)} runs", refresh=False)
                bar.set_postfix_str(note(result), refresh=False)
                bar.update(share * weights[i])
    finally:
        pool.shutdown(cancel_futures=True)
    return [results[i] for i in range(len(jobs))]
