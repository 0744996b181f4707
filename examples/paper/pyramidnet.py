"""PyramidNet for 32 x 32 images (Han, Kim and Kim, CVPR 2017), which neither torchvision nor timm has."""

from __future__ import annotations

from torch import Tensor, nn

from examples.paper.wide_resnet import conv


class Block(nn.Module):
    """Convolutions with batch norm before each and after the last, and no ReLU before the first.

    The shortcut has no weights: it is averaged where the size halves, and zero in the channels that the block adds.
    """

    def __init__(self, inputs: int, *layers: nn.Conv2d):
        super().__init__()
        residual: list[nn.Module] = []
        for layer in layers:
            residual += [nn.BatchNorm2d(layer.in_channels), *([nn.ReLU()] if residual else []), layer]
        self.added = layers[-1].out_channels - inputs
        self.residual = nn.Sequential(*residual, nn.BatchNorm2d(layers[-1].out_channels))
        halves = any(layer.stride == (2, 2) for layer in layers)
        self.shortcut = nn.AvgPool2d(2) if halves else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.residual(x) + nn.functional.pad(self.shortcut(x), (0, 0, 0, 0, 0, self.added))


def basic(inputs: int, width: int, stride: int) -> Block:
    return Block(inputs, conv(inputs, width, stride=stride), conv(width, width))


def bottleneck(inputs: int, width: int, stride: int) -> Block:
    return Block(inputs, conv(inputs, width, 1), conv(width, width, stride=stride), conv(width, 4 * width, 1))


class PyramidNet(nn.Sequential):
    """`depth` layers; the width grows by the same step in every block, by `alpha` in all: [n, 3, 32, 32] -> [n, classes]."""

    def __init__(self, depth: int, alpha: int, classes: int, narrow: bool = False):
        """narrow: of bottlenecks, which have three layers in place of two."""
        block, expansion = (bottleneck, 4) if narrow else (basic, 1)
        blocks, channels = (depth - 2) // (9 if narrow else 6), 16
        layers: list[nn.Module] = [conv(3, channels), nn.BatchNorm2d(channels)]
        for i in range(3 * blocks):
            width = round(16 + alpha * (i + 1) / (3 * blocks))
            layers.append(block(channels, width, stride=2 if i in (blocks, 2 * blocks) else 1))
            channels = expansion * width
        layers += [nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]
        super().__init__(*layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
