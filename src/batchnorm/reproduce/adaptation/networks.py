"""The two networks, and the images that they see."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchnorm.data import ImageData, to_input
from batchnorm.layers import BatchNorm2d
from batchnorm.reproduce.adaptation.corruptions import corrupted

SIDE = 28
"""Of grey images, pixels."""
_BOX = 20
"""USPS's digits fill their 16×16 pixels; MNIST's were fitted into 20×20 in the middle of 28×28."""


def grey_network(classes: int, width: int = 16) -> nn.Sequential:
    """Three convolutions with BN and ReLU that halve the side, a mean over places, a linear layer."""
    return nn.Sequential(
        _unit(1, width, 5, 2),
        _unit(width, 2 * width, 3, 2),
        _unit(2 * width, 4 * width, 3, 2),
        *_head(4 * width, classes),
    )


def colour_network(classes: int, width: int = 16) -> nn.Sequential:
    """A residual network of nine convolutions, the first with stride 2."""
    return nn.Sequential(
        _unit(3, width, 3, 2),
        _Block(width, width, 1),
        _Block(width, 2 * width, 2),
        _Block(2 * width, 4 * width, 2),
        *_head(4 * width, classes),
    )


def _head(features: int, classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, classes)]


def _unit(
    inputs: int, outputs: int, side: int, stride: int, activation: str | None = "relu"
) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, side, stride, side // 2, bias=False)
    return nn.Sequential(conv, BatchNorm2d(outputs, activation=activation))


class _Block(nn.Module):
    """Two convolutions beside a shortcut, which is a convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = _unit(inputs, outputs, 3, stride)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm = BatchNorm2d(outputs, activation="relu")
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else _unit(inputs, outputs, 1, stride, None)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.second(self.first(x)), self.shortcut(x))


def images_of(data: ImageData, part: str) -> Tensor:
    """All images of "train" or "test" in 0 to 1, shape (N, C, H, W); grey ones with a side of 28."""
    x = to_input(torch.from_numpy(getattr(data, f"{part}_images")))
    if x.dim() == 4:
        return x
    x = x.unsqueeze(1)
    if data.name == "usps":
        x = F.interpolate(x, (_BOX, _BOX), mode="bilinear", align_corners=False)
        x = F.pad(x, ((SIDE - _BOX) // 2,) * 4)
    return x


def in_domain(images: Tensor, domain: str, seed: int) -> Tensor:
    """Images of a data set as the domain has them, centred for a network: 0 to 1 becomes −1 to 1."""
    _, *corruption = domain.split()
    if corruption:
        kind, strength = corruption
        images = corrupted(images, kind, float(strength), seed)
    return images * 2 - 1
