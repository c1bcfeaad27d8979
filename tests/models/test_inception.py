"""BN-Inception against the paper's table."""

import torch
from torch import nn

from batchnorm.models.inception import inception

ROWS = {
    "conv1": (64, 112, 112),
    "pool1": (64, 56, 56),
    "conv2": (192, 56, 56),
    "pool2": (192, 28, 28),
    "inception3a": (256, 28, 28),
    "inception3b": (320, 28, 28),
    "inception3c": (576, 14, 14),
    "inception4a": (576, 14, 14),
    "inception4b": (576, 14, 14),
    "inception4c": (576, 14, 14),
    "inception4d": (576, 14, 14),
    "inception4e": (1024, 7, 7),
    "inception5a": (1024, 7, 7),
    "inception5b": (1024, 7, 7),
    "pool": (1024, 1, 1),
    "head": (1000,),
}


def test_every_row_has_the_papers_output():
    with torch.device("meta"):
        x, found = torch.empty(2, 3, 224, 224), {}
        for name, layer in inception().named_children():
            x = layer(x)
            found[name] = tuple(x.shape[1:])
    assert {name: found[name] for name in ROWS} == ROWS


def test_parameters_without_auxiliary_heads():
    # 11.19 million, with projections of 96 channels in 4c and 4d; the paper's 13.6 counts a head more.
    with torch.device("meta"):
        net = inception()
    assert sum(p.numel() for p in net.parameters()) == 11_194_984
    assert sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) == 69
