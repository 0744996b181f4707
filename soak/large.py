"""A tensor of 2^31 + 4,099 elements through every kernel, in each backend that needs no copy of it in float64.

In a process of its own, which gives the memory back; left out where there is not enough.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from gam_fused import available_backends
from soak.turns import Turns

ROOT = Path(__file__).parents[1]
BACKENDS = ("cpp", "torch")
SPARE = 2 << 30  # bytes that others may want meanwhile


def available() -> int:
    """Bytes of memory that are free, or can be; 0 where the system does not tell."""
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 0)


def reason(backend: str) -> str:
    """Why it cannot be run here, or ""."""
    from large import BYTES

    if why := available_backends()[backend]:
        return why
    needed, there = BYTES + SPARE, available()
    return "" if there >= needed else f"needs {needed / 2**30:.0f} GiB of memory, {there / 2**30:.0f} are free"


def checked(backend: str) -> str:
    """Returns "" or what went wrong."""
    code = f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]!r}; import torch, large; "
    code += f"from cases import get_backend; large.check(get_backend({backend!r}), torch.device('cpu')); print('done')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return "" if done.returncode == 0 and done.stdout == "done\n" else f"{done.returncode}: {done.stderr[-1500:]}"


def run(seconds: float = float("inf"), number: int = 0) -> dict[str, Any]:
    """Every backend once, whatever that takes: a minute or two."""
    turns, outcomes = Turns("large", count=len(BACKENDS)), {}
    for _, backend in zip(turns, BACKENDS, strict=False):
        outcomes[backend] = reason(backend)
        if not outcomes[backend]:
            outcomes[backend] = "right"
            if wrong := checked(backend):
                outcomes[backend] = "wrong"
                turns.fail(f"{backend}: {wrong}")
    return turns.figures(outcomes=outcomes)
