"""One run: a training that is judged, or a training at whose end a figure's measures are taken."""

from __future__ import annotations

import hashlib
import json
import math
import time
from dataclasses import asdict
from typing import Any, NamedTuple

from studies.defaults.contender import Contender
from studies.defaults.training import number_of_steps, once, train
from studies.paper.measures import measured
from studies.paper.networks import NETWORKS

FIRST_TUNING_SEED = 100  # the runs on test data have seeds 0, 1, ...: other weights, and other wrong labels


class Job(NamedTuple):
    """One run. `split` is "validation", "test" or "figure", where the network has been trained for `part` of its steps.

    `limit` is the most steps it takes (None: as many as the network says).
    """

    network: str
    contender: Contender
    seed: int
    split: str
    part: float = 1.0
    limit: int | None = None

    @property
    def digest(self) -> str:
        """Equal for equal options of everything, so that a recorded run need not be run again."""
        facts = [*self[:1], NETWORKS[self.network].settings(), asdict(self.contender), *self[2:]]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def run(*fields: Any) -> dict[str, Any]:
    """Trains once; the record of `studies.defaults.training.run`, or with split "figure" `measures.measured`.

    Beside it "cpu_s", processor time: unlike "seconds" it says what a run takes on a machine that does nothing else.
    """
    job = Job(*fields)
    start = time.process_time()
    result = _figure(job) if job.split == "figure" else once(NETWORKS[job.network], *job[1:4], job.limit)
    return {"digest": job.digest, "network": job.network, **result, "cpu_s": time.process_time() - start}


def _figure(job: Job) -> dict[str, Any]:
    net = NETWORKS[job.network]
    data, model = net.load(job.seed, False), net.model(job.seed)
    steps = round(job.part * number_of_steps(net, job.contender, len(data.inputs)))
    optimizer = job.contender.optimizer(model, net)
    train(net, job.contender, data, model, optimizer, job.seed, min(steps, job.limit or steps))
    facts = {**asdict(job.contender), "label": job.contender.label, "seed": job.seed, "split": job.split, "part": job.part}
    return {**facts, **measured(model, data, converged=job.part == 1.0, quick=job.limit is not None)}


def note(result: dict[str, Any]) -> str:
    """What the progress bar tells."""
    value = f"{100 * result['value']:.1f} %" if "value" in result else "measured"
    return f"{result['network']}, {result['kind']}: {value}"


def with_nan(record: dict[str, Any]) -> dict[str, Any]:
    """NaN where a number was not finite, which JSON does not have."""
    lost = {key for key in ("value", "loss", "R0", "R1", "trace", "eigenvalue") if key in record and record[key] is None}
    if record["split"] != "figure":
        lost -= {"eigenvalue"}  # not measured
    rows = [[math.nan if value is None else value for value in row] for row in record.get("landscape", ())]
    return record | dict.fromkeys(lost, math.nan) | ({"landscape": rows} if rows else {})
