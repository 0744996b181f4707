"""torchvision and timm for the tests, and nothing else touched: `python .ci/vision.py [options of pip]`.

Where the environment has both, as of people who train on images, they are used. Otherwise those that belong to this torch
are put into a folder of their own in build/. In the environment itself a torchvision whose compiled operators do not load,
as one for CUDA beside a torch without, would break Lightning and transformers, which import it where they find it.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import torch

BUILD = Path(__file__).resolve().parents[1] / "build"
PACKAGES = ("torchvision", "timm")


def folder() -> Path:
    """Where they are for this Python and this torch."""
    return BUILD / f"vision-{sys.implementation.cache_tag}-torch-{torch.__version__}"


def is_there() -> bool:
    return all(importlib.util.find_spec(name) for name in PACKAGES)


def requirements() -> list[str]:
    """torchvision 0.n + 15 is built for torch 2.n."""
    minor = int(torch.__version__.split(".")[1])
    return [f"torchvision==0.{minor + 15}.*", "timm"]


def main() -> None:
    if is_there():
        return
    # What they ask for is there: numpy, pillow, and what transformers asks for too.
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(folder())]
    subprocess.run([*install, *sys.argv[1:], *requirements()], check=True)


if __name__ == "__main__":
    main()
