"""Sdist and wheel: what they hold, their tag, and the pure-Python package that installs where nothing can be compiled."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import gam_fused
from gam_fused.backends import cpp

ROOT = Path(__file__).parents[1]
NVCC = shutil.which("nvcc")
SOURCES = ("csrc", "gam_fused", "triton_kernels", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
SMOKE = """
import torch, gam_fused
from torch import nn
torch.manual_seed(0)
model = nn.Linear(3, 2)
optimizer = gam_fused.FusedGAM(model, torch.optim.AdamW, lr=0.01, backend="cpp")
loss = lambda: model(torch.ones(4, 3)).square().mean()
before = loss()
optimizer.step(loss)
assert loss() < before
other = gam_fused.FusedGAM(model, torch.optim.AdamW, lr=0.2)
other.load_state_dict(optimizer.state_dict())
other.step(loss)
assert other.param_groups[0]["lr"] == 0.01
print(gam_fused.__file__)
"""
# What `import gam_fused` may not bring along where torch has not.
HEAVY = ("triton", "sympy", "numpy", "matplotlib", "sklearn", "transformers", "lightning", "accelerate", "unittest")
HEAVY += ("pytest", "torch._inductor", "torch._dynamo.convert_frame", "torch.distributed.fsdp", "torch.utils.cpp_extension")


def copy_sources(folder: Path) -> Path:
    """A copy of the sources, so that nothing of an earlier build gets in."""
    source = folder / "source"
    source.mkdir(parents=True)
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        elif path.exists():
            shutil.copy(path, source)
    return source


def build_sdist(folder: Path) -> Path:
    """An sdist, as frontends ask for it."""
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=copy_sources(folder), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (sdist,) = folder.glob("*.tar.gz")
    return sdist


NO_CUDA = {"FORCE_CUDA": "0", "CUDA_HOME": "/none"}  # its kernels take minutes to compile


def build_wheel(folder: Path, source: Path | None = None, **environment: str) -> tuple[Path, str]:
    """A wheel of `source`, or of a copy of the sources; and what the build printed."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-v",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        str(folder),
        str(source or copy_sources(folder)),
    ]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    (wheel,) = folder.glob("*.whl")
    return wheel, printed


def python(code: str, path: Path) -> subprocess.CompletedProcess:
    """Run `code` with `path` on sys.path, away from the sources."""
    command = [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(path)!r})\n{code}"]
    return subprocess.run(command, capture_output=True, text=True, cwd=path)


def unpack(wheel: Path) -> Path:
    target = wheel.parent / "installed"
    zipfile.ZipFile(wheel).extractall(target)
    return target


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Path:
    """A wheel, built from an sdist, with the CPU backend and, where it can be built, the CUDA backend."""
    if cpp.reason():
        pytest.skip(cpp.reason())
    cuda = {"FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0+PTX"} if NVCC else {}
    folder = tmp_path_factory.mktemp("compiled")
    return build_wheel(folder, build_sdist(folder), GAM_FUSED_REQUIRE_CPP="1", **cuda)[0]


def packages() -> set[str]:
    return {f"{path.parent.relative_to(ROOT)}/" for path in (ROOT / "gam_fused").rglob("__init__.py")}


def test_wheel_holds_one_package_for_every_python(compiled):
    assert "-cp310-abi3-" in compiled.name
    names = zipfile.ZipFile(compiled).namelist()
    assert {name.split("/")[0] for name in names} == {"gam_fused", f"gam_fused-{gam_fused.__version__}.dist-info"}
    for package in packages() | {"gam_fused/triton_kernels/"}:
        assert f"{package}__init__.py" in names
    kernels = {f"gam_fused/{path.relative_to(ROOT)}" for path in (ROOT / "triton_kernels").rglob("*.py")}
    assert {name for name in names if name.startswith("gam_fused/triton_kernels/")} == kernels
    assert "gam_fused/py.typed" in names
    assert "gam_fused/_cpu.abi3.so" in names


