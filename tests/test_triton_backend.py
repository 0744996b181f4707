"""When the Triton backend is there, what it says when it is not, and who chooses it. No test here needs Triton or a GPU."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from gam_fused import FusedGAM, available_backends, backends
from gam_fused.backends import triton
from gam_fused.backends.operands import Combine
from gam_fused.backends.tensor_lists import EMPTY, Layout
from gam_fused.backends.triton import backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _reason_asked_anew(monkeypatch):
    monkeypatch.setattr(triton, "INTERPRETED", False)
    triton.reason.cache_clear()
    yield
    monkeypatch.undo()
    triton.reason.cache_clear()


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
def test_reason_and_remedy_where_it_is_not_there(monkeypatch, version, gpu, message):
    triton_is(monkeypatch, version, gpu=gpu)
    weight = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(RuntimeError, match=f"backend='triton' is not available: {message}"):
        FusedGAM([weight], lr=0.1, backend="triton")
    assert backends.backend_for("auto", CUDA) is not backend


@pytest.mark.parametrize("version", ["3.6.0", "3.10.0+git123"])
def test_gpu_tensors_get_it_where_nothing_is_compiled(monkeypatch, version):
    triton_is(monkeypatch, version, gpu=True)
    assert available_backends()["triton"] == ""
    for name, (other, devices) in backends._BACKENDS.items():
        if other is not backend and devices is not None:
            monkeypatch.setitem(backends._BACKENDS, name, (SimpleNamespace(reason=lambda: "not built"), devices))
    monkeypatch.setitem(backends._BACKENDS, "triton", (backend, ("cuda", "xpu")))
    assert backends.backend_for("auto", CUDA) is backend
    assert backends.backend_for("auto", CUDA, dense=False) is not backend
    assert backends.backend_for("auto", CPU) is not backend
    with pytest.raises(RuntimeError, match="backend='triton' serves cuda, xpu tensors, not cpu; use backend='auto'"):
        backends.backend_for("triton", CPU)


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
        backend.combine_(Combine(layout=Layout([8], [0], [True]), out=EMPTY, last=EMPTY, **tables))
