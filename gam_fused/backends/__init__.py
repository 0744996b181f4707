"""Backends: implementations of the same kernels, chosen per optimizer and device."""

from __future__ import annotations

from typing import Any

import torch

from gam_fused.backends import foreach, reference, triton
from gam_fused.backends.compiled import cpp, cuda
from gam_fused.backends.operands import Backend as Backend
from gam_fused.backends.operands import LaunchingBackend

# In order of preference for "auto"; `reference`, which the others are compared with, is never chosen.
_BACKENDS: dict[str, tuple[Any, tuple[str, ...] | None]] = {
    "cpp": (cpp, ("cpu",)),
    "cuda": (cuda, ("cuda",)),
    "triton": (triton.backend, triton.DEVICES),
    "torch": (foreach, None),
    "reference": (reference, None),
}
BACKENDS = ("auto", *_BACKENDS)


def available_backends() -> dict[str, str]:
    """Each backend's name with "" if it is available, else the reason why it is not, and how to get it."""
    return {name: module.reason() for name, (module, _) in _BACKENDS.items()}


def check_backend(backend: str) -> None:
    """Raises ValueError for an unknown name, RuntimeError with the reason for a backend that is not available."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {', '.join(map(repr, BACKENDS))}")
    if backend != "auto" and (why := _BACKENDS[backend][0].reason()):
        raise RuntimeError(f"backend={backend!r} is not available: {why}")


def backend_for(backend: str, device: torch.device, *, dense: bool = True) -> Backend:
    """The backend for tensors of `device`. Compiled ones read storage order, so tensors with gaps go to `torch`.

    Raises:
        RuntimeError: the named backend does not serve the device.
    """
    if backend == "auto":
        serves = (
            module
            for module, devices in _BACKENDS.values()
            if (devices is None or (device.type in devices and dense))
            and not (module is triton.backend and triton.INTERPRETED)
            and not module.reason()
        )
        first: Backend = next(serves)
        return first
    module, devices = _BACKENDS[backend]
    if devices is not None and device.type not in devices:
        raise RuntimeError(f"backend={backend!r} serves {', '.join(devices)} tensors, not {device}; use backend='auto'")
    chosen: Backend = module if dense or devices is None else _BACKENDS["torch"][0]
    return chosen


def copying_backend(backend: str, device: torch.device) -> LaunchingBackend | None:
    """The backend whose `copier` copies tensors of `device`, or None where torch's own copies do."""
    try:
        chosen = backend_for(backend, device)
    except RuntimeError:  # a named backend that serves other devices
        return None
    return chosen if isinstance(chosen, LaunchingBackend) else None
