"""Parameter shapes of networks people train."""

from __future__ import annotations


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
