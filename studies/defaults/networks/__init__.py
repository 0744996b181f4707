"""The networks of the study, one file each."""

from __future__ import annotations

from studies.defaults.networks.digits import DIGITS, DIGITS_ADAMW
from studies.defaults.networks.gpt import GPT
from studies.defaults.networks.mnist import MNIST, MNIST_CLEAN
from studies.defaults.networks.network import Data, Network
from studies.defaults.networks.vit import VIT

NETWORKS = {network.name: network for network in (DIGITS, DIGITS_ADAMW, MNIST, MNIST_CLEAN, VIT, GPT)}

__all__ = ["NETWORKS", "Data", "Network"]
