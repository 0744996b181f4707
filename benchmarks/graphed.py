"""A function of a training loop without GAM as a CUDA graph; steps of FusedGAM have `gam_fused.graphs.capture_step`."""

from __future__ import annotations

from collections.abc import Callable

import torch


def graphed(run: Callable[[], object]) -> Callable[[], object]:
    """Warms `run` up on a stream of its own, captures it, and returns what replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return lambda: run and graph.replay()  # keeps `run`, and with it the optimizer's state that the graph writes to
