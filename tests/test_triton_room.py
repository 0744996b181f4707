"""When the Triton room is there, what it says when it is not, and who chooses it. No test here needs Triton or a GPU."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from gam_fused import FusedGAM, available_backends, rooms
from gam_fused.rooms import triton as room
from gam_fused.tensor_lists import EMPTY, Layout

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _reason_asked_anew(monkeypatch):
    monkeypatch.setattr(room, "INTERPRETED", False)
    room.reason.cache_clear()
    yield
    monkeypatch.undo()
    room.reason.cache_clear()


def triton_is(monkeypatch, version: str | None, *, gpu: bool) -> None:
    """Pretend that Triton is installed in `version`, or not at all, with or without a GPU."""
    monkeypatch.setitem(sys.modules, "triton", None if version is None else SimpleNamespace(__version__=version))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)


@pytest.mark.parametrize(
    ("version", "gpu", "message"),
    [
        (None, True, "Triton cannot be imported.*pip install 'gam_fused.triton.'"),
        ("3.5.1", True, "Triton 3.5.1 is older than 3.6; pip install 'gam_fused.triton.'"),
        ("3.7.1", False, "Triton is installed, but torch sees no GPU to compile for. With TRITON_INTERPRET=1"),
    ],
)
def test_reason_and_mend_where_it_is_not_there(monkeypatch, version, gpu, message):
    triton_is(monkeypatch, version, gpu=gpu)
    weight = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(RuntimeError, match=f"backend='triton' is not available: {message}"):
        FusedGAM([weight], lr=0.1, backend="triton")
    assert rooms.room("auto", CUDA) is not room


@pytest.mark.parametrize("version", ["3.6.0", "3.10.0+git123"])
def test_gpu_tensors_get_it_where_nothing_is_compiled(monkeypatch, version):
    triton_is(monkeypatch, version, gpu=True)
    assert available_backends()["triton"] == ""
    for name, (other, devices) in rooms._ROOMS.items():
        if other is not room and devices is not None:
            monkeypatch.setitem(rooms._ROOMS, name, (SimpleNamespace(reason=lambda: "not built"), devices))
    monkeypatch.setitem(rooms._ROOMS, "triton", (room, ("cuda", "xpu")))
    assert rooms.room("auto", CUDA) is room
    assert rooms.room("auto", CUDA, dense=False) is not room
    assert rooms.room("auto", CPU) is not room
    with pytest.raises(RuntimeError, match="backend='triton' serves cuda, xpu tensors, not cpu; use backend='auto'"):
        rooms.room("triton", CPU)


def test_importing_the_package_does_not_import_triton():
    code = "import sys, torch, gam_fused; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("name", ["coefficients", "partials", "control", "direction"])
def test_tables_that_kernels_would_misread_are_refused(name):
    """Kernels get a pointer and, of partial sums, the stride between rows."""
    shapes = {"coefficients": (1, 16), "partials": (2, 4), "control": (9,), "direction": (4,)}
    tables = {n: torch.zeros(shape, dtype=torch.float64) for n, shape in shapes.items()}
    tables[name] = torch.stack([tables[name]] * 2, -1)[..., 0]
    with pytest.raises(ValueError, match=rf"{name} must .* strides \(.*2,?\); pass .contiguous"):
        room.combine_(Layout([8], [0], [True]), EMPTY, EMPTY, EMPTY, EMPTY, *tables.values())
