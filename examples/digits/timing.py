"""The cost of a training step, measured apart from the runs: one process, one thread, all methods in turn."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from examples.digits.data import load
from examples.digits.methods import Method
from examples.digits.net import conv_net
from examples.digits.training import train_step


def step_times(methods: Sequence[Method], batch_size: int, rounds: int = 30) -> list[float]:
    """Median milliseconds of a training step (all its passes and the update) of each method."""
    return [1e3 * statistics.median(seconds) for seconds in window_times(methods, batch_size, 1, rounds)]


def window_times(
    methods: Sequence[Method], batch_size: int, steps: int, rounds: int, progress: Callable[[], object] = lambda: None
) -> list[list[float]]:
    """Seconds of `steps` training steps in a row, of each method in each round.

    Every round runs all methods, so that drift of the machine meets all alike; a first one warms up and is dropped. With
    `interval`, let `steps` be a multiple of it: then every window holds equally many steps of the method.
    """
    data = load(seed=0)
    x, y = data.images[:batch_size], data.labels[:batch_size]
    models = [conv_net(seed=0) for _ in methods]
    optimizers = [method.optimizer(model) for method, model in zip(methods, models, strict=True)]
    times: list[list[float]] = [[] for _ in methods]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for number in range(rounds + 1):
            for model, optimizer, seconds in zip(models, optimizers, times, strict=True):
                gc.disable()
                start = time.perf_counter()
                for _ in range(steps):
                    train_step(model, optimizer, x, y)
                elapsed = time.perf_counter() - start
                gc.enable()
                if number:
                    seconds.append(elapsed)
                progress()
    finally:
        gc.enable()
        torch.set_num_threads(threads)
    return times
