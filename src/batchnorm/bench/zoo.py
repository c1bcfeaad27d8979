"""Networks of several families, as they are published but small: inference with and without `fold`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchnorm.models.inception import inception

Name = Literal["inception", "cifar10", "resnet", "densenet", "mobilenet", "unet", "1d", "3d"]


@dataclass(frozen=True)
class Member:
    """A network, what it is called in tables, and the shape of one of its inputs."""

    title: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]


def _conv_norm(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class _Residual(nn.Module):
    """Two convolutions beside a shortcut, which is a convolution where the shape changes.

    Source: He et al. (2016), arXiv 1512.03385.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = _conv_norm(inputs, outputs, 3, stride), _conv_norm(outputs, outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else _conv_norm(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x), inplace=True)) + self.shortcut(x), inplace=True)


def resnet() -> nn.Module:
    """ResNet-20 of the paper's section 4.2: three stages of three blocks."""
    blocks = [_Residual(16, 16, 1) for _ in range(3)]
    for inputs, outputs in ((16, 32), (32, 64)):
        blocks += [_Residual(inputs, outputs, 2), *(_Residual(outputs, outputs, 1) for _ in range(2))]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    return nn.Sequential(_conv_norm(3, 16), nn.ReLU(inplace=True), *blocks, *head)


class _Dense(nn.Module):
    """Normalization, ReLU, 1×1 convolution, and again with 3×3; the result is appended to the input.

    Source: Huang et al. (2017), arXiv 1608.06993.
    """

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.norm1(x), inplace=True))
        return torch.cat([x, self.conv2(F.relu(self.norm2(y), inplace=True))], 1)


def densenet(growth: int = 12, layers: int = 6) -> nn.Module:
    """DenseNet-BC of 40 layers, normalization before each convolution."""
    channels = 2 * growth
    steps: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1, bias=False)]
    for block in range(3):
        steps += [_Dense(channels + i * growth, growth) for i in range(layers)]
        channels += layers * growth
        if block < 2:
            half = channels // 2
            transition = nn.Conv2d(channels, half, 1, bias=False)
            steps += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True), transition, nn.AvgPool2d(2)]
            channels = half
    head = (nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))
    return nn.Sequential(*steps, nn.BatchNorm2d(channels), *head)


class _Inverted(nn.Module):
    """A wider 1×1 convolution, a depthwise one, a narrow one without nonlinearity.

    Source: Sandler et al. (2018), arXiv 1801.04381.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, factor: int = 6) -> None:
        super().__init__()
        wide = inputs * factor
        self.adds = inputs == outputs and stride == 1
        self.steps = nn.Sequential(
            *(_conv_norm(inputs, wide, 1), nn.ReLU6(inplace=True)),
            *(_conv_norm(wide, wide, 3, stride, groups=wide), nn.ReLU6(inplace=True)),
            _conv_norm(wide, outputs, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.steps(x) if self.adds else self.steps(x)


def mobilenet() -> nn.Module:
    """MobileNetV2 for images of 32×32: strides of the first stages are 1, half of the blocks."""
    stages = ((16, 24, 1), (24, 24, 1), (24, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 96, 1))
    blocks = [_Inverted(*stage) for stage in stages]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(320, 10))
    first, last = _conv_norm(3, 16), _conv_norm(96, 320, 1)
    return nn.Sequential(first, nn.ReLU6(inplace=True), *blocks, last, nn.ReLU6(inplace=True), *head)


class _UNet(nn.Module):
    """Down three times, up three times by transposed convolutions with normalization, with skips.

    Source: Ronneberger et al. (2015), arXiv 1505.04597, which has no normalization.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        widths = [width * 2**i for i in range(4)]
        self.down = nn.ModuleList(self._twice(i, o) for i, o in zip([3, *widths], widths, strict=False))
        self.up = nn.ModuleList(
            nn.Sequential(nn.ConvTranspose2d(2 * o, o, 2, 2, bias=False), nn.BatchNorm2d(o), nn.ReLU())
            for o in widths[-2::-1]
        )
        self.joined = nn.ModuleList(self._twice(2 * o, o) for o in widths[-2::-1])
        self.head = nn.Conv2d(width, 2, 1)

    @staticmethod
    def _twice(inputs: int, outputs: int) -> nn.Sequential:
        pair = (_conv_norm(inputs, outputs), nn.ReLU(inplace=True), _conv_norm(outputs, outputs))
        return nn.Sequential(*pair, nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for i, down in enumerate(self.down):
            x = down(x if i == 0 else F.max_pool2d(x, 2))
            skips.append(x)
        skips.pop()
        for up, joined in zip(self.up, self.joined, strict=True):
            x = joined(torch.cat([skips.pop(), up(x)], 1))
        return self.head(x)


def waves() -> nn.Module:
    """Convolutions over time, as for one second of sound at 4 kHz."""
    steps: list[nn.Module] = []
    for inputs, outputs, kernel in ((1, 32, 80), (32, 32, 3), (32, 64, 3), (64, 128, 3), (128, 256, 3)):
        stride = 4 if kernel == 80 else 1
        conv = nn.Conv1d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        steps += [
            conv,
            nn.BatchNorm1d(outputs),
            nn.ReLU(inplace=True),
            nn.MaxPool1d(4 if kernel == 80 else 2),
        ]
    return nn.Sequential(*steps, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(256, 10))


def volumes() -> nn.Module:
    """Convolutions in three dimensions, as for clips or scans of 16×32×32."""
    steps: list[nn.Module] = []
    for inputs, outputs in ((1, 16), (16, 32), (32, 64)):
        for i, o in ((inputs, outputs), (outputs, outputs)):
            steps += [
                nn.Conv3d(i, o, 3, padding=1, bias=False),
                nn.BatchNorm3d(o),
                nn.ReLU(inplace=True),
            ]
        steps.append(nn.MaxPool3d(2))
    return nn.Sequential(*steps, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(64, 10))


ZOO: Mapping[Name, Member] = {
    "inception": Member("BN-Inception, 224×224", lambda: inception(seed=0), (3, 224, 224)),
    "cifar10": Member(
        "BN-Inception at the scale of CIFAR-10, 32×32",
        lambda: inception(10, stem="cifar", width=0.25, separable=True, seed=0),
        (3, 32, 32),
    ),
    "resnet": Member("ResNet-20, 32×32", resnet, (3, 32, 32)),
    "densenet": Member("DenseNet-BC-40, 32×32", densenet, (3, 32, 32)),
    "mobilenet": Member("MobileNetV2, half of the blocks, 32×32", mobilenet, (3, 32, 32)),
    "unet": Member("U-Net, 64×64", _UNet, (3, 64, 64)),
    "1d": Member("1-d network of 5 convolutions, 4,000 samples", waves, (1, 4000)),
    "3d": Member("3-d network of 6 convolutions, 16×32×32", volumes, (1, 16, 32, 32)),
}
"""By the name that ``batchnorm bench fold --networks`` takes."""
