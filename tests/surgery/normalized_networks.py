"""Networks with torch's own normalization, each of another family; `NETWORKS` says what can be fused."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_bn(inp: int, out: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inp, out, size, stride, size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out))


class BasicBlock(nn.Module):
    """One ReLU in two places, a sum in place, a projection where the width changes."""

    def __init__(self, inp: int, out: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_bn(inp, out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = conv_bn(out, out)
        self.downsample = None if inp == out else conv_bn(inp, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_bn(3, 6), nn.ReLU(inplace=True), nn.MaxPool2d(2))
        self.layers = nn.Sequential(BasicBlock(6, 6), BasicBlock(6, 6), BasicBlock(6, 8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.stem(x)).mean((2, 3)))


class Bottleneck(nn.Module):
    """Functions throughout, the sum the other way round."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_bn(width, 4, 1)
        self.conv2, self.bn2 = conv_bn(4, 4)
        self.conv3, self.bn3 = conv_bn(4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = torch.relu(self.bn2(self.conv2(out)))
        return F.relu(torch.add(x, self.bn3(self.conv3(out))))


def bottlenecks() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), Bottleneck(8), Bottleneck(8), nn.Flatten(), nn.Linear(288, 5))


class PreActivation(nn.Module):
    """Normalization and ReLU before each convolution; sums are not activated."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.bns = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(4))
        self.convs = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1) for _ in range(4))
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        for i in (0, 2):
            out = self.convs[i](F.relu(self.bns[i](x)))
            out = self.convs[i + 1](F.relu(self.bns[i + 1](out)))
            x = x + out
        return self.head(x.mean((2, 3)))


class DenseNet(nn.Module):
    """Everything computed so far is normalized again, and again, by other layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(4 * i), nn.ReLU(inplace=True), nn.Conv2d(4 * i, 4, 3, padding=1))
            for i in (1, 2, 3)
        )
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        x = F.relu(self.norm(torch.cat(features, 1)), inplace=True)
        return self.head(x.mean((2, 3)))


class MobileBlock(nn.Module):
    """ReLU6, which stays, hardswish, which is fused, and a linear end, with nothing to fuse."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Sequential(*conv_bn(6, 12, 1), nn.ReLU6(inplace=True))
        self.depthwise = nn.Sequential(
            nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.BatchNorm2d(12), nn.Hardswish(inplace=True)
        )
        self.project = conv_bn(12, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(self.depthwise(self.expand(x)))


def mobilenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        MobileBlock(),
        MobileBlock(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    )


class UNet(nn.Module):
    """A skip connection joins by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(*conv_bn(3, 4), nn.ReLU(), *conv_bn(4, 4), nn.ReLU())
        self.bottom = nn.Sequential(*conv_bn(4, 8), nn.SiLU())
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.out = nn.Sequential(*conv_bn(8, 4), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        x = self.up(self.bottom(F.max_pool2d(skip, 2)))
        return self.out(torch.cat([skip, x], 1))


def net1d() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.LeakyReLU(inplace=True), nn.MaxPool1d(2)),
        *(nn.Conv1d(6, 6, 3), nn.BatchNorm1d(6, momentum=None), nn.GELU(), nn.Flatten(), nn.LazyLinear(5)),
    )


def net3d() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4, affine=False), nn.ELU(inplace=True)),
        *(nn.Conv3d(4, 4, 3), nn.BatchNorm3d(4), nn.Sigmoid(), nn.Flatten(), nn.LazyLinear(5)),
    )


class Functional(nn.Module):
    """Activations as functions of two libraries and as methods, dropout by mode."""

    def __init__(self) -> None:
        super().__init__()
        self.fcs = nn.ModuleList(nn.Linear(12, 12, bias=False) for _ in range(7))
        self.bns = nn.ModuleList(nn.BatchNorm1d(12) for _ in range(7))
        self.out = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.bns[0](self.fcs[0](x)), 0.01)
        x = F.gelu(self.bns[1](self.fcs[1](x)), approximate="none")
        x = self.bns[2](self.fcs[2](x)).sigmoid()
        x = self.bns[3](self.fcs[3](x)).relu_()
        x = F.dropout(x, 0.2, self.training)
        x = F.elu(self.bns[4](self.fcs[4](x)), 1.0, True)
        x = torch.tanh(self.bns[5](self.fcs[5](x)))
        return self.out(F.silu(self.bns[6](self.fcs[6](x)), inplace=True))


