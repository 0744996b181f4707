"""One CUDA graph of one kind of step, with what a replay needs beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from gam_fused.backends.uploads import GraphNumbers
from gam_fused.graphs.random import GraphRandom
from gam_fused.settings import Settings
from gam_fused.step.step import Step

WORDS = 1 << 16  # of addresses: enough for a step of a thousand tensors; a capture that needs more is made again


@dataclass(frozen=True)
class Recording:
    """A graph.

    Attributes:
        step: whose passes it runs, with the tensors that it writes to.
        random: its generators, where they are replayed. numbers: what it reads.
    """

    graph: Any
    step: Step
    random: GraphRandom | None
    numbers: GraphNumbers

    def replay(self) -> None:
        """Run it on the current stream."""
        if self.random:
            self.random.align()
        self.graph.replay()


def record(
    take: Callable[[GraphRandom | None], Step],
    settings: Settings,
    device: torch.device,
    stream: Any,
    pool: Any,
    words: int | None = None,
) -> Recording:
    """Capture a step on `stream`. `take` runs its passes; nothing of it is done on the device."""
    graph, numbers = torch.cuda.CUDAGraph(), GraphNumbers(device, words or WORDS)
    random = GraphRandom(device, graph) if settings.preserve_rng_state else None
    # "thread_local": calls that cannot be captured, such as allocations, are errors in this thread only; a thread that pins
    # batches or fetches them ahead goes on.
    with numbers, torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        step = take(random)
    if not numbers.suffices:
        del graph, step
        return record(take, settings, device, stream, pool, numbers.needed)
    numbers.fill()
    return Recording(graph, step, random, numbers)
