"""PyramidNet for 32 x 32 images (Han, Kim and Kim, CVPR 2017), which neither torchvision nor timm has."""

from __future__ import annotations

from torch import Tensor, nn

EXPANSION = 4  # output channels of a bottleneck over its width


class Bottleneck(nn.Module):
    """Convolutions 1 x 1, 3 x 3, 1 x 1 with batch norm before each and after the last, and no ReLU before the first. The
    shortcut has no weights: it is averaged where the size halves, and lacks the channels that the block adds."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.added = EXPANSION * width - inputs
        self.residual = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.Conv2d(inputs, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, EXPANSION * width, 1, bias=False),
            nn.BatchNorm2d(EXPANSION * width),
        )
        self.shortcut = nn.AvgPool2d(2) if stride == 2 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.residual(x) + nn.functional.pad(self.shortcut(x), (0, 0, 0, 0, 0, self.added))


class PyramidNet(nn.Sequential):
    """`depth` layers; the width grows by the same step in every block, by `alpha` in all: [n, 3, 32, 32] -> [n, classes]."""

    def __init__(self, depth: int, alpha: int, classes: int):
        blocks, channels = (depth - 2) // 9, 16
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)]
        for block in range(3 * blocks):
            width = round(16 + alpha * (block + 1) / (3 * blocks))
            layers.append(Bottleneck(channels, width, stride=2 if block in (blocks, 2 * blocks) else 1))
            channels = EXPANSION * width
        layers += [nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]
        super().__init__(*layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
