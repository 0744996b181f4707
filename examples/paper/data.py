"""The paper's datasets and augmentations, by torchvision; `fake` is a stand-in that every machine has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import Dataset
from torchvision import datasets
from torchvision.transforms import v2

AUGMENTATIONS = ("basic", "cutout", "randaugment", "autoaugment")

CLASSES = {"cifar10": 10, "cifar100": 100, "cars": 196, "pets": 37, "food101": 101, "imagenet": 1000}

# Means and standard deviations as in the released code.
CIFAR_STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}
CUTOUT = {"cifar10": 16, "cifar100": 8}  # the square's side: DeVries and Taylor, 2017

# What torchvision's class is called with, for the training and for the test images.
SOURCES: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]] = {
    "cifar10": (datasets.CIFAR10, {"train": True}, {"train": False}),
    "cifar100": (datasets.CIFAR100, {"train": True}, {"train": False}),
    "cars": (datasets.StanfordCars, {"split": "train"}, {"split": "test"}),
    "pets": (datasets.OxfordIIITPet, {"split": "trainval"}, {"split": "test"}),
    "food101": (datasets.Food101, {"split": "train"}, {"split": "test"}),
}


def load(name: str, folder: str) -> tuple[Any, Any]:
    """Training and test set, of (PIL image, label); downloaded to `folder` where they are not there yet.

    Raises:
        SystemExit: they are not there and cannot be downloaded.
    """
    if folder == "fake":
        return FakeData(0, 64), FakeData(64, 96)
    if name == "imagenet":
        missing = [f for f in ("train", "val") if not Path(folder, f).is_dir()]
        if missing:
            raise SystemExit(
                f"ImageNet is not in {folder}: put train/ and val/ there, with a folder of images a class in each, or give "
                "the folder that has them as --data"
            )
        return datasets.ImageFolder(str(Path(folder, "train"))), datasets.ImageFolder(str(Path(folder, "val")))
    source, *parts = SOURCES[name]
    try:
        train, test = (source(folder, download=not _is_there(source, folder, part), **part) for part in parts)
    except (OSError, RuntimeError, ValueError) as error:
        raise SystemExit(
            f"{source.__name__} is not in {folder} and could not be downloaded ({error}). Put its files there, as "
            f"torchvision.datasets.{source.__name__} lays them out, or give their folder as --data"
        ) from error
    return train, test


def _is_there(source: Callable[..., Any], folder: str, part: dict[str, Any]) -> bool:
    try:
        source(folder, download=False, **part)
    except RuntimeError:  # "not found or corrupted"
        return False
    return True


class FakeData(Dataset):
    """scikit-learn's handwritten digits from `first` to `last`, as colour images of 32 x 32: real, and soon learnt."""

    def __init__(self, first: int, last: int):
        from sklearn.datasets import load_digits  # here alone

        images, labels = load_digits(return_X_y=True)
        self.images = torch.tensor(images[first:last], dtype=torch.float32).view(-1, 1, 8, 8) / 16
        self.targets = labels[first:last].tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return v2.functional.to_pil_image(
            self.images[index].repeat_interleave(4, 1).repeat_interleave(4, 2).expand(3, -1, -1)
        ), self.targets[index]


def with_wrong_labels(labels: list[int], fraction: float, classes: int, seed: int) -> list[int]:
    """`labels` with exactly round(fraction * n) of them replaced by another class, uniformly."""
    random = torch.Generator().manual_seed(seed)
    wrong = torch.tensor(labels)
    chosen = torch.randperm(len(labels), generator=random)[: round(fraction * len(labels))]
    wrong[chosen] = (wrong[chosen] + torch.randint(1, classes, (len(chosen),), generator=random)) % classes
    return wrong.tolist()


def normalized(mean: tuple[float, ...], std: tuple[float, ...]) -> list[Any]:
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]


def cifar_transforms(dataset: str, augmentation: str) -> tuple[Any, Any]:
    """For training and for test images. `basic`: padding by four pixels, random crop, flip; the others go on top."""
    learned = {"randaugment": [v2.RandAugment()], "autoaugment": [v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)]}
    area = (CUTOUT[dataset] / 32) ** 2
    erased = {"cutout": [v2.RandomErasing(p=1.0, scale=(area, area), ratio=(1.0, 1.0))]}  # all of the square in the image
    normal = normalized(*CIFAR_STATISTICS[dataset])
    basic = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]
    train = [*basic, *learned.get(augmentation, []), *normal, *erased.get(augmentation, [])]
    return v2.Compose(train), v2.Compose(normal)


def imagenet_transforms(size: int) -> tuple[Any, Any]:
    """For training and for test images: a random part of the image, flipped or not; the middle."""
    normal = normalized(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    return v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *normal]), v2.Compose([*middle(size), *normal])


def transfer_transforms(dataset: str, size: int) -> tuple[Any, Any]:
    """For training and for test images: those of CIFAR as in training from scratch, nothing random for the others."""
    normal = normalized(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    if dataset.startswith("cifar"):
        grown = [v2.Resize(size)] if size != 32 else []
        crop = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]
        return v2.Compose([*crop, *grown, *normal]), v2.Compose([*grown, *normal])
    still = v2.Compose([*middle(size), *normal])
    return still, still


def middle(size: int) -> list[Any]:
    return [v2.Resize(size * 256 // 224), v2.CenterCrop(size)]
