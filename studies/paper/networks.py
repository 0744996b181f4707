"""What is trained: table 1's three networks on two data sets, wrong labels, and table 3's fine-tuning."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from examples.digits.methods import BASES
from examples.digits.net import conv_net
from studies.defaults.networks import Data, Network, digits, mnist
from studies.defaults.networks.vit import vit
from studies.paper import transfer
from studies.paper.architectures import residual_net

NOISE_LEVELS = (0.0, 0.2, 0.4, 0.6)
TUNED_NOISE = 0.2  # hyperparameters for wrong labels are chosen here and used at every level

LOAD: dict[str, Callable[..., Data]] = {"digits": digits.data, "MNIST": mnist.data}
MODELS: dict[str, dict[str, Callable[[int], nn.Module]]] = {
    "conv net": {"digits": conv_net, "MNIST": mnist.small_cnn},
    "ResNet": {"digits": partial(residual_net, width=8), "MNIST": partial(residual_net, width=8, pooled=True)},
    "wide ResNet": {"digits": partial(residual_net, width=16), "MNIST": partial(residual_net, width=16, pooled=True)},
}
FINE_TUNED = {"conv net": MODELS["conv net"], "ViT": {"digits": vit, "MNIST": partial(transfer.pooled, vit)}}
EPOCHS = {"digits": 30, "MNIST": 15}


def _network(data: str, model: str, noise: float) -> Network:
    base, options = BASES["SGD"]
    return Network(
        f"{data}, {model}, {100 * noise:.0f} % wrong labels",
        f"{data}, {model}",
        metric="accuracy",
        load=partial(LOAD[data], noise=noise),
        model=MODELS[model][data],
        base=base,
        base_options=options,
        batch_size=64,
        epochs=EPOCHS[data],
    )


def _transfer(data: str, model: str) -> Network:
    base, options = BASES["SGD" if model == "conv net" else "AdamW"]
    images = transfer.DATA[data]
    return Network(
        f"{data}, {model}, fine-tuned",
        f"{data}, {model}",
        metric="accuracy",
        load=partial(transfer.fine_tuning, images),
        model=partial(transfer.pretrained, images, FINE_TUNED[model][data]),
        base=base,
        base_options=options,
        batch_size=64,
        epochs=transfer.EPOCHS,
    )


TABLE1 = [_network(data, model, 0.0) for data in LOAD for model in MODELS]
NOISE = {(data, noise): _network(data, "conv net", noise) for data in LOAD for noise in NOISE_LEVELS}
TRANSFER = [_transfer(data, model) for data in transfer.DATA for model in FINE_TUNED]
NETWORKS = {network.name: network for network in (*TABLE1, *NOISE.values(), *TRANSFER)}