def test_sdist_holds_every_source_and_nothing_built(tmp_path):
    with tarfile.open(build_sdist(tmp_path)) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    for folder, pattern in (("csrc", "*.*"), ("gam_fused", "*.py"), ("triton_kernels", "*.py")):
        sources = {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob(pattern) if path.suffix != ".pyc"}
        assert {name for name in sources if "_not_built" not in name and not name.endswith(".so")} <= names
    assert {"MANIFEST.in", "pyproject.toml", "setup.py", "README.md", "LICENSE"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc", "_not_built.txt")) or name.startswith("tests")]


def test_a_wheel_from_the_sdist_works_in_an_environment_of_its_own(compiled, tmp_path):
    """There is nothing but torch, seen by a .pth. Installing needs no network."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path)], check=True)
    interpreter = str(tmp_path / "bin" / "python")
    install = [sys.executable, "-m", "pip", "--python", interpreter, "install", "--no-index", "--no-deps", str(compiled)]
    done = subprocess.run(install, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (packages,) = tmp_path.glob("lib/python*/site-packages")
    (packages / "torch.pth").write_text(str(Path(torch.__file__).parents[1]))
    done = subprocess.run([interpreter, "-I", "-c", SMOKE], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(packages / "gam_fused" / "__init__.py")


def test_the_objects_need_nothing_of_python(compiled):
    """An object that asks for no symbol of Python's works with every Python: abi3 is what its name can say of that."""
    for library in unpack(compiled).glob("gam_fused/*.so"):
        symbols = subprocess.run(["nm", "-D", str(library)], capture_output=True, text=True, check=True).stdout
        assert "gam_fused_built_from" in symbols
        assert not [name for name in symbols.split() if name.startswith(("Py", "_Py"))], library.name


def test_importing_brings_nothing_heavy_along():
    code = f"""
import sys, torch
before = set(sys.modules)
sys.path.insert(0, {str(ROOT)!r})
import gam_fused
print(*sorted(set(sys.modules) - before))
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    brought = done.stdout.split()
    assert "gam_fused.optimizer" in brought
    assert not [name for name in brought if name in HEAVY or name.startswith(tuple(f"{heavy}." for heavy in HEAVY))]


def test_pure_package_without_a_compiler(tmp_path):
    wheel, printed = build_wheel(tmp_path, CC="/nonexistent", CXX="/nonexistent", GAM_FUSED_REQUIRE_CPP="0")
    assert "no C++ compiler (/nonexistent)" in printed
    assert wheel.name.endswith("-py3-none-any.whl")
    code = "import gam_fused; b = gam_fused.available_backends(); print(b['torch'] == '', b['cpp'])"
    done = python(code, unpack(wheel))
    why = "True the compiled CPU extension was not built: no C++ compiler (/nonexistent); install one or set CXX"
    assert done.stdout.startswith(why), done.stderr


def compiler(folder: Path, *, fails: bool, version: str = "") -> str:
    """A compiler that makes empty files, or prints an error as nvcc and g++ do."""
    failure = "echo 'csrc/operators.h:7:1: error: a number too many'; echo 'compilation terminated.'; exit 1"
    success = 'while [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done'
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ("nvcc" if version else "c++")
    path.write_text(f"""#!/bin/sh
case "$1" in -dumpfullversion) echo 14.0.0; exit;; --version) echo 'c++ {version}'; exit;; esac
{failure if fails else success}
""")
    path.chmod(0o755)
    return str(path)


def test_a_cpu_backend_that_does_not_compile_says_why_in_the_compilers_words(tmp_path):
    wheel, printed = build_wheel(tmp_path, CXX=compiler(tmp_path, fails=True), GAM_FUSED_REQUIRE_CPP="0", **NO_CUDA)
    assert "it does not compile" in printed
    assert not any(name.endswith(".so") for name in zipfile.ZipFile(wheel).namelist())
    code = "import gam_fused; print(gam_fused.available_backends()['cpp'])"
    done = python(code, unpack(wheel))
    first, second, *_, last = done.stdout.splitlines()
    assert first == "the compiled CPU extension was not built: it does not compile:"
    assert second == "csrc/operators.h:7:1: error: a number too many"
    assert last == "once that is mended: pip install --no-build-isolation ."
    report = python("import runpy; runpy.run_module('gam_fused', run_name='__main__')", unpack(wheel))
    assert "error: a number too many" in report.stdout


SEES_A_GPU = "import torch; torch.version.cuda = '13.0'; torch.cuda.is_available = lambda: True; "


def test_a_cuda_backend_that_does_not_compile_leaves_the_other_and_says_why(tmp_path):
    """Torch has CUDA, as far as the build can see, and nvcc fails; the CPU backend's compiler makes an empty file."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text("import torch; torch.version.cuda = '13.0'\n")
    compiler(tmp_path / "toolkit" / "bin", fails=True, version="release 13.0")
    wheel, printed = build_wheel(
        tmp_path,
        CXX=compiler(tmp_path, fails=False),
        CUDA_HOME=str(tmp_path / "toolkit"),
        PYTHONPATH=str(tmp_path / "path"),
        GAM_FUSED_REQUIRE_CPP="1",
        FORCE_CUDA="0",
    )
    assert "the compiled CUDA backend is left out" in printed
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if name.endswith(".so")] == ["gam_fused/_cpu.abi3.so"]
    code = SEES_A_GPU + "import gam_fused; print(gam_fused.available_backends()['cuda'])"
    done = python(code, unpack(wheel))
    assert "the compiled CUDA extension was not built: it does not compile:\ncsrc/operators.h:7:1: error:" in done.stdout


