"""The Inception network of section 4.2, as the paper's table has it, and at the scale of 32×32 images."""

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from batchnorm.layers import BatchNormPerActivation
from batchnorm.models.heads import AuxiliaryHead, WithHeads


class Module(NamedTuple):
    """One row of the paper's table: output channels of each branch; 0 where a branch is missing."""

    one: int
    three_reduce: int
    three: int
    double_reduce: int
    double: int
    pool: str
    projection: int
    stride: int = 1


# Printed projections of 128 in 4c and 4d would give 608 and 1056 channels where the table says 576
# and 1024; with 96 the sums are right, and ports by the authors' employer have it so.
TABLE = {
    "3a": Module(64, 64, 64, 64, 96, "avg", 32),
    "3b": Module(64, 64, 96, 64, 96, "avg", 64),
    "3c": Module(0, 128, 160, 64, 96, "max", 0, 2),
    "4a": Module(224, 64, 96, 96, 128, "avg", 128),
    "4b": Module(192, 96, 128, 96, 128, "avg", 128),
    "4c": Module(160, 128, 160, 128, 160, "avg", 96),
    "4d": Module(96, 128, 192, 160, 192, "avg", 96),
    "4e": Module(0, 128, 192, 192, 256, "max", 0, 2),
    "5a": Module(352, 192, 320, 160, 224, "avg", 128),
    "5b": Module(352, 192, 320, 192, 224, "max", 128),
}
LAST = "5b"
HEADS_AFTER = ("4d", "4a")
"""Where GoogLeNet has its auxiliary heads; with one alone it is the upper."""
DEPTH_MULTIPLIER = 8
"""Of the separable first convolution."""
HEAD_CHANNELS, HEAD_UNITS = 128, 768

Nonlinearity = Literal["relu", "sigmoid"]
Stem = Literal["imagenet", "cifar"]
NONLINEARITIES: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid}


class Branches(nn.Module):
    """Branches side by side, joined along the channels."""

    def __init__(self, branches: "OrderedDict[str, nn.Module]") -> None:
        super().__init__()
        for name, branch in branches.items():
            self.add_module(name, branch)

    def forward(self, x: Tensor) -> Tensor:
        """Every branch of ``x``, shape (N, sum of the branches' channels, H, W)."""
        return torch.cat([branch(x) for branch in self.children()], 1)


def inception(
    classes: int = 1000,
    *,
    normalize: bool = True,
    activation: Nonlinearity = "relu",
    stem: Stem = "imagenet",
    image_size: int | None = None,
    width: float = 1.0,
    projection: int = 96,
    separable: bool = False,
    heads: int = 0,
    response_norm: bool = False,
    dropout: float = 0.0,
    per_activation: bool = False,
    init_scale: float = 1.0,
    seed: int | None = None,
) -> nn.Module:
    """The Inception of the paper's ImageNet experiments, up to the logits, of `torch.nn` layers.

    Convolutions are initialized as He et al. (2015) have it, Gaussian with variance 2 / fan-in,
    the linear layers with variance 1 / fan-in; biases are zero. The paper does not say.

    Args:
        classes: Outputs.
        normalize: BN directly before each nonlinearity, in place of the convolution's bias.
        activation: The nonlinearity.
        stem: ``imagenet`` takes 224×224 images to the first module's 28×28 by a 7×7 convolution of stride 2
            and two pools of stride 2. ``cifar`` takes 32×32 to 8×8: its first convolution is 3×3 of
            stride 1, and all that follows is the same.
        image_size: Pixels on a side; by default 224 or 32, by the stem. Only heads and per-activation
            normalization depend on it.
        width: Multiplies every number of channels but the classes; 1 is the paper's network.
        projection: Channels of the pool projections of 4c and 4d: 96, or 128 as printed.
        separable: First convolution depthwise, 8 outputs for each colour, then a pointwise one; else full.
        heads: Auxiliary classifiers, 0 to 2, as GoogLeNet has them after 4a and 4d. One alone is after 4d. In
            training mode the network then returns a tuple: logits, then those of the heads from the top down.
        response_norm: Local response normalization after the first pool and the second convolution.
        dropout: Share of the features dropped before the softmax.
        per_activation: In the last module, γ, β and statistics for every activation (section 3.2).
        init_scale: Multiplies the initial weights of the convolutions.
        seed: Of a generator of the network's own; None draws from torch's global one.

    Returns:
        A network for input (N, 3, image_size, image_size), float32 on the CPU, in training mode.

    Raises:
        ValueError: An argument out of its range, or two that exclude each other.

    Source: Ioffe & Szegedy (2015), section 4.2 and figure 5; Szegedy et al. (2014) for heads and LRN.
    """
    size = image_size or {"imagenet": 224, "cifar": 32}[stem]
    _check(classes, size, width, projection, heads, dropout, init_scale)
    if per_activation and not normalize:
        raise ValueError("per_activation says how to normalize, so it needs normalize=True.")
    build = _Builder(normalize, activation, width, size)
    small = stem == "cifar"
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["conv1"] = build.unit(3, 64, 3 if small else 7, 1 if small else 2, separable=separable)
    layers["pool1"] = build.pool()
    if response_norm:
        layers["norm1"] = _response_norm()
    layers["conv2_reduce"] = build.unit(build.scaled(64), 64, 1)
    layers["conv2"] = build.unit(build.scaled(64), 192, 3)
    if response_norm:
        layers["norm2"] = _response_norm()
    layers["pool2"] = build.pool()
    channels, wanted = build.scaled(192), HEADS_AFTER[:heads]
    classifiers: dict[str, nn.Module] = {}
    for name, row in TABLE.items():
        if name in ("4c", "4d"):
            row = row._replace(projection=projection)
        build.per_activation = per_activation and name == LAST
        layers[f"inception{name}"], channels = _module(build, channels, row)
        if name in wanted:
            build.per_activation = False
            classifiers[f"inception{name}"] = _head(build, channels, classes)
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    if dropout:
        layers["dropout"] = nn.Dropout(dropout)
    layers["head"] = nn.Linear(channels, classes)
    from_the_top = {f"inception{name}": classifiers[f"inception{name}"] for name in wanted}
    network = WithHeads(layers, from_the_top) if heads else nn.Sequential(layers)
    _initialize(network, init_scale, seed)
    return network


