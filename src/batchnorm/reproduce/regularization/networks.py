"""The two networks, from the same initial weights with and without BN."""

import math

import torch
from torch import nn

from batchnorm.layers import BatchNorm1d, BatchNorm2d

HIDDEN = 256
"""Units of each of two hidden layers."""
CHANNELS = (16, 32, 64)
"""Of 3×3 convolutions of stride 2."""


def network(
    image_shape: tuple[int, ...], classes: int, *, normalize: bool, dropout: float, seed: int
) -> nn.Sequential:
    """A fully connected network for grey images, a convolutional one for colour.

    BN stands before each ReLU and takes the bias's place. Weights are Gaussian with variance 2 / inputs
    (He et al., 2015), drawn from ``seed`` alone; biases are zero.

    Args:
        image_shape: (H, W) or (3, H, W).
        classes: Outputs.
        normalize: Whether there is BN.
        dropout: Probability; after each hidden layer, or before the last layer of the convolutional one.
        seed: Of the initial weights.
    """
    if len(image_shape) == 2:
        layers = _fully_connected(math.prod(image_shape), classes, normalize, dropout)
    else:
        layers = _convolutional(image_shape, classes, normalize, dropout)
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.normal_(layer.weight, std=math.sqrt(2 / layer.weight[0].numel()), generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def _fully_connected(inputs: int, classes: int, normalize: bool, dropout: float) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Flatten()]
    for _ in range(2):
        # skip_init: the layer's own initialization would draw from the global generator in vain.
        layers.append(nn.utils.skip_init(nn.Linear, inputs, HIDDEN, bias=not normalize))
        layers += [BatchNorm1d(HIDDEN)] if normalize else []
        layers += [nn.ReLU(), nn.Dropout(dropout)]
        inputs = HIDDEN
    return [*layers, nn.utils.skip_init(nn.Linear, inputs, classes)]


def _convolutional(
    image_shape: tuple[int, ...], classes: int, normalize: bool, dropout: float
) -> list[nn.Module]:
    layers: list[nn.Module] = []
    inputs, height, width = image_shape
    for channels in CHANNELS:
        bias = not normalize
        conv = nn.utils.skip_init(nn.Conv2d, inputs, channels, 3, stride=2, padding=1, bias=bias)
        layers += [conv, *([BatchNorm2d(channels)] if normalize else []), nn.ReLU()]
        inputs, height, width = channels, (height + 1) // 2, (width + 1) // 2
    features = inputs * height * width
    return [*layers, nn.Flatten(), nn.Dropout(dropout), nn.utils.skip_init(nn.Linear, features, classes)]
