"""What the GPU tests share: the backends as parameters, operands of the kernels moved to the GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from cases import get_backend
from torch import Tensor

from gam_fused import available_backends
from gam_fused.backends import triton
from gam_fused.backends.tensor_lists import EMPTY, TensorList

CUDA = torch.device("cuda", 0)
NO_DEVICE = "" if torch.cuda.is_available() else "no CUDA device"


def why_not(backend_name: str) -> str:
    """Why the backend cannot run on a GPU here, or ""."""
    if NO_DEVICE:
        return NO_DEVICE
    if backend_name == "triton" and triton.INTERPRETED:
        return "TRITON_INTERPRET is set: nothing runs on the GPU"
    why = available_backends()[backend_name]
    return why and f"backend {backend_name}: {why}"


def gpu_backends(*names: str) -> pytest.MarkDecorator:
    """Parametrises `backend_name` over the backends that serve a GPU; one that is not there is skipped with its reason."""
    names = names or ("cuda", "triton", "torch")
    return pytest.mark.parametrize(
        "backend_name",
        [
            pytest.param(name, marks=pytest.mark.skipif(bool(why_not(name)), reason=why_not(name) or "there"))
            for name in names
        ],
    )


class OnDevice:
    """A backend for operands on the CPU: they go to the device, and what the kernel wrote comes back.

    Args:
        backend_name: which backend.
        device: where it runs.
        lasting: whether the lists claim to last, so that backends keep their addresses on the device.
    """

    def __init__(self, backend_name: str, device: torch.device = CUDA, *, lasting: bool = False):
        self.backend, self.device, self.lasting = get_backend(backend_name), device, lasting

    def __getattr__(self, kernel: str) -> Callable[..., None]:
        def call(operands: Any) -> None:
            copies: dict[int, Tensor] = {}
            here = {field.name: getattr(operands, field.name) for field in fields(operands)}
            there = {name: self._moved(value, copies) for name, value in here.items()}
            getattr(self.backend, kernel)(type(operands)(**there))
            for name, value in here.items():
                for a, b in zip(_tensors(value), _tensors(there[name]), strict=True):
                    if a is not None:
                        a.copy_(b)

        return call

    def _moved(self, value: Any, copies: dict[int, Tensor]) -> Any:
        if value is EMPTY:
            return value
        if isinstance(value, TensorList):
            moved = [None if t is None else copies.setdefault(id(t), self._copy(t)) for t in value.tensors]
            return TensorList(moved, lasting=self.lasting)
        return copies.setdefault(id(value), self._copy(value)) if isinstance(value, Tensor) else value

    def _copy(self, t: Tensor) -> Tensor:
        """On the device with the same strides, as far from a 16-byte mark as on the CPU."""
        shift = t.data_ptr() % 16 // t.element_size()
        extent = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
        buffer = torch.empty(extent + shift, dtype=t.dtype, device=self.device)
        return buffer.as_strided(t.shape, t.stride(), shift).copy_(t)


def _tensors(value: Any) -> list:
    return value.tensors if isinstance(value, TensorList) else [value] if isinstance(value, Tensor) else []