def test_the_reason_and_the_backend_of_an_earlier_build_go(tmp_path):
    """Built in place, thrice: it compiles, it does not, it does."""
    for name in ("csrc", "gam_fused", "setup.py", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    for stale in (tmp_path / "gam_fused").glob("_c*.*"):
        stale.unlink()
    found = []
    for fails in (False, True, False):
        environment = os.environ | NO_CUDA | {"CXX": compiler(tmp_path, fails=fails), "GAM_FUSED_REQUIRE_CPP": "0"}
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--force"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append(sorted(path.name for path in (tmp_path / "gam_fused").glob("_cpu*")))
    assert found == [["_cpu.abi3.so"], ["_cpu_not_built.txt"], ["_cpu.abi3.so"]]


def test_requiring_the_backend_is_an_error_without_a_compiler(tmp_path):
    with pytest.raises(AssertionError, match="GAM_FUSED_REQUIRE_CPP=1, but no C"):
        build_wheel(tmp_path, CC="/nonexistent", CXX="/nonexistent", GAM_FUSED_REQUIRE_CPP="1")


@pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH")
def test_cuda_backend_builds_against_a_torch_without_cuda_and_stays_out_of_it(compiled):
    assert "gam_fused/_cuda.abi3.so" in zipfile.ZipFile(compiled).namelist()
    installed = unpack(compiled)
    done = python("import gam_fused; print(gam_fused.available_backends()['cuda'])", installed)
    assert done.returncode == 0, done.stderr
    if torch.version.cuda is None:
        assert "has no CUDA; install a CUDA build of torch" in done.stdout
    command = ["nm", "-D", "--undefined-only", str(installed / "gam_fused" / "_cuda.abi3.so")]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    foreign = [name for name in symbols.split() if name.startswith(("cu", "_ZN2at", "_ZN3c10", "_Py", "Py"))]
    assert not foreign, "only torch's stable ABI and the C++ library are needed at run time"


@pytest.mark.parametrize(
    ("nvcc", "line"),
    [
        ("", "no CUDA toolkit \\(nvcc\\); install one or set CUDA_HOME"),
        (
            "#!/bin/sh\necho 'Cuda compilation tools, release 11.8, V11.8.89'\n",
            "is of version 11.8, older than 12.0; upgrade it",
        ),
    ],
    ids=["missing", "too old"],
)
def test_toolkits_that_do_not_do_are_named_in_one_line(tmp_path, nvcc, line):
    (tmp_path / "toolkit" / "bin").mkdir(parents=True)
    if nvcc:
        (tmp_path / "toolkit" / "bin" / "nvcc").write_text(nvcc)
        (tmp_path / "toolkit" / "bin" / "nvcc").chmod(0o755)
    with pytest.raises(AssertionError, match=f"gam_fused: FORCE_CUDA=1, but .*{line}"):
        build_wheel(tmp_path, FORCE_CUDA="1", CUDA_HOME=str(tmp_path / "toolkit"))


@pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH")
def test_unknown_architectures_are_named(tmp_path):
    """The CPU backend is built before: by a compiler that only makes empty files."""
    with pytest.raises(AssertionError, match="TORCH_CUDA_ARCH_LIST holds 'volta'"):
        build_wheel(tmp_path, FORCE_CUDA="1", TORCH_CUDA_ARCH_LIST="8.0;volta", CXX=compiler(tmp_path / "bin", fails=False))


def test_triton_kernels_only_under_its_full_name():
    done = python("import triton_kernels", ROOT)
    assert done.returncode == 1
    assert "ImportError: this is gam_fused's triton_kernels" in done.stderr
    assert python("import gam_fused.triton_kernels", Path(sys.prefix)).returncode == 0
