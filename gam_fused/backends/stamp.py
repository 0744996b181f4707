"""What a compiled backend was built from, as a text that is compiled into it and compared with when it is loaded.

A shared object that stays behind when the sources beside it change (`git pull` without a build) takes other operands than
Python gives, or takes them for something else. setup.py runs this file too, without importing the package or torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
CSRC = PACKAGE.parent / "csrc"
UNSTAMPED = "no version that is told"


def sources(backend: str) -> list[Path]:
    """What the backend "cpu" or "cuda" is compiled from, and with which options; none in a wheel, which has no sources."""
    if not (CSRC / "operands.h").exists():
        return []
    files = (path for folder in (CSRC, CSRC / "math", CSRC / backend) for path in folder.iterdir())
    return sorted(path for path in files if path.suffix in (".h", ".cpp", ".cu", ".cuh", ".py"))


def version() -> str:
    """The package's."""
    found = re.search(r'^__version__ = "(.+)"$', (PACKAGE / "__init__.py").read_text(), re.MULTILINE)
    assert found
    return found[1]


def stamp(backend: str) -> str:
    """The version and a hash of the sources: one word for C++'s preprocessor, since it begins with a number.

    Comments and the layout of C++ do not count.
    """
    hashed = hashlib.sha256()
    for path in sources(backend):
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".py":
            text = " ".join(re.sub(r"//.*", "", text).split())
        hashed.update(f"{path.relative_to(CSRC).as_posix()}\0{text}\0".encode())
    return f"{version()}.{hashed.hexdigest()[:16]}"


def stamp_of(library: Path) -> str:
    """The stamp in a shared object, which is loaded."""
    try:
        built_from = ctypes.CDLL(str(library)).gam_fused_built_from
    except AttributeError:
        return UNSTAMPED
    built_from.restype = ctypes.c_char_p
    text: bytes = built_from()
    return text.decode()


def is_of(built_from: str, backend: str) -> bool:
    """Whether an object with the stamp `built_from` belongs to this package: by the version alone where no sources are."""
    return built_from == stamp(backend) if sources(backend) else built_from.rpartition(".")[0] == version()
