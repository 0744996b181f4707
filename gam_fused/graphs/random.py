"""The replay of random numbers inside a CUDA graph, where generators' states can be neither read nor set."""

from __future__ import annotations

from typing import Any

import torch

from gam_fused.transaction.randomness import Generators

FURTHER_PASSES = 4  # at most: three of the method, one of the SAM oracle


class GraphRandom:
    """`RandomState` for a capture: every further pass draws from a copy of the generator's state at the start of pass 1.

    In a graph, the states themselves stay on the device: each is registered with the graph, which fills it in and moves it
    on at every replay. The generator is only pointed from one to the next while capturing.
    """

    def __init__(self, device: torch.device, graph: Any):
        self._generator = torch.cuda.default_generators[device.index]
        self._first = self._generator.graphsafe_get_state()
        self._copies = [self._generator.clone_state() for _ in range(FURTHER_PASSES)]
        for copy in self._copies:
            graph.register_generator_state(copy)
        self._host = Generators(()).begin()
        self._used = 0

    def replay(self) -> None:
        """Before each further pass."""
        self._host.replay()
        self._generator.graphsafe_set_state(self._copies[self._used])
        self._used += 1

    def finish(self) -> None:
        self._host.finish()
        self._generator.graphsafe_set_state(self._first)

    def abort(self) -> None:
        self._host.abort()
        self._generator.graphsafe_set_state(self._first)

    def align(self) -> None:
        """Before a replay of the graph: all copies where the generator is now. Host memory only."""
        state = self._generator.get_state()
        for copy in self._copies[: self._used]:
            copy.set_state(state)
