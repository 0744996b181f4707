"""Compiles csrc/ against the headers of some versions of torch, without installing them: `make headers`.

    python .ci/headers.py 2.10.0 2.14.1

pip tells where it would take the wheel of a version from. Of that archive of hundreds of MB only the headers are read, some
10 MB, by ranges, where the server has them; otherwise all of it. They are kept in build/. C++ is checked for syntax and
types; CUDA, where there is nvcc, is compiled to PTX.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "csrc"))

import toolchain  # noqa: E402

HEADERS = "torch/include/"
BLOCK = 4 << 20  # bytes that are read at a time
# Headers are the same for every Python; this one has wheels of every torch.
WHEEL = ["--python-version", "3.12", "--platform", "manylinux_2_28_x86_64", "--only-binary", ":all:", "--no-deps"]


def wheel(version: str) -> str:
    """The address of a wheel of torch, in the index that pip is set up for."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", *WHEEL]
        command += ["--target", str(Path(folder, "target")), "--report", str(report), f"torch=={version}"]
        subprocess.run(command, check=True)
        return json.loads(report.read_text())["install"][0]["download_info"]["url"]


def headers(version: str) -> Path:
    """The include folder of a version of torch; read, if that has not been done."""
    folder = ROOT / "build" / f"headers-{version}"
    if not folder.exists():
        address = wheel(version)
        print(f"torch {version}: reading the headers of {address.rsplit('/', 1)[-1]}", flush=True)
        unfinished = folder.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            with fsspec.open(address, block_size=BLOCK, cache_type="readahead") as file:
                extract(file, unfinished)
        except Exception as error:
            print(f"torch {version}: not by ranges ({error}); downloading the wheel", flush=True)
            shutil.rmtree(unfinished, ignore_errors=True)
            with tempfile.TemporaryDirectory() as whole:
                download = [sys.executable, "-m", "pip", "download", "--quiet", *WHEEL, "--dest", whole, f"torch=={version}"]
                subprocess.run(download, check=True)
                extract(next(Path(whole).glob("*.whl")), unfinished)
        unfinished.rename(folder)
    return folder / HEADERS


def extract(archive: object, folder: Path) -> None:
    """Unpack the headers of a wheel, in the order they lie in it."""
    with zipfile.ZipFile(archive) as file:
        found = [member for member in file.infolist() if member.filename.startswith(HEADERS)]
        file.extractall(folder, sorted(found, key=lambda member: member.header_offset))


def commands(include: Path, target: Path) -> list[list[str]]:
    """A command for every source of csrc/cpu and csrc/cuda, with the options that setup.py builds with."""
    includes = [str(include), str(include / "torch" / "csrc" / "api" / "include")]
    check = [*toolchain.cxx(), *toolchain.CXX_FLAGS, "-fsyntax-only", f"-I{sysconfig.get_path('include')}"]
    check += [f"-I{path}" for path in includes]
    result = [[*check, str(source)] for source in sorted((toolchain.CSRC / "cpu").glob("*.cpp"))]
    result.append([*check, "-DUSE_CUDA", "-DGAM_LIBRARY=gam_fused", str(toolchain.CSRC / "cuda" / "bindings.cpp")])
    if why := toolchain.cuda_missing():
        print(f"The .cu files, which include nothing of torch, are left out: {why}")
        return result
    kernels = [toolchain.nvcc()[0], *toolchain.NVCC_FLAGS, "-DGAM_MANY_WORDS", "-arch=compute_90", "-ptx"]
    for source in sorted((toolchain.CSRC / "cuda").glob("*.cu")):
        result.append([*kernels, *(f"-I{path}" for path in includes), str(source), "-o", str(target / f"{source.stem}.ptx")])
    return result


def compiles(version: str) -> bool:
    """Whether every source compiles against the headers of a version of torch; prints what does not, and why."""
    include = headers(version)

    def attempt(command: list[str]) -> str:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        return toolchain.first_errors(done.stdout) or f"status {done.returncode}" if done.returncode else ""

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(toolchain.jobs()) as pool:
        attempts = commands(include, Path(folder))
        failed = [why for why in pool.map(attempt, attempts) if why]
    print(
        f"torch {version}: {len(attempts) - len(failed)} of {len(attempts)} sources compile", *failed, sep="\n", flush=True
    )
    return not failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="+")
    failed = [version for version in parser.parse_args().versions if not compiles(version)]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
