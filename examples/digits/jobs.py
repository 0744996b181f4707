"""Many runs over worker processes, one thread each: on nets this small a second thread per run costs more than it gives."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch
import torch.multiprocessing as mp
from tqdm import tqdm

from examples.digits.methods import Method
from examples.digits.training import Settings, run

Job = tuple[Method, int, Settings]


def default_workers() -> int:
    """Usable processors, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 8)


def run_all(jobs: Iterable[Job], workers: int) -> list[dict[str, Any]]:
    """The results of `run(*job)` in the order of `jobs`, with a progress bar. All runs meet the same conditions."""
    jobs = list(jobs)
    results: dict[int, dict[str, Any]] = {}
    pool = ProcessPoolExecutor(workers, mp_context=mp.get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,))
    try:
        pending = {pool.submit(run, *job): i for i, job in enumerate(jobs)}
        with tqdm(total=len(jobs), unit="run", dynamic_ncols=True, smoothing=0.1) as bar:
            for future in as_completed(pending):
                result = results[pending[future]] = future.result()
                bar.set_postfix_str(f"{result['label']}: {100 * result['test']:.1f} %")
                bar.update()
    finally:
        pool.shutdown(cancel_futures=True)
    return [results[i] for i in range(len(jobs))]
