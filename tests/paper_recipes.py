"""What tests of examples/paper need: torchvision beside a torch without CUDA, and two networks that train in no time.

As a program, `paper_recipes.py cifar ...` is `python -m examples.paper.cifar ...` with both, and takes $SECONDS_PER_STEP.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]


def installer() -> ModuleType:
    """`.ci/vision.py`, which puts torchvision and timm into a folder of their own, where the environment has none."""
    spec = importlib.util.spec_from_file_location("ci_vision", ROOT / ".ci" / "vision.py")
    vision = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(vision)
    return vision


def torchvision_without_operators() -> torch.library.Library | None:
    """What lets torchvision be imported where its operators cannot be loaded, as those of a CUDA build beside a CPU torch:
    names for the two that its Python code registers shapes for. Nothing here calls them."""
    operators = Path(importlib.util.find_spec("torchvision").origin).with_name("_C.so")
    try:
        torch.ops.load_library(operators)
        return None
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library


vision = installer()
if not vision.is_there():
    sys.path.append(str(vision.folder()))
if not vision.is_there():
    pytest.skip("needs torchvision and timm; make test installs them", allow_module_level=True)
LIBRARY = torchvision_without_operators()  # the names go with it
sys.path.insert(0, str(ROOT))  # for processes that start here

from examples.paper import models, run, training  # noqa: E402


def tiny(classes: int) -> nn.Module:
    """With batch norm and dropout."""
    layers = [nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2)]
    return nn.Sequential(*layers, nn.Linear(512, classes))


def plain(classes: int) -> nn.Module:
    """With neither: as many processes as one likes compute the same."""
    return nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(512, classes))


models.CIFAR |= {"tiny": tiny, "plain": plain}


class Slow(training.Training):
    """Which can be killed at leisure."""

    def _cosine(self, step: int) -> float:
        time.sleep(float(os.environ.get("SECONDS_PER_STEP", 0)))
        return super()._cosine(step)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run.Training = Slow
    script = importlib.import_module(f"examples.paper.{sys.argv.pop(1)}")
    script.main()
