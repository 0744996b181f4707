"""Which runs there are, in which order, and what they are expected to take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from studies.defaults.choose import chosen
from studies.defaults.contender import DEFAULTS, GIVEN, Contender
from studies.defaults.contenders import fixed, grid
from studies.defaults.networks import NETWORKS, Network
from studies.defaults.steps import loss
from studies.defaults.training import Job, batches, number_of_steps

FIRST_TUNING_SEED = 100  # the runs on test data have seeds 0, 1, ...: other wrong labels and other weights
# For the time left only. A pass that sees no samples would take this part of one with a whole batch; an eigenvalue takes
# about as long as these passes.
FIXED_PART = 0.15
EIGENVALUE_PASSES = 300


def tuning(networks: Iterable[str], quick: bool = False, limit: int | None = None) -> list[Job]:
    """Runs on validation data. `quick`: one seed of the first contender of each kind."""
    jobs = []
    for name in networks:
        contenders = _first_of_kinds(grid(NETWORKS[name])) if quick else grid(NETWORKS[name])
        seeds = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + (1 if quick else NETWORKS[name].tuning_seeds))
        jobs += [Job(name, contender, seed, "validation", limit) for seed, contender in product(seeds, contenders)]
    return _in_order(jobs)


def reported(
    networks: Iterable[str], tuned: Sequence[dict[str, Any]], seeds: int | None = None, limit: int | None = None
) -> list[Job]:
    """Runs on test data: the defaults and the best of each kind by the runs on validation data, `tuned`."""
    jobs = []
    for name in networks:
        count = seeds or NETWORKS[name].report_seeds
        for contender in [*fixed(), *chosen(tuned, name).values()]:
            own = min(count, 5) if contender.kind in DEFAULTS else count
            jobs += [Job(name, contender, seed, "test", limit) for seed in range(own)]
    return _in_order(jobs)


def _first_of_kinds(contenders: Iterable[Contender]) -> list[Contender]:
    kept: dict[str, Contender] = {}
    for contender in contenders:
        kept.setdefault(contender.kind, contender)
    return list(kept.values())


def _in_order(jobs: list[Job]) -> list[Job]:
    """What a study that is stopped early should have first: base and defaults, then seed by seed of all networks."""
    first = {"base", GIVEN, *DEFAULTS}
    return sorted(jobs, key=lambda job: (job.contender.kind not in first, job.seed))


def pass_seconds(name: str, rounds: int = 15) -> float:
    """Median seconds of one gradient pass with a batch of the network's size, measured now on one thread."""
    net = NETWORKS[name]
    data, model, threads = net.load(0, False), net.model(0), torch.get_num_threads()
    index = next(batches(len(data.inputs), net.batch_size, 0))
    times = []
    torch.set_num_threads(1)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            for _ in range(rounds + 1):
                start = time.perf_counter()
                loss(model, data.inputs[index], data.targets[index]).backward()
                times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return statistics.median(times[1:])


def expected_seconds(jobs: Sequence[Job], seconds: dict[str, float]) -> list[float]:
    """What each job takes by its passes and what they see, from `pass_seconds` of each network."""
    return [_passes(job, NETWORKS[job.network]) * seconds[job.network] for job in jobs]


def _passes(job: Job, net: Network) -> float:
    """As many passes with a batch of the network's size as take as long."""
    data = net.load(job.seed, job.split == "validation")
    batch_size = job.contender.batch_size or net.batch_size
    steps = min(number_of_steps(net, job.contender, len(data.inputs)), job.limit or 10**9)
    contender, part = job.contender, batch_size / net.batch_size
    passes, seen = contender.calls, contender.passes * part
    training = steps * (FIXED_PART * passes + (1 - FIXED_PART) * seen)
    judging = len(data.judged_inputs) / net.batch_size / 3
    return training + judging + (EIGENVALUE_PASSES if net.eigenvalue and job.split == "test" else 0)
