"""Parameter shapes of networks people train."""

from __future__ import annotations

import torch
from torch import nn

Shapes = list[tuple[int, ...]]


def resnet18() -> Shapes:
    """ResNet-18 with 1,000 classes: 62 tensors, 11.7 M elements."""
    shapes: Shapes = [(64, 3, 7, 7), (64,), (64,)]
    width_in = 64
    for width in (64, 128, 256, 512):
        for block in range(2):
            for conv in ((width, width_in, 3, 3), (width, width, 3, 3)):
                shapes += [conv, (width,), (width,)]
            if block == 0 and width != width_in:
                shapes += [(width, width_in, 1, 1), (width,), (width,)]
            width_in = width
    return [*shapes, (1000, 512), (1000,)]


def resnet50() -> list[tuple[int, ...]]:
    """ResNet-50 with 1,000 classes: 161 tensors, 25.6 M elements."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    width_in = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for conv in ((width, width_in, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)):
                shapes += [conv, (conv[0],), (conv[0],)]
            if block == 0:
                shapes += [(4 * width, width_in, 1, 1), (4 * width,), (4 * width,)]
            width_in = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def tiny() -> list[tuple[int, ...]]:
    """As many tensors as ResNet-50, of 64 elements: what remains is host time."""
    return [(64,)] * 161


def vit_b_32() -> Shapes:
    """ViT-B/32 for 224 x 224 images and 1,000 classes: 152 tensors, 88.2 M elements."""
    with torch.device("meta"):
        blocks, norm = _encoder(width=768, depth=12, heads=12, hidden=3072), nn.LayerNorm(768)
        patches, head = nn.Conv2d(3, 768, 32, stride=32), nn.Linear(768, 1000)
    return [(1, 1, 768), (1, 1 + 7 * 7, 768), *_shapes(patches, blocks, norm, head)]


def transformer_1b() -> Shapes:
    """A language model of about 1.2 G elements: Llama where transformers is installed, else torch's encoder."""
    with torch.device("meta"):
        try:
            return _shapes(_llama())
        except (ImportError, RuntimeError):  # transformers wraps the first into the second
            return _shapes(nn.Embedding(50_000, 2048), _encoder(width=2048, depth=22, heads=32, hidden=8192))


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def _encoder(*, width: int, depth: int, heads: int, hidden: int) -> nn.Module:
    layers = (nn.TransformerEncoderLayer(width, heads, hidden, norm_first=True, batch_first=True) for _ in range(depth))
    return nn.Sequential(*layers)


def _shapes(*modules: nn.Module) -> Shapes:
    return [tuple(p.shape) for module in modules for p in module.parameters()]
