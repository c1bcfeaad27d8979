"""The Inception network of section 4.2, with a batch-normalized convolution wherever the paper has one."""

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor, nn


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


class Branches(nn.Module):
    """Branches side by side, joined along the channels."""

    def __init__(self, branches: "OrderedDict[str, nn.Module]") -> None:
        super().__init__()
        for name, branch in branches.items():
            self.add_module(name, branch)

    def forward(self, x: Tensor) -> Tensor:
        """Every branch of ``x``, shape (N, sum of the branches' channels, H, W)."""
        return torch.cat([branch(x) for branch in self.children()], 1)


def unit(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Convolution, normalization, ReLU: as torch.nn has them, for other tools to work on."""
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
            bn=nn.BatchNorm2d(outputs),
            relu=nn.ReLU(),
        )
    )


def inception(classes: int = 1000) -> nn.Sequential:
    """The batch-normalized Inception for 224×224 images, up to the logits.

    The first convolution is a full one. Built of `torch.nn` layers alone.

    Args:
        classes: Outputs.

    Returns:
        A network for input (N, 3, 224, 224), in training mode, with torch's initial weights.

    Source: Ioffe & Szegedy (2015), section 4.2 and figure 5.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=unit(3, 64, 7, 2),
        pool1=nn.MaxPool2d(3, 2, ceil_mode=True),
        conv2_reduce=unit(64, 64, 1),
        conv2=unit(64, 192, 3),
        pool2=nn.MaxPool2d(3, 2, ceil_mode=True),
    )
    channels = 192
    for name, row in TABLE.items():
        layers[f"inception{name}"], channels = _module(channels, row)
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "head": nn.Linear(channels, classes)}
    return nn.Sequential(layers)


def _module(inputs: int, row: Module) -> tuple[Branches, int]:
    branches: OrderedDict[str, nn.Module] = OrderedDict()
    if row.one:
        branches["one_by_one"] = unit(inputs, row.one, 1)
    branches["three_by_three"] = nn.Sequential(
        unit(inputs, row.three_reduce, 1), unit(row.three_reduce, row.three, 3, row.stride)
    )
    branches["two_three_by_three"] = nn.Sequential(
        unit(inputs, row.double_reduce, 1),
        unit(row.double_reduce, row.double, 3),
        unit(row.double, row.double, 3, row.stride),
    )
    kind = nn.MaxPool2d if row.pool == "max" else nn.AvgPool2d
    pool = kind(3, row.stride, 1)
    branches["pooled"] = nn.Sequential(pool, unit(inputs, row.projection, 1)) if row.projection else pool
    passed = row.projection or inputs
    return Branches(branches), row.one + row.three + row.double + passed
