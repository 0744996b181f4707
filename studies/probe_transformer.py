"""A small pre-norm transformer for 8 x 8 images, each 2 x 2 patch a token."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class PatchTransformer(nn.Module):
    """[n, 1, 8, 8] -> [n, classes]; the same `seed` gives the same weights, and the global random state stays."""

    def __init__(
        self, seed: int, width: int = 64, depth: int = 2, heads: int = 4, classes: int = 10, hidden: int | None = None
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Conv2d(1, width, 2, stride=2)
            self.position = nn.Parameter(0.02 * torch.randn(1, 16, width))
            self.blocks = nn.Sequential(*(Block(width, heads, hidden) for _ in range(depth)))
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embed(images).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(tokens)).mean(dim=1))


class Block(nn.Module):
    """Attention and an MLP, each behind a layer norm, each added to its input.

    Args:
        hidden: width inside the MLP; None is four times `width`.
        causal: a token sees only those before it, and itself.
    """

    def __init__(self, width: int, heads: int, hidden: int | None = None, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        hidden = 4 * width if hidden is None else hidden
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))