class SharedReLU(nn.Module):
    """One ReLU for the whole network."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)
        self.fcs = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))
        self.bns = nn.ModuleList(nn.BatchNorm1d(12) for _ in range(3))
        self.out = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        for fc, bn in zip(self.fcs, self.bns, strict=True):
            x = self.act(bn(fc(x)))
        return self.out(self.act(x - 0.5))


def mlp() -> nn.Module:
    """Plain Sequential; one activation object stands in it three times, once without a normalization."""
    act = nn.Tanh()
    return nn.Sequential(
        *(nn.Linear(12, 12), nn.BatchNorm1d(12), act, nn.Linear(12, 12), nn.BatchNorm1d(12), act),
        *(nn.Linear(12, 12), act, nn.Linear(12, 5)),
    )


class BasicConv(nn.Module):
    def __init__(self, inp: int, out: int, size: int) -> None:
        super().__init__()
        self.conv, self.bn = conv_bn(inp, out, size)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Inception(nn.Module):
    """Four branches concatenated; what feeds them is wanted four times in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = BasicConv(3, 4, 3)
        self.branches = nn.ModuleList([BasicConv(4, 3, 1), BasicConv(4, 3, 3), BasicConv(4, 3, 5)])
        self.pool = BasicConv(4, 3, 1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        outs = [branch(x) for branch in self.branches]
        outs.append(self.pool(F.avg_pool2d(x, 3, 1, 1)))
        return self.head(torch.cat(outs, 1).mean((2, 3)))


class Recurrent(nn.Module):
    """One block called three times, its normalization with it: the same in every call."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(12, 6), nn.Linear(6, 5)
        self.block = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for _ in range(3):
            x = self.block(x)
        return self.out(x)


class AuxiliaryHead(nn.Module):
    """A head that only training uses."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 6), nn.BatchNorm1d(6), nn.ReLU())
        self.aux = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5))
        self.out = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.body(x)
        return (self.out(x), self.aux(x)) if self.training else self.out(x)


class Dynamic(nn.Module):
    """A branch on values: two of its parts can be traced, the normalization between them cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 6), nn.BatchNorm1d(6), nn.ReLU())
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.SiLU(), nn.Linear(6, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        x = F.relu(self.norm(x))
        if x.sum() < -1:
            x = x * 2
        return self.head(x)


IMAGES, ROWS = (4, 3, 8, 8), (6, 12)
# For each network: how it is made, the shape of its input, fusions, swaps that fuse nothing.
NETWORKS = {
    "ResNet, basic blocks": (ResNet, IMAGES, 7, 1),
    "ResNet, bottlenecks": (bottlenecks, IMAGES, 6, 0),
    "ResNet, pre-activation": (PreActivation, IMAGES, 4, 0),
    "DenseNet": (DenseNet, IMAGES, 4, 0),
    "MobileNet": (mobilenet, IMAGES, 2, 4),
    "U-Net": (UNet, IMAGES, 4, 0),
    "1-d": (net1d, (4, 3, 16), 2, 0),
    "3-d": (net3d, (4, 3, 6, 6, 6), 2, 0),
    "functional style": (Functional, ROWS, 7, 0),
    "one ReLU for all": (SharedReLU, ROWS, 3, 0),
    "MLP": (mlp, ROWS, 2, 0),
    "Inception": (Inception, IMAGES, 5, 0),
    "one block in three calls": (Recurrent, ROWS, 1, 0),
    "auxiliary head": (AuxiliaryHead, ROWS, 2, 0),
    "untraceable": (Dynamic, ROWS, 2, 1),
}
