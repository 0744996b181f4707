"""CUDA tensors without a GPU: torch's fake tensors, watched for what a real device would make the host wait for.

A fake tensor has a device, a shape and a dtype, and no numbers. Tensors on the CPU stay real, so the host's own bookkeeping
runs as ever. What it cannot show: kernels, and the order of streams.
"""

from __future__ import annotations

import ctypes
import os
import sys
import types
from collections import Counter
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gam_fused

aten = torch.ops.aten
PACKAGE = f"{Path(gam_fused.__file__).parent}{os.sep}"
READS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim", "item"}
INDEXED = {"index", "index_put_", "index_put", "_index_put_impl_", "index_select", "gather", "take"}
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "detach"}


class Watch(TorchDispatchMode):
    """Notes what waits for the device, and how many kernels are launched.

    Attributes:
        waits: "step/passes.py:228: aten.copy_.default ...", one for each wait.
        launches: launches of each line of the package and operator.
        devices: of everything that was computed, by the line that did.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.launches: Counter[str] = Counter()
        self.devices: dict[torch.device, str] = {}
        self._pinned: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        devices = [d for d in leaves if isinstance(d, torch.device)]
        on_device = any(isinstance(t, FakeTensor) for t in leaves) or any(d.type == "cuda" for d in devices)
        if not on_device:
            with unset_fake_temporarily():
                return self._on_host(func, args, kwargs)
        why = self._why_it_waits(func, args, kwargs, [t for t in leaves if isinstance(t, torch.Tensor)])
        if why:
            self.waits.append(f"{line_of_package()}: {func} {why}")
        count = launches(func, args, kwargs)
        if count:
            self.launches[f"{line_of_package()}: {func}"] += count
        if func is aten._local_scalar_dense.default:
            return {True: 1.0, False: 1}[args[0].is_floating_point()]
        if func is aten.equal.default:
            return True
        result = func(*args, **kwargs)
        for t in tree_leaves(result):
            if isinstance(t, FakeTensor) and t.device not in self.devices:
                self.devices[t.device] = line_of_package()
        return result

    def _on_host(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is aten.is_pinned.default:
            return self._is_pinned(args[0])
        if func is aten._pin_memory.default:
            self._pinned.append(args[0].clone())
            return self._pinned[-1]
        if kwargs.get("pin_memory"):
            self._pinned.append(func(*args, **{**kwargs, "pin_memory": False}).zero_())
            return self._pinned[-1]
        return func(*args, **kwargs)

    def _is_pinned(self, t: torch.Tensor) -> bool:
        return any(t.untyped_storage()._cdata == p.untyped_storage()._cdata for p in self._pinned)

    def _why_it_waits(self, func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> str:
        name = func._schema.name.split("::")[1]
        if name in READS:
            return "reads a number"
        if name == "repeat_interleave" and kwargs.get("output_size") is None:
            return "reads a size"
        if name in ("_to_copy", "copy_"):
            target, source = (args[0], args[1]) if name == "copy_" else (None, args[0])
            to = target.device if target is not None else kwargs.get("device") or source.device
            non_blocking = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
            return self._why_a_copy_waits(source, target, torch.device(to), kwargs.get("dtype"), bool(non_blocking))
        hosts = [t for t in tensors if t.device.type == "cpu"]
        if any(t.dim() > 0 for t in hosts) or (hosts and name in INDEXED):
            return f"takes a tensor from the CPU, of shape {[tuple(t.shape) for t in hosts]}"
        if name.startswith(("index_put", "_index_put")) or name == "index":
            tensors = [t for t in tree_leaves(args[1]) if isinstance(t, torch.Tensor)]
        if name in INDEXED - {"index_select"} and any(t.dtype is torch.bool for t in tensors):
            return "counts what a mask selects"
        return ""

    def _why_a_copy_waits(
        self, source: torch.Tensor, target: torch.Tensor | None, to: torch.device, dtype: Any, non_blocking: bool
    ) -> str:
        if source.device.type == to.type:
            return ""
        if not non_blocking:
            return f"from {source.device} to {to} without non_blocking"
        host = source if source.device.type == "cpu" else target
        if host is None or not self._is_pinned(host):
            return f"from {source.device} to {to}: the host's memory is not pinned"
        wanted = target.dtype if target is not None else dtype or source.dtype
        return "" if wanted is source.dtype else "converts on the way, through memory that is not pinned"


def line_of_package() -> str:
    """The innermost line of gam_fused that is running."""
    frame = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    return "?" if frame is None else f"{frame.f_code.co_filename[len(PACKAGE) :]}:{frame.f_lineno}"


def launches(func: Any, args: Any, kwargs: Any) -> int:
    """How many kernels: none for views; one per tensor for a foreach operator that cannot take its fast route."""
    namespace, name = func._schema.name.split("::")
    if (
        namespace == "prim"
        or name in ALLOCATIONS
        or any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
    ):
        return 0
    if not name.startswith("_foreach_"):
        return 1
    lists = [a for a in (*args, *kwargs.values()) if isinstance(a, (list, tuple)) and isinstance(a[0], torch.Tensor)]
    scalars = [a for a in args if isinstance(a, torch.Tensor)]
    first = lists[0]
    same_dtype = name == "_foreach_copy_" or len({t.dtype for lst in lists for t in lst}) == 1
    alike = all(len({(t.shape, t.stride()) for t in column}) == 1 for column in zip(*lists, strict=True))
    fits = all(s.dtype is first[0].dtype and s.device == first[0].device for s in scalars)
    return 1 if same_dtype and alike and fits else len(first)


def address(t: torch.Tensor) -> int:
    """An address for a fake tensor: no two storages' overlap, as long as both are there."""
    return _data_ptr(t) if not isinstance(t, FakeTensor) else _address_of(t)


