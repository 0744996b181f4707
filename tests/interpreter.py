"""Runs tests with Triton's interpreter, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def in_the_interpreter(chosen: str, *tests: str) -> None:
    """Run `tests` (files, or tests in them), those of them that the expression `chosen` takes."""
    command = [sys.executable, "-m", "pytest", "-k", chosen, "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
