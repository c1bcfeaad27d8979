"""Small networks whose training steps are timed, each with its batch."""

from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchnorm.models import inception, mlp
from batchnorm.surgery import insert

Network = Literal["mlp", "cifar10", "resnet"]
NETWORKS: tuple[Network, ...] = get_args(Network)
TITLES: dict[Network, str] = {
    "mlp": "784-100-100-100-10 with BN, batch 60",
    "cifar10": "BN-Inception at the scale of CIFAR-10, 32×32, batch 32",
    "resnet": "residual network of 9 convolutions, 32×32, batch 32",
}


def network_of(network: Network) -> tuple[nn.Module, Tensor, Tensor]:
    """The network, a batch of noise, and labels."""
    if network == "mlp":
        x = torch.randn(60, 784)
        return insert(mlp(), x)[0], x, torch.randint(0, 10, (60,))
    x, labels = torch.randn(32, 3, 32, 32), torch.randint(0, 10, (32,))
    if network == "cifar10":
        return inception(10, stem="cifar", width=0.25, separable=True), x, labels
    blocks = [_Block(16, 16, 1), _Block(16, 32, 2), _Block(32, 64, 2)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(_unit(3, 16, 1), nn.ReLU(), *blocks, *head), x, labels


class _Block(nn.Module):
    """Two convolutions beside a shortcut, which is a convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = _unit(inputs, outputs, stride), _unit(outputs, outputs, 1)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else _unit(inputs, outputs, stride, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


def _unit(inputs: int, outputs: int, stride: int, kernel: int = 3) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


def training_step(net: nn.Module, x: Tensor, labels: Tensor) -> Callable[[], object]:
    """Forward, backward and SGD with momentum, each time it is called."""
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(net(x), labels).backward()
        optimizer.step()

    return step