_data_ptr = torch.Tensor.data_ptr


def _address_of(t: FakeTensor) -> int:
    with torch._C._DisableTorchDispatch():
        return (t.untyped_storage()._cdata << 12) + t.storage_offset() * t.element_size() if t.numel() else 0


class Event:
    """A CUDA event that has always passed. Notes the device on which it was recorded."""

    recorded_on: list[int] = []  # noqa: RUF012

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, stream: Any = None) -> None:
        self.recorded_on.append(Device.current if stream is None else stream.device_index)

    def query(self) -> bool:
        return True


class Device:
    """`torch.cuda.device`."""

    current = 0

    def __init__(self, device: Any):
        self.index = torch.device(device).index if not isinstance(device, int) else device

    def __enter__(self) -> None:
        self.before, Device.current = Device.current, self.index or 0

    def __exit__(self, *_: Any) -> None:
        Device.current = self.before


@contextmanager
def fake_cuda(monkeypatch: Any):
    """For the time of the context "cuda" is a device of fake tensors. Gives the `Watch`."""
    stream = lambda device=None: types.SimpleNamespace(stream_id=0, device_index=torch.device(device).index or 0)  # noqa: E731
    Event.recorded_on = []
    monkeypatch.setattr(torch.Tensor, "data_ptr", address)
    for name, stub in {
        "is_current_stream_capturing": lambda: False,
        "get_rng_state": lambda device="cuda": torch.zeros(16, dtype=torch.uint8, device="cpu"),
        "set_rng_state": lambda state, device="cuda": None,
        "current_device": lambda: Device.current,
        "current_stream": stream,
        "device": Device,
        "Event": Event,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    monkeypatch.setattr(torch.accelerator, "current_stream", stream)
    with _device_guard(), FakeTensorMode(allow_non_fake_inputs=True), Watch() as watch:
        yield watch


@contextmanager
def _device_guard():
    """What a torch without CUDA lacks: something that switches devices. The meta device's, which does nothing, will do."""
    with nullcontext() if torch.version.cuda else _guard_of_meta():
        yield


@contextmanager
def _guard_of_meta():
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 21).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    cuda, meta = 1, 14  # numbers of c10::DeviceType
    before = guards[cuda]
    guards[cuda] = guards[meta]
    try:
        yield
    finally:
        guards[cuda] = before
