"""A shared object of other sources, as `git pull` leaves it: a reason and a warning, and the `torch` backend goes on."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gam_fused.backends import stamp

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which("c++")
SEES_A_GPU = "import torch; torch.version.cuda = '13.0'; torch.cuda.is_available = lambda: True"
STEP = """
import gam_fused
from torch import nn
model = nn.Linear(3, 2)
optimizer = gam_fused.FusedSAM(model, lr=0.1)
before = model.weight.detach().clone()
optimizer.step(lambda: model(torch.ones(1, 3)).sum())
assert not torch.equal(model.weight, before)
reasons = gam_fused.available_backends()
print(reasons["cpp"] or "taken", reasons["cuda"] or "taken", reasons["torch"] or "taken", sep="\\n")
"""
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler (c++)")


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder with the package and the sources of its kernels, without what was built of them."""
    unbuilt = shutil.ignore_patterns("*.so", "*_not_built.txt", "__pycache__", "triton_kernels")
    for name in ("gam_fused", "csrc"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=unbuilt)
    shutil.copytree(ROOT / "triton_kernels", tmp_path / "gam_fused" / "triton_kernels")
    return tmp_path


def build(package: Path, library: str, stamped: str | None) -> None:
    """A shared object with nothing but a stamp; without one, what there was before stamps."""
    source = package / "object.cpp"
    source.write_text('#include "csrc/stamp.h"\n' if stamped else "int nothing;\n")
    command = [COMPILER, "-shared", "-fPIC", f"-DGAM_BUILT_FROM={stamped}", "-I", str(package), str(source), "-o"]
    subprocess.run([*command, str(package / "gam_fused" / f"{library}.abi3.so")], check=True)


def stamp_in(package: Path, backend: str) -> str:
    """The stamp of the sources in `package`."""
    code = f"import runpy; print(runpy.run_path('gam_fused/backends/stamp.py')['stamp']({backend!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=package, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def run(package: Path) -> tuple[list[str], str]:
    """The reasons of `cpp`, `cuda` and `torch` after a step with the package in that folder; and what was warned of."""
    code = f"import sys; sys.path.insert(0, {str(package)!r})\n{SEES_A_GPU}\n{STEP}"
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=package, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr


@pytest.mark.parametrize("change", ["kernels", "version", "none told"])
def test_an_object_of_other_sources_says_so_and_leaves_torch(package, change):
    old = {backend: stamp_in(package, backend) if change != "none told" else None for backend in ("cpu", "cuda")}
    if change == "kernels":
        header = package / "csrc" / "operands.h"
        header.write_text(header.read_text() + "static int more;\n")
    else:
        init = package / "gam_fused" / "__init__.py"
        init.write_text(init.read_text().replace('__version__ = "', '__version__ = "9.'))
    for backend, stamped in old.items():
        build(package, f"_{backend}", stamped)
    (cpp, cuda, torch), warned = run(package)
    assert torch == "taken"
    for backend, why in (("cpu", cpp), ("cuda", cuda)):
        told = old[backend] or stamp.UNSTAMPED
        assert why == (
            f"the compiled {backend.upper()} extension _{backend}.abi3.so was built from other sources ({told}) than these "
            f"({stamp_in(package, backend)}); build it anew: pip install --no-build-isolation ."
        )
        assert why in warned


def test_in_a_wheel_the_version_decides(package):
    """There the sources are not, and the two come together."""
    stamped = stamp_in(package, "cuda")
    build(package, "_cuda", stamped)
    shutil.rmtree(package / "csrc")
    (cpp, cuda, _), _ = run(package)
    assert cuda == "taken"
    assert "was not built" in cpp
    init = package / "gam_fused" / "__init__.py"
    init.write_text(init.read_text().replace('__version__ = "', '__version__ = "9.'))
    assert f"was built from other sources ({stamped})" in run(package)[0][1]


def test_each_backend_has_a_stamp_of_its_own_sources(package):
    before = {backend: stamp_in(package, backend) for backend in ("cpu", "cuda")}
    assert before["cpu"] != before["cuda"]
    source = package / "csrc" / "cuda" / "perturb.cuh"
    source.write_text(source.read_text() + "\n  // a comment\n")
    assert stamp_in(package, "cuda") == before["cuda"]
    source.write_text(source.read_text() + "static int more;\n")
    assert stamp_in(package, "cpu") == before["cpu"]
    assert stamp_in(package, "cuda") != before["cuda"]
