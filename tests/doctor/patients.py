"""Networks trained on real digits until they are healthy, and the sicknesses that are planted in copies."""

import copy
from functools import cache

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F


class Residual(nn.Module):
    """Two blocks over 8×8 digits; names and forward as a user would write them."""

    def __init__(self, dropout: float = 0.0, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.drop = nn.Dropout(dropout)
        self.conv3 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(2 * width)
        self.hidden = nn.Linear(32 * width, 64, bias=False)
        self.bn4 = nn.BatchNorm1d(64)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(x + self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(self.drop(x))))
        x = F.relu(self.bn4(self.hidden(x.flatten(1))))
        return self.head(x)


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Images (1797, 1, 8, 8) in 0…1 and classes (1797,)."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order], torch.tensor(found.target)[order]


def batches(size: int = 64, *, train: bool = False, limit: int = 20) -> list[tuple[Tensor, Tensor]]:
    """Whole batches of the last 500 digits, or of the 1,297 that networks are trained on."""
    images, labels = digits()
    part = slice(None, 1297) if train else slice(1297, None)
    pairs = zip(images[part].split(size), labels[part].split(size), strict=True)
    return [pair for pair in pairs if len(pair[0]) == size][:limit]


def train(model: nn.Module, steps: int, *, rate: float = 0.05, size: int = 64) -> nn.Module:
    """Plain SGD with momentum on shuffled digits; ends in evaluation mode."""
    images, labels = digits()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], rate, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    model.train()
    for step in range(steps):
        chosen = torch.randint(1297, (size,), generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / steps)
        optimizer.zero_grad()
        F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    return model.eval()


@cache
def _trained(dropout: float) -> nn.Module:
    torch.manual_seed(0)
    return train(Residual(dropout), 200)


def healthy() -> Residual:
    """A copy of the trained network, in evaluation mode."""
    return copy.deepcopy(_trained(0.0))


def trained_with_dropout() -> Residual:
    """The same network trained with half of the activations dropped before conv3."""
    return copy.deepcopy(_trained(0.5))
