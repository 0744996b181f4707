"""What the host tells a device, without waiting for it; and while a CUDA graph is captured."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor


def is_capturing(device: torch.device) -> bool:
    """Whether work on `device` is being recorded into a graph instead of being done."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def upload(host: Tensor, device: torch.device) -> Tensor:
    """A copy of a CPU tensor on `device`, without waiting for it; the tensor itself where that is the CPU.

    While a CUDA graph is captured it is the graph's alone: see `GraphNumbers`.
    """
    if device.type == "cpu":
        return host
    if is_capturing(device):
        return GraphNumbers.of_this_thread().take(host)
    return host.pin_memory().to(device, non_blocking=True)


class GraphNumbers:
    """What a CUDA graph reads that the host has written while it was captured: addresses, the same in every replay.

    A capture cannot copy from the host: from pageable memory torch refuses from 2.11 on, and pinning asks for events, which
    older versions refuse. Nor would a replay need the copy. So memory on the device is set aside before the capture (what is
    allocated during it shares its place with activations), handed out meanwhile, and filled once, when the capture is over.

    Args:
        words: of 8 bytes, how much memory. needed: how much was asked for in the end.
    """

    _now = threading.local()

    def __init__(self, device: torch.device, words: int):
        self._memory = torch.zeros(words, dtype=torch.int64, device=device)
        self._host = torch.zeros(words, dtype=torch.int64, device="cpu")
        self._known: dict[tuple[Any, ...], Tensor] = {}
        self.needed = 0

    @classmethod
    def of_this_thread(cls) -> GraphNumbers:
        """Those of the capture that runs."""
        numbers: GraphNumbers | None = getattr(cls._now, "numbers", None)
        if numbers is None:
            raise RuntimeError(
                "addresses cannot be sent to the device while a CUDA graph is being captured: capture steps of FusedGAM "
                "with gam_fused.graphs.capture_step, or use backend='cuda'"
            )
        return numbers

    def __enter__(self) -> None:
        self._now.numbers = self

    def __exit__(self, *_: Any) -> None:
        self._now.numbers = None

    def take(self, host: Tensor) -> Tensor:
        """Memory that will hold `host`; where there is not enough, memory that will not, and `suffices` says so."""
        key = (host.dtype, host.shape, *host.flatten().tolist())
        if key in self._known:
            return self._known[key]
        start = self.needed
        self.needed += -(-host.nbytes // 8)
        if not self.suffices:
            return torch.empty(host.shape, dtype=host.dtype, device=self._memory.device)
        mine, theirs = (_as(m[start : self.needed], host) for m in (self._host, self._memory))
        mine.copy_(host)
        self._known[key] = theirs
        return theirs

    @property
    def suffices(self) -> bool:
        return self.needed <= len(self._memory)

    def fill(self) -> None:
        """After the capture."""
        self._memory.copy_(upload(self._host, self._memory.device))


def _as(words: Tensor, like: Tensor) -> Tensor:
    """Memory of 8-byte words as a tensor like another."""
    return words.view(torch.uint8)[: like.nbytes].view(like.dtype).view(like.shape)


def moved(t: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """`t` on `device`. Waits only for copies to the host, whose memory would else be read before it is written."""
    if t.device.type == "cpu":
        return upload(t if dtype is None else t.to(dtype), device)
    return t.to(device=device, dtype=dtype, non_blocking=device.type != "cpu")
