"""Table 3: networks of torchvision's ImageNet weights, finetuned. `python -m examples.paper.transfer --help`."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from examples.paper import data, models
from examples.paper.loading import Augmented, test_batches
from examples.paper.run import command_line, launch, parse
from examples.paper.training import Job

ABOUT = "Finetunes a pretrained network: one cell of table 3, one seed."
DATASETS = ("cars", "cifar10", "cifar100", "pets", "food101")
EVALUATE_EVERY = 1000  # steps; an epoch of the smaller sets has 28


def defaults(options: Namespace) -> dict[str, Any]:
    """The paper's, for both optimizers. CIFAR's images stay as they are: its accuracies are those of small images."""
    size = 32 if options.dataset.startswith("cifar") else 224
    return {"batch_size": 128, "lr": 2e-3, "weight_decay": 1e-5, "image_size": size}


def make(options: Namespace) -> Job:
    train, test = data.load(options.dataset, options.data)
    transform, test_transform = data.transfer_transforms(options.dataset, options.image_size)
    return Job(
        models.pretrained(options.model, data.CLASSES[options.dataset], weights=options.data != "fake"),
        Augmented(train, transform, None, options.seed),
        test_batches(test, test_transform, options.batch_size, options.workers),
        steps=options.steps,
        evaluate_every=EVALUATE_EVERY,
    )


def options(arguments: Sequence[str] | None) -> Namespace:
    parser = command_line("transfer", ABOUT, models.PRETRAINED, DATASETS)
    parser.add_argument("--steps", type=int, default=40_000, help="of training")
    parser.add_argument("--image-size", type=int, help="pixels a side (32 for CIFAR, otherwise 224)")
    return parse(parser, arguments, defaults)


def main(arguments: Sequence[str] | None = None) -> None:
    launch(options(arguments), make)


if __name__ == "__main__":
    main()
