"""Wide residual networks for 32 x 32 images (Zagoruyko and Komodakis, BMVC 2016), which neither torchvision nor timm has."""

from __future__ import annotations

from torch import Tensor, nn


def conv(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


class Block(nn.Module):
    """Two 3 x 3 convolutions, each after batch norm and ReLU, added to the input."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, outputs, stride=stride)
        self.norm2, self.conv2 = nn.BatchNorm2d(outputs), conv(outputs, outputs)
        self.shortcut = conv(inputs, outputs, 1, stride) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        active = self.norm1(x).relu()
        residual = self.conv2(self.norm2(self.conv1(active)).relu())
        # Where the shape changes, the shortcut starts behind the first activation too.
        return residual + (x if self.shortcut is None else self.shortcut(active))


class WideResNet(nn.Sequential):
    """WRN-`depth`-`width`: [n, 3, 32, 32] -> [n, classes]."""

    def __init__(self, depth: int, width: int, classes: int):
        blocks, channels = (depth - 4) // 6, 16
        layers: list[nn.Module] = [conv(3, channels)]
        for stage in range(3):
            for block in range(blocks):
                outputs = 16 * width * 2**stage
                layers.append(Block(channels, outputs, stride=2 if stage and not block else 1))
                channels = outputs
        layers += [nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]
        super().__init__(*layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
