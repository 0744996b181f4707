"""The cost of a training step, measured apart from the runs: one process, one thread, all methods in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from benchmarks.measure import quantiles, side_by_side
from examples.digits.data import load
from examples.digits.methods import Method
from examples.digits.net import conv_net
from examples.digits.training import train_step


def step_times(methods: Sequence[Method], batch_size: int, rounds: int = 30) -> list[float]:
    """Median milliseconds of a training step (all its passes and the update) of each method."""
    return [quantiles(seconds)["ms"] for seconds in window_times(methods, batch_size, 1, rounds)]


def window_times(
    methods: Sequence[Method], batch_size: int, steps: int, rounds: int, progress: Callable[[], object] = lambda: None
) -> list[list[float]]:
    """Seconds of `steps` training steps in a row, of each method in each round.

    With `interval`, let `steps` be a multiple of it: then every window holds equally many steps of the method.
    """
    data = load(seed=0)
    x, y = data.images[:batch_size], data.labels[:batch_size]

    def window(method: Method) -> Callable[[], None]:
        model = conv_net(seed=0)
        optimizer = method.optimizer(model)

        def run() -> None:
            for _ in range(steps):
                train_step(model, optimizer, x, y)

        return run

    contestants = {str(number): ((lambda: None), window(method)) for number, method in enumerate(methods)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = side_by_side(contestants, rounds, progress)
    finally:
        torch.set_num_threads(threads)
    return list(times.values())
