"""All clients by name. None has batch norm; no data is downloaded."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW

from studies.clients import characters, digits, mnist, physics
from studies.clients.client import Client, shuffled
from studies.probe_transformer import PatchTransformer

BATCH = 64


def _mnist(label: str, base: type, lr: float, batch: int) -> Client:
    return Client(
        label,
        mnist.net,
        lambda seed: shuffled(mnist.split()[0], batch, seed),
        mnist.loss,
        lambda: mnist.split()[1],
        base,
        {"lr": lr},
        steps=44,
    )


def _digits(label: str, model: Callable[[], nn.Module], base: type, steps: int) -> Client:
    return Client(
        label,
        model,
        lambda seed: shuffled(digits.split()[0], BATCH, seed),
        digits.loss,
        lambda: digits.split()[1],
        base,
        {"lr": 1e-3},
        steps,
    )


CLIENTS: dict[str, Client] = {
    "mnist_sgd": _mnist("MNIST conv net, SGD 0.01", SGD, 0.01, BATCH),
    "mnist_adam": _mnist("MNIST conv net, Adam", Adam, 1e-3, BATCH // 2),  # it gets there on fewer images
    "characters": Client(
        "character model, AdamW",
        characters.CharacterModel,
        characters.batches,
        characters.loss,
        characters.held_out,
        AdamW,
        {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1},
        steps=250,
    ),
    "vit": _digits("ViT, AdamW", lambda: PatchTransformer(seed=int(torch.randint(2**31, ()))), AdamW, steps=100),
    "lstm": _digits("LSTM, Adam", digits.RowByRow, Adam, steps=300),
    "physics": Client(
        "physics-informed, Adam", physics.net, physics.batches, physics.loss, physics.grid, Adam, {"lr": 1e-3}, steps=500
    ),
}
