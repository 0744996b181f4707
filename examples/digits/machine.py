"""What a figure must stand beside: machine, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, Any]:
    """The processor, the versions of Python and torch, the commit and today's date."""
    git = ("git", "-C", str(Path(__file__).parent))
    commit = printed(*git, "rev-parse", "--short", "HEAD") or os.environ.get("COMMIT", "unknown")  # a copy has no history
    changed = printed(*git, "status", "--porcelain", "-uno")
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit + "+changes" * bool(changed),
        "date": time.strftime("%Y-%m-%d"),
    }


def printed(*command: str) -> str:
    """What a program prints; "" where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":", 1)[1].strip() if names else platform.processor()
