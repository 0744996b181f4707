"""Table 2: networks trained on ImageNet from scratch. `python -m examples.paper.imagenet --help`."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from examples.paper import data, models
from examples.paper.loading import Augmented, test_batches
from examples.paper.methods import base_of
from examples.paper.run import command_line, launch, parse
from examples.paper.training import Job

ABOUT = "Trains a network on ImageNet from scratch: one column of a row of table 2, one seed."


def defaults(options: Namespace) -> dict[str, Any]:
    """The paper's. Its learning rate of 0.1 cannot be AdamW's: that is this script's, DeiT's at this batch size."""
    shared = {"batch_size": 256, "weight_decay": 1e-4}
    if base_of(options.model) == "AdamW":
        return {**shared, "epochs": 300, "lr": 2.5e-4}
    return {**shared, "epochs": 90, "lr": 0.1}


def make(options: Namespace) -> Job:
    train, test = data.load("imagenet", options.data)
    transform, test_transform = data.imagenet_transforms(options.image_size)
    steps_per_epoch = len(train) // options.batch_size
    return Job(
        models.IMAGENET[options.model](data.CLASSES["imagenet"], options.image_size),
        Augmented(train, transform, None, options.seed),
        test_batches(test, test_transform, options.batch_size, options.workers),
        steps=options.epochs * steps_per_epoch,
        evaluate_every=steps_per_epoch,
        warmup=0.02 if base_of(options.model) == "AdamW" else 0.0,  # ViTs do not start without: 6 epochs of 300
    )


def options(arguments: Sequence[str] | None) -> Namespace:
    parser = command_line("imagenet", ABOUT, models.IMAGENET, ("imagenet",))
    parser.add_argument("--epochs", type=int, help="of training (90 for ResNets, 300 for ViTs)")
    parser.add_argument("--image-size", type=int, default=224, help="pixels a side")
    return parse(parser, arguments, defaults)


def main(arguments: Sequence[str] | None = None) -> None:
    launch(options(arguments), make)


if __name__ == "__main__":
    main()
