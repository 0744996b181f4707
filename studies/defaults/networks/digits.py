"""The conv net of the main job: 500 digits, a fifth of the labels wrong, with SGD and with AdamW."""

from __future__ import annotations

import torch

from examples.digits.data import load
from examples.digits.methods import BASES
from examples.digits.net import conv_net
from studies.defaults.networks.network import Data, Network

NOISE = 0.2


def data(seed: int, validation: bool, noise: float = NOISE) -> Data:
    """As in the main job; a validation fold is a fifth of the training images."""
    split = load(seed, noise, validation)
    return Data(split.images, split.labels, split.test_images, split.test_labels)


DIGITS = Network(
    "digits",
    "digits, 20 % wrong labels, conv net, SGD",
    metric="accuracy",
    load=data,
    model=conv_net,
    base=torch.optim.SGD,
    base_options=BASES["SGD"][1],
    batch_size=64,
    epochs=30,
    eigenvalue=True,
    grid="full",
    report_seeds=10,
)

DIGITS_ADAMW = Network(
    "digits-adamw",
    "digits, 20 % wrong labels, conv net, AdamW",
    metric="accuracy",
    load=data,
    model=conv_net,
    base=torch.optim.AdamW,
    base_options=BASES["AdamW"][1],
    batch_size=64,
    epochs=30,
    eigenvalue=True,
)
