"""Rooms (backends): implementations of the same verbs, chosen per optimizer and device. See README's table of rooms."""

from __future__ import annotations

from typing import Any

import torch

from gam_fused.rooms import foreach, reference, triton
from gam_fused.rooms.compiled import cpp, cuda

Room = Any  # a module or an object with the verbs of `reference` and `reason()`

# In order of preference for "auto"; `reference` is the judge, never chosen.
_ROOMS: dict[str, tuple[Room, tuple[str, ...] | None]] = {
    "cpp": (cpp, ("cpu",)),
    "cuda": (cuda, ("cuda",)),
    "triton": (triton, triton.DEVICES),
    "torch": (foreach, None),
    "reference": (reference, None),
}
BACKENDS = ("auto", *_ROOMS)


def available_backends() -> dict[str, str]:
    """Each room's name with "" where it is there, else the reason why it is not and how to get it."""
    return {name: module.reason() for name, (module, _) in _ROOMS.items()}


def check_backend(backend: str) -> None:
    """Raises ValueError for an unknown name, RuntimeError with the reason and the mend for a room that is not there."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {', '.join(map(repr, BACKENDS))}")
    if backend != "auto" and (why := _ROOMS[backend][0].reason()):
        raise RuntimeError(f"backend={backend!r} is not available: {why}")


def room(backend: str, device: torch.device, *, dense: bool = True) -> Room:
    """The room for tensors of `device`. Compiled rooms read storage order, so tensors with gaps go to the torch room.

    Raises:
        RuntimeError: the named room does not serve the device.
    """
    if backend == "auto":
        serves = (
            module
            for module, devices in _ROOMS.values()
            if (devices is None or (device.type in devices and dense))
            and not (module is triton and triton.INTERPRETED)
            and not module.reason()
        )
        return next(serves)
    module, devices = _ROOMS[backend]
    if devices is not None and device.type not in devices:
        raise RuntimeError(f"backend={backend!r} serves {', '.join(devices)} tensors, not {device}; use backend='auto'")
    return module if dense or devices is None else foreach


def copying_room(backend: str, device: torch.device) -> Room | None:
    """The room whose `copy_` copies tensors of `device`, or None where torch's own copies do."""
    try:
        chosen = room(backend, device)
    except RuntimeError:  # a named room that serves other devices
        return None
    return None if chosen in (foreach, reference) else chosen
