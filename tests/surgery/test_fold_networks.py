"""`fold` on whole networks: how many normalizations are left, and by how much the outputs differ."""

import normalized_networks
import pytest
import torch
import torch.nn.functional as F
from fold_cases import trained
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.layers.scale_shift import ScaleShift
from batchnorm.models.inception import inception
from batchnorm.surgery.kind import is_normalization


class Up(nn.Module):
    """A transposed convolution, the skip connection, two convolutions."""

    def __init__(self, inp: int, out: int) -> None:
        super().__init__()
        self.up, self.norm = nn.ConvTranspose2d(inp, out, 2, 2), nn.BatchNorm2d(out)
        self.convs = nn.Sequential(
            *(nn.Conv2d(2 * out, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU()),
            *(nn.Conv2d(out, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU()),
        )

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.convs(torch.cat([F.relu(self.norm(self.up(x))), skip], 1))


class UNet(nn.Module):
    """Normalization before the first convolution too, and after a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = nn.BatchNorm2d(3)
        self.one = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.ReLU())
        self.two = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.dilated = nn.ModuleList(nn.Conv2d(8, 4, 3, padding=d, dilation=d) for d in (1, 2, 3))
        self.norm = nn.BatchNorm2d(12)
        self.up = Up(12, 4)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.one(self.inputs(x))
        two = self.two(one)
        joined = self.norm(torch.cat([conv(two) for conv in self.dilated], 1))
        return self.head(self.up(F.silu(joined), one))


class DenseLayer(nn.Module):
    def __init__(self, inp: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inp), nn.Conv2d(inp, 8, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        y = self.conv1(F.relu(self.norm1(torch.cat(features, 1))))
        return self.conv2(F.relu(self.norm2(y)))


class DenseNet(nn.Module):
    """Normalization before each convolution; that before the bottleneck has nobody to go to."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.layers = nn.ModuleList(DenseLayer(8 + 4 * i) for i in range(3))
        self.transition = nn.Sequential(nn.BatchNorm2d(20), nn.Conv2d(20, 10, 1), nn.AvgPool2d(2))
        self.norm, self.head = nn.BatchNorm2d(10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(features))
        x = self.norm(self.transition(torch.cat(features, 1)))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def audio() -> nn.Module:
    return nn.Sequential(
        *(nn.BatchNorm1d(3), nn.Conv1d(3, 8, 5), nn.BatchNorm1d(8), nn.GELU(), nn.AvgPool1d(2)),
        *(nn.Conv1d(8, 8, 3, groups=8), nn.BatchNorm1d(8), nn.Conv1d(8, 4, 1), nn.Dropout1d(), nn.ReLU()),
        *(
            nn.ConvTranspose1d(4, 4, 4, 2),
            nn.BatchNorm1d(4),
            nn.Flatten(),
            nn.LazyLinear(5),
            nn.BatchNorm1d(5),
        ),
    )


IMAGES = (4, 3, 8, 8)
# How it is made, the shape of its input, normalizations that are folded, and that are left.
NETWORKS = {
    "BN-Inception": (lambda: inception(10, stem="cifar", width=0.125, seed=0), (2, 3, 32, 32), 69, 0),
    "BN-Inception, last module per activation": (
        lambda: inception(10, stem="cifar", width=0.125, per_activation=True, seed=0),
        (2, 3, 32, 32),
        62,
        7,
    ),
    "ResNet": (normalized_networks.ResNet, IMAGES, 8, 0),
    "ResNet, bottlenecks": (normalized_networks.bottlenecks, IMAGES, 6, 0),
    "ResNet, pre-activation": (normalized_networks.PreActivation, IMAGES, 2, 2),
    "DenseNet": (DenseNet, IMAGES, 6, 3),
    "MobileNet": (normalized_networks.mobilenet, IMAGES, 6, 0),
    "U-Net": (UNet, IMAGES, 6, 0),
    "1-d": (audio, (4, 3, 24), 5, 0),
    "3-d": (normalized_networks.net3d, (4, 3, 6, 6, 6), 2, 0),
    "functional style": (normalized_networks.Functional, (6, 12), 7, 0),
    "one block in three calls": (normalized_networks.Recurrent, (6, 12), 1, 0),
}


@pytest.mark.parametrize(("make", "shape", "folds", "left"), NETWORKS.values(), ids=NETWORKS.keys())
def test_network(make, shape, folds, left):
    model, x = make(), torch.randn(shape)
    model.eval()(x)
    for module in model.modules():
        if is_normalization(module):
            trained(module)
    model, x = model.double(), x.double()
    new, proof = bn.fold(model, x)
    assert (len(proof.folds), len(proof.alone)) == (folds, left)
    assert not any(is_normalization(m) for m in new.modules())
    assert sum(isinstance(m, ScaleShift) for m in new.modules()) == left
    far = torch.randn_like(x) * 3 + 5
    with torch.no_grad():
        truth = model(far)
        assert (new(far) - truth).abs().max() <= 1e-11 * truth.abs().max()
    assert proof.check <= 1e-11
