"""torch.set_default_device is the user's: what backends make for themselves lies where they need it."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from cases import BACKENDS, Problem, assert_same_bits, get_backend
from test_kernels import KERNELS
from torch.utils._device import _device_constructors

from gam_fused.backends.tensor_lists import EMPTY, TensorList

ROOT = Path(__file__).parents[1]
SOURCES = [*(ROOT / "gam_fused").rglob("*.py")]
SOURCES += (ROOT / "triton_kernels").glob("*.py")
# What torch.utils._device makes on the default device where no device is named.
MAKERS = {f.__name__ for f in _device_constructors()}


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_new_tensor_names_its_device(source):
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MAKERS:
            called_on_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            named = any(keyword.arg == "device" for keyword in node.keywords)
            assert named or not called_on_torch, f"{source.name}:{node.lineno}: {ast.unparse(node)}"


class Recorder:
    """A backend that only notes the call."""

    def __getattr__(self, kernel):
        return lambda *arguments: self.calls.append((kernel, arguments))

    def __init__(self):
        self.calls: list[tuple] = []


def written(operands) -> dict:
    """Every list and table of a call."""
    values = {field.name: getattr(operands, field.name) for field in fields(operands)}
    named = {name: a for name, a in values.items() if isinstance(a, (TensorList, torch.Tensor))}
    return {
        n: TensorList([t for t in a.tensors if t is not None]) if isinstance(a, TensorList) else a for n, a in named.items()
    }


@pytest.mark.parametrize("backend_name", [*BACKENDS, "reference"])
@pytest.mark.parametrize("device", ["meta", "cuda:99"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_do_not_ask_for_it(backend_name, device, kernel):
    results = []
    for context in (torch.device("cpu"), torch.device(device)):
        recorder = Recorder()
        KERNELS[kernel](recorder, Problem("empty tensors", torch.bfloat16, torch.bfloat16))
        ((name, (operands,)),) = recorder.calls
        # not the backend's: made before, and kept
        operands.layout.on(torch.device("cpu"))
        lists = [getattr(operands, field.name) for field in fields(operands)]
        for lst in (EMPTY, *(a for a in lists if isinstance(a, TensorList))):
            assert lst.addresses.device.type == "cpu"
        with context:
            getattr(get_backend(backend_name), name)(operands)
        results.append(written(operands))
    assert_same_bits(*results)


def test_imported_under_another_default_device():
    code = (
        "import torch; torch.set_default_device('meta')\n"
        "from gam_fused.backends import compiled, cpp\n"
        "assert compiled._NO_MAP.device.type == 'cpu'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
