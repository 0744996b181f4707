"""One wheel under every torch and every Python: `make wheels`.

    python .ci/wheels.py dist/gam_fused-*.whl --torch 2.10.0 2.14.1 --python 3.10 3.13

Each pair gets an environment of its own, in which the wheel is installed, its backends are loaded (loads.py) and
`python -m gam_fused` takes steps of every method in every backend that is there. A line tells how it went. uv makes the
environments out of links into one cache, so that the libraries that versions of torch share are fetched once. That cache, up
to 30 GB, and the environments are removed in the end, or stay in build/ with --keep.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = [f"3.{minor}" for minor in range(10, 15)]  # the first is what the package asks for


def interpreter(version: str) -> str:
    """A Python of this version, on PATH or among those of pyenv; "" where there is none."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv", "versions")
    for path in [*map(str, sorted(pyenv.glob(f"{version}.*/bin/python3"))), shutil.which(f"python{version}") or ""]:
        code = "import sys; print('%d.%d' % sys.version_info[:2])"
        if path and subprocess.run([path, "-c", code], capture_output=True, text=True).stdout.strip() == version:
            return path
    return ""


def attempt(wheel: Path, torch: str, python: str, folder: Path) -> tuple[bool, str]:
    """Whether the wheel works under a torch and a Python, and what there is to tell."""
    target = folder / f"torch-{torch}-python-{python}"
    mine = str(target / "bin" / "python")
    # uv takes certificates from its own list unless it is told to ask the system.
    cache = os.environ.get("UV_CACHE_DIR") or str(folder / "cache")
    settings = {"UV_CACHE_DIR": cache, "UV_SYSTEM_CERTS": "1", "UV_PYTHON_DOWNLOADS": "never"}
    settings["PYTHONDONTWRITEBYTECODE"] = ""  # uv compiles none, and torch is imported twice
    uv = [sys.executable, "-m", "uv", "--quiet"]
    shutil.rmtree(target, ignore_errors=True)
    commands = [
        [*uv, "venv", "--python", interpreter(python), str(target)],
        [*uv, "pip", "install", "--python", mine, "--only-binary", ":all:", f"torch=={torch}", str(wheel)],
        [mine, "-I", str(ROOT / ".ci" / "loads.py")],
        [mine, "-I", "-m", "gam_fused"],
    ]
    printed = ""
    for command in commands:
        done = subprocess.run(command, cwd=folder, env=os.environ | settings, capture_output=True, text=True)
        printed = done.stdout + done.stderr
        if done.returncode:
            return False, f"{' '.join(command[1:4])}: " + " ".join(printed.split())[-400:]
        if "loads.py" in command[-1]:
            loads = done.stdout.splitlines()[-1]
    shutil.rmtree(target)
    agree = re.findall(r"^  (\w+) +cpu: ok, differs from reference by (\S+)", printed, re.M)
    if "cpp" not in dict(agree):
        return False, f"the CPU backend is not among those that were tried: {' '.join(printed.split())[-400:]}"
    return True, f"{loads} Steps of every method agree: " + ", ".join(f"{name} {by}" for name, by in agree)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--torch", nargs="+", required=True, help="versions")
    parser.add_argument("--python", nargs="+", default=[v for v in PYTHONS if interpreter(v)], help="those that are found")
    parser.add_argument("--keep", action="store_true", help="do not remove the cache in the end")
    options = parser.parse_args()
    if missing := [version for version in options.python if not interpreter(version)]:
        parser.error(f"there is no Python {', '.join(missing)} on PATH or in pyenv: install it, or name others by --python")
    folder = ROOT / "build" / "wheels"
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{options.wheel.name} under Python {', '.join(options.python)}", flush=True)
    failed = 0
    for torch in options.torch:
        for python in options.python:
            good, told = attempt(options.wheel.resolve(), torch, python, folder)
            failed += not good
            print(f"torch {torch:<7} Python {python:<5} {'ok' if good else 'FAILED'}: {told}", flush=True)
    if not options.keep:
        shutil.rmtree(folder)
    print(f"{len(options.torch) * len(options.python) - failed} of {len(options.torch) * len(options.python)} pairs work")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
