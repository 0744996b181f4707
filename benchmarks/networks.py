"""The networks whose cost is measured, from `transformers` configurations with the published models' settings.

On the meta device they give parameter shapes without memory (`shapes`); elsewhere they are trained, from random weights.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn

from examples.digits.net import conv_net

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is looked up

Shapes = tuple[tuple[int, ...], ...]


def _resnet(*, depths: list[int], layer: str, widths: list[int], classes: int = 1000) -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(depths=depths, layer_type=layer, hidden_sizes=widths, num_labels=classes)
    return ResNetForImageClassification(config)


def resnet50() -> nn.Module:
    """He et al. 2016: 161 tensors, 25.6 M parameters."""
    return _resnet(depths=[3, 4, 6, 3], layer="bottleneck", widths=[256, 512, 1024, 2048])


def resnet18_cifar() -> nn.Module:
    """ResNet-18 (He et al. 2016) for 32 x 32 images and 100 classes: a 3 x 3 stem without pooling, as is usual there."""
    model = _resnet(depths=[2, 2, 2, 2], layer="basic", widths=[64, 128, 256, 512], classes=100)
    stem = model.resnet.embedder
    stem.embedder.convolution = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    stem.pooler = nn.Identity()
    return model


def _vit(*, width: int, heads: int) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    size = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": heads}
    return ViTForImageClassification(ViTConfig(patch_size=32, num_labels=1000, **size))


def vit_s_32() -> nn.Module:
    """ViT-S/32 (Touvron et al. 2021) at 224 x 224: 200 tensors, 22.9 M parameters."""
    return _vit(width=384, heads=6)


def vit_b_32() -> nn.Module:
    """ViT-B/32 (Dosovitskiy et al. 2021) at 224 x 224: 200 tensors, 88.2 M parameters."""
    return _vit(width=768, heads=12)


def transformer_1b() -> nn.Module:
    """A Llama of 1.2 G parameters in 146 tensors."""
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    config = LlamaConfig(vocab_size=128_256, num_key_value_heads=8, tie_word_embeddings=True, **size)
    return LlamaForCausalLM(config)


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    build.__name__: build for build in (resnet50, resnet18_cifar, vit_s_32, vit_b_32, transformer_1b)
}
IMAGES = {"digits": (1, 8), "resnet18_cifar": (3, 32)}  # channels, height and width; (3, 224) otherwise


def built(name: str) -> nn.Module:
    """A network of `BUILDERS`.

    Raises:
        ImportError: `transformers` is not there.
    """
    try:
        return BUILDERS[name]()
    except ImportError as error:
        raise ImportError(
            f"{name} is built by transformers, which is missing: pip install transformers ({error})"
        ) from error


@lru_cache
def shapes(name: str) -> Shapes:
    """Shapes of the parameters of a network; "tiny" is 161 tensors of 64 elements, where only host time is left."""
    if name == "tiny":
        return ((64,),) * 161
    with torch.device("meta"):
        return tuple(tuple(p.shape) for p in built(name).parameters())


class Logits(nn.Module):
    """A classifier of `transformers` that returns its logits alone."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).logits


def classifier(name: str, device: torch.device) -> nn.Module:
    """A network to train on images [n, channels, height, width], in training mode; "digits" is the main job's."""
    if name == "digits":
        return conv_net(seed=0).to(device)
    torch.manual_seed(0)
    with device:
        return Logits(built(name)).train()


def batch(name: str, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random images and labels for `classifier(name)`."""
    channels, side = IMAGES.get(name, (3, 224))
    generator = torch.Generator(device).manual_seed(0)
    images = torch.randn(size, channels, side, side, generator=generator, device=device)
    return images, torch.randint(10, (size,), generator=generator, device=device)
