"""Inputs of the normalizations of known networks, and small and odd ones."""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from batchnorm.models.inception import inception


@dataclass(frozen=True)
class Shape:
    """An input of a normalization.

    Attributes:
        network: Where it comes from.
        size: One example, without the batch: (C, H, W), or (C,).
        batch: Examples N.
        count: How often it occurs in the network.
    """

    network: str
    size: tuple[int, ...]
    batch: int
    count: int = 1

    @property
    def full(self) -> tuple[int, ...]:
        """With the batch."""
        return (self.batch, *self.size)


def inception_shapes(batch: int) -> list[Shape]:
    """Every BN input of BN-Inception at 224×224."""
    seen: Counter[tuple[int, ...]] = Counter()
    with torch.device("meta"):
        net = inception()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_pre_hook(lambda _, args: seen.update([tuple(args[0].shape[1:])]))
        net(torch.empty(2, 3, 224, 224))
    return [Shape("BN-Inception", size, batch, count) for size, count in seen.items()]


def resnet50_shapes(batch: int) -> list[Shape]:
    """Every BN input of ResNet-50 at 224×224. Source: He et al. (2015), table 1."""
    seen: Counter[tuple[int, ...]] = Counter({(64, 112, 112): 1})
    for width, blocks, side in ((64, 3, 56), (128, 4, 28), (256, 6, 14), (512, 3, 7)):
        # The 3×3 convolution of a stage's first block halves the image, but for the first stage's.
        before = side if width == 64 else 2 * side
        seen[width, before, before] += 1
        seen[width, side, side] += 2 * blocks - 1
        seen[4 * width, side, side] += blocks + 1  # one more where the shortcut is projected
    return [Shape("ResNet-50", size, batch, count) for size, count in seen.items()]


SMALL_AND_ODD = [
    Shape("small", (100,), 60),
    Shape("small", (16, 8, 8), 4),
    Shape("small", (64, 4, 4), 32),
    Shape("small", (512,), 512),
    Shape("odd", (3, 224, 224), 8),
    Shape("odd", (1, 65, 129), 7),
    Shape("odd", (37, 13, 11), 5),
    Shape("odd", (1000,), 2),
    Shape("odd", (4096, 1, 1), 32),
]
"""What nobody tunes for."""
