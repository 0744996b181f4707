"""What tests of examples/paper need: torchvision beside a torch without CUDA, and two networks that train in no time.

As a program, `paper_recipes.py cifar ...` is `python -m examples.paper.cifar ...` with both.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

for name in ("torchvision", "timm"):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed", allow_module_level=True)


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


LIBRARY = torchvision_without_operators()  # the names go with it
sys.path.insert(0, str(Path(__file__).parents[1]))

from examples.paper import models  # noqa: E402


def tiny(classes: int) -> nn.Module:
    """With batch norm and dropout."""
    layers = [nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2)]
    return nn.Sequential(*layers, nn.Linear(512, classes))


def plain(classes: int) -> nn.Module:
    """With neither: as many processes as one likes compute the same."""
    return nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(512, classes))


models.CIFAR |= {"tiny": tiny, "plain": plain}

if __name__ == "__main__":
    torch.set_num_threads(1)
    script = importlib.import_module(f"examples.paper.{sys.argv.pop(1)}")
    script.main()
