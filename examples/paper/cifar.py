"""Table 1 and section 5.5: networks trained on CIFAR from scratch. `python -m examples.paper.cifar --help`."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from examples.paper import data, models
from examples.paper.loading import Augmented, test_batches
from examples.paper.methods import base_of
from examples.paper.run import command_line, launch, parse, part
from examples.paper.training import Job

ABOUT = "Trains a network on CIFAR from scratch: one cell of table 1, one seed."


def defaults(options: Namespace) -> dict[str, Any]:
    """The paper's, and the released code's; AdamW's are this script's."""
    if base_of(options.model) == "AdamW":
        return {"batch_size": 128, "lr": 1e-3, "weight_decay": 0.05}
    return {"batch_size": 128, "lr": 0.1, "weight_decay": 5e-4}


def make(options: Namespace) -> Job:
    classes = data.CLASSES[options.dataset]
    train, test = data.load(options.dataset, options.data)
    labels = (
        data.with_wrong_labels(train.targets, options.label_noise, classes, options.seed) if options.label_noise else None
    )
    transform, test_transform = data.cifar_transforms(options.dataset, options.augmentation)
    steps_per_epoch = len(train) // options.batch_size
    # The released code spreads the smoothing over the wrong classes, torch over all.
    smoothing = options.label_smoothing * classes / (classes - 1)
    return Job(
        models.CIFAR[options.model](classes),
        Augmented(train, transform, labels, options.seed),
        test_batches(test, test_transform, options.batch_size, options.workers),
        steps=options.epochs * steps_per_epoch,
        evaluate_every=steps_per_epoch,
        label_smoothing=smoothing,
    )


def options(arguments: Sequence[str] | None) -> Namespace:
    parser = command_line("cifar", ABOUT, models.CIFAR, ("cifar100", "cifar10"))
    parser.add_argument("--augmentation", choices=data.AUGMENTATIONS, default="basic", help="basic: padding, crop, flip")
    parser.add_argument("--label-noise", type=part, default=0.0, help="part of the training labels that are wrong")
    parser.add_argument("--label-smoothing", type=float, default=0.1, help="probability of all wrong classes together")
    parser.add_argument("--epochs", type=int, default=200, help="of training")
    return parse(parser, arguments, defaults)


def main(arguments: Sequence[str] | None = None) -> None:
    launch(options(arguments), make)


if __name__ == "__main__":
    main()
