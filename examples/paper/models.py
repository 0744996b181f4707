"""The paper's networks: torchvision's and timm's where they have them, and two of this folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

import timm
import torch
from torch import nn
from torchvision import models

from examples.paper.pyramidnet import PyramidNet
from examples.paper.wide_resnet import WideResNet

Build = Callable[[], nn.Module]

TRANSFORMERS = ("vit_tiny", "vit_s32", "vit_b32", "swin_t")  # trained with AdamW; the others with SGD

CIFAR: dict[str, Callable[[int], nn.Module]] = {
    "resnet18": lambda classes: with_small_stem(models.resnet18(num_classes=classes)),
    "resnet101": lambda classes: with_small_stem(models.resnet101(num_classes=classes)),
    "resnext50": lambda classes: with_small_stem(models.resnext50_32x4d(num_classes=classes)),
    "wrn28_2": lambda classes: WideResNet(28, 2, classes),
    "wrn28_10": lambda classes: WideResNet(28, 10, classes),
    "pyramidnet110": lambda classes: PyramidNet(110, 270, classes),
    "pyramidnet110_narrow": lambda classes: PyramidNet(110, 270, classes, narrow=True),  # the released code's
    "vit_tiny": lambda classes: timm.create_model("vit_tiny_patch16_224", num_classes=classes, img_size=32, patch_size=4),
}

IMAGENET: dict[str, Callable[[int, int], nn.Module]] = {  # by the number of classes and the size of images
    "resnet50": lambda classes, size: models.resnet50(num_classes=classes),
    "resnet101": lambda classes, size: models.resnet101(num_classes=classes),
    "vit_s32": lambda classes, size: timm.create_model("vit_small_patch32_224", num_classes=classes, img_size=size),
    "vit_b32": lambda classes, size: timm.create_model("vit_base_patch32_224", num_classes=classes, img_size=size),
}

PRETRAINED = {
    "efficientnet_b0": (models.efficientnet_b0, models.EfficientNet_B0_Weights.IMAGENET1K_V1),
    "swin_t": (models.swin_t, models.Swin_T_Weights.IMAGENET1K_V1),
}


def with_small_stem(net: models.ResNet) -> models.ResNet:
    """ResNet for 32 x 32 images: the first convolution is 3 x 3 with stride 1, and nothing is pooled after it."""
    net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's others
    net.maxpool = nn.Identity()
    return net


def pretrained(name: str, classes: int, weights: bool = True) -> nn.Module:
    """A network with torchvision's ImageNet weights in all but a last layer of its own.

    Raises:
        SystemExit: the weights are not here and cannot be downloaded.
    """
    build, trained = PRETRAINED[name]
    try:
        net = build(weights=trained if weights else None)
    except URLError as error:
        folder = Path(torch.hub.get_dir(), "checkpoints")
        raise SystemExit(
            f"The ImageNet weights of {name} are not in {folder} and could not be downloaded ({error.reason}). "
            f"Put {Path(trained.url).name} there, from {trained.url}"
        ) from error
    if name == "swin_t":
        net.head = nn.Linear(net.head.in_features, classes)
    else:
        net.classifier[-1] = nn.Linear(net.classifier[-1].in_features, classes)
    return net
