"""A small ViT from scratch on 500 digits with true labels: no batch norm, a plateau at the start, AdamW."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from studies.defaults.networks.digits import data
from studies.defaults.networks.network import Network, small_weights
from studies.probe_transformer import PatchTransformer


def vit(seed: int) -> nn.Module:
    """Patches of 2 x 2, width 64, 2 blocks of 4 heads, MLP of 128, learned positions, mean pooling; small weights."""
    return small_weights(PatchTransformer(seed, width=64, depth=2, heads=4, hidden=128), seed)


VIT = Network(
    "vit",
    "digits, true labels, small ViT, AdamW",
    metric="accuracy",
    load=partial(data, noise=0.0),
    model=vit,
    base=torch.optim.AdamW,
    base_options={"lr": 1e-3, "weight_decay": 1e-2},
    batch_size=64,
    epochs=50,
    grid="small",
    tuning_seeds=2,
)
