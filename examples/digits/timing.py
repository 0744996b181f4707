"""The cost of a training step, measured apart from the runs: one process, one thread, all methods in turn."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from benchmarks.measure import quantiles, side_by_side
from examples.digits.data import load
from examples.digits.methods import Method
from examples.digits.net import conv_net
from examples.digits.training import train_step


def step_times(methods: Sequence[Method], batch_size: int, rounds: int = 30) -> list[float]:
    """Median milliseconds of a training step (all its passes and the update) of each method."""
    data = load(seed=0)
    x, y = data.images[:batch_size], data.labels[:batch_size]
    contestants = {}
    for number, method in enumerate(methods):
        model = conv_net(seed=0)
        step = partial(train_step, model, method.optimizer(model), x, y)
        contestants[str(number)] = (lambda: None, step)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = side_by_side(contestants, rounds, progress=lambda: None)
    finally:
        torch.set_num_threads(threads)
    return [quantiles(seconds)["ms"] for seconds in times.values()]