@dataclass
class _Builder:
    """What is the same in all units, and the pixels on a side where the next one stands."""

    normalize: bool
    activation: str
    width: float
    side: int
    per_activation: bool = False

    def scaled(self, channels: int) -> int:
        return max(1, round(channels * self.width))

    def unit(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, *, separable: bool = False
    ) -> nn.Sequential:
        """Convolution, normalization, nonlinearity: ``outputs`` before scaling, ``inputs`` as they are."""
        outputs = self.scaled(outputs)
        self.side = math.ceil(self.side / stride)
        bias, padding = not self.normalize, kernel // 2
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        if separable:
            between = DEPTH_MULTIPLIER * inputs
            parts["depthwise"] = nn.Conv2d(
                inputs, between, kernel, stride, padding, groups=inputs, bias=False
            )
            parts["conv"] = nn.Conv2d(between, outputs, 1, bias=bias)
        else:
            parts["conv"] = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=bias)
        if self.normalize:
            parts["bn"] = (
                BatchNormPerActivation((outputs, self.side, self.side))
                if self.per_activation
                else nn.BatchNorm2d(outputs)
            )
        parts[self.activation] = NONLINEARITIES[self.activation]()
        return nn.Sequential(parts)

    def pool(self) -> nn.MaxPool2d:
        self.side = math.ceil((self.side - 3) / 2) + 1 if self.side > 3 else 1
        return nn.MaxPool2d(3, 2, ceil_mode=True)


def _module(build: _Builder, inputs: int, row: Module) -> tuple[Branches, int]:
    branches: OrderedDict[str, nn.Module] = OrderedDict()
    if row.one:
        branches["one_by_one"] = build.unit(inputs, row.one, 1)
    side = build.side
    branches["three_by_three"] = nn.Sequential(
        build.unit(inputs, row.three_reduce, 1),
        build.unit(build.scaled(row.three_reduce), row.three, 3, row.stride),
    )
    build.side = side
    branches["two_three_by_three"] = nn.Sequential(
        build.unit(inputs, row.double_reduce, 1),
        build.unit(build.scaled(row.double_reduce), row.double, 3),
        build.unit(build.scaled(row.double), row.double, 3, row.stride),
    )
    kind = nn.MaxPool2d if row.pool == "max" else nn.AvgPool2d
    pool = kind(3, row.stride, 1)
    branches["pooled"] = (
        nn.Sequential(pool, build.unit(inputs, row.projection, 1)) if row.projection else pool
    )
    passed = build.scaled(row.projection) if row.projection else inputs
    return Branches(branches), sum(map(build.scaled, filter(None, (row.one, row.three, row.double)))) + passed


def _head(build: _Builder, inputs: int, classes: int) -> AuxiliaryHead:
    side = (build.side - 5) // 3 + 1
    if side < 1:
        raise ValueError(
            f"auxiliary heads pool 5×5 of at least 5×5 locations, and here are {build.side}×{build.side}: "
            "give larger images, or heads=0."
        )
    before = build.side
    reduce = build.unit(inputs, HEAD_CHANNELS, 1)
    build.side = before
    return AuxiliaryHead(
        reduce,
        build.scaled(HEAD_CHANNELS) * side**2,
        build.scaled(HEAD_UNITS),
        classes,
        nonlinearity=NONLINEARITIES[build.activation],
    )


def _response_norm() -> nn.LocalResponseNorm:
    # The constants of Krizhevsky et al. (2012), section 3.3, as Caffe's GoogLeNet has them.
    return nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0)


def _initialize(network: nn.Module, init_scale: float, seed: int | None) -> None:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            if layer.weight.is_meta:
                continue
            convolution = isinstance(layer, nn.Conv2d)
            gain = math.sqrt(2) * init_scale if convolution else 1.0
            fan_in = layer.weight[0].numel()
            nn.init.normal_(layer.weight, std=gain / math.sqrt(fan_in), generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _check(
    classes: int, size: int, width: float, projection: int, heads: int, dropout: float, init_scale: float
) -> None:
    needed = {
        "classes must be 1 or more": (classes >= 1, classes),
        "image_size must be 8 or more pixels": (size >= 8, size),
        "width must be above 0": (0 < width < math.inf, width),
        "projection must be 96, or 128 as printed in the paper": (projection in (96, 128), projection),
        "heads must be 0, 1 or 2": (heads in (0, 1, 2), heads),
        "dropout must be at least 0 and below 1": (0 <= dropout < 1, dropout),
        "init_scale must be above 0": (0 < init_scale < math.inf, init_scale),
    }
    for what, (holds, value) in needed.items():
        if not holds:
            raise ValueError(f"inception: {what}, got {value}.")
