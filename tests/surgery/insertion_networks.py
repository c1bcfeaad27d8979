"""Networks without normalization (but one), each written in a different way, all for (N, 64) digits."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WithModules(nn.Module):
    """A CNN with its layers as attributes; a ReLU for each use."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.relu1 = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(8, 16, 3, padding=1)
        self.relu2 = nn.ReLU(inplace=True)
        self.head = nn.Linear(16 * 2 * 2, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(-1, 1, 8, 8)
        x = self.pool(self.relu1(self.conv1(x)))
        x = self.relu2(self.pool(self.conv2(x)))
        return self.head(x.flatten(1))


class Functional(nn.Module):
    """Nonlinearities as functions of two libraries and as methods, dropout by mode."""

    temperature = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.out = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc1(x))
        x = torch.sigmoid(self.fc2(x))
        x = F.dropout(x, 0.1, self.training)
        x = self.fc3(x).tanh()
        return self.out(x) / self.temperature

    def predict(self, x: Tensor) -> Tensor:
        return self(x).argmax(1)


class Block(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, padding=1)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None if width == out else nn.Conv2d(width, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.conv1(x))
        out = self.conv2(out)
        out += identity
        return self.relu(out)


class Residual(nn.Module):
    """A residual net; each block has one ReLU that it calls twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU())
        self.layers = nn.Sequential(Block(8, 8), Block(8, 12))
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(self.stem(x.view(-1, 1, 8, 8)))
        return self.head(x.mean((2, 3)))


class SharedActivation(nn.Module):
    """One ReLU for the whole network."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()
        self.layers = nn.ModuleList(nn.Linear(64 if i == 0 else 32, 32) for i in range(3))
        self.out = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.act(layer(x))
        return self.out(x)


class Step(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 32)
        self.act = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.fc(x))


class SharedBlock(nn.Module):
    """One block called twice: the same weights, other statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(64, 32)
        self.block = Step()
        self.out = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.block(self.block(self.inp(x))))


class MixerBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        self.tokens = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return x + F.gelu(self.tokens(x.transpose(1, 2))).transpose(1, 2)


class Mixer(nn.Module):
    """Features last, (N, L, C); one Linear mixes tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.blocks = nn.Sequential(MixerBlock(), MixerBlock())
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x.view(-1, 8, 8))).mean(1))


class Dynamic(nn.Module):
    """Takes a branch by value, so that the whole cannot be traced; two of its pieces can."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.Tanh())
        self.loop = Step()
        self.last = nn.Linear(32, 32)
        self.act = nn.ReLU()
        self.head = nn.Sequential(nn.Linear(32, 16), nn.SiLU(), nn.Linear(16, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        for _ in range(2 if x.abs().mean() < 1e6 else 3):
            x = self.loop(x)
        return self.head(self.act(self.last(x)))


class PartlyNormalized(nn.Module):
    """Already has a BatchNorm in one place."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU())
        self.b = nn.Sequential(nn.Linear(32, 32), nn.ReLU())
        self.out = nn.Linear(32, 10)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x))
        return self.out(x * self.sigmoid(x.mean(1, keepdim=True)))


class Decoder(nn.Module):
    """Transposed convolutions that undo the pooling of an encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(1, 6, 2, stride=2), nn.ELU())
        self.up = nn.ConvTranspose2d(6, 8, 2, stride=2)
        self.act = nn.LeakyReLU(0.1)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.up(self.down(x.view(-1, 1, 8, 8))))
        return self.head(x.mean((2, 3)))


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class Branches(nn.Module):
    """Branches concatenated, an activation written by hand, a view between layer and activation."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(64, 16), nn.Linear(64, 16)
        self.fc = nn.Linear(32, 36)
        self.swish = Swish()
        self.out = nn.Linear(36, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(torch.cat([self.left(x), self.right(x)], dim=1))
        x = self.swish(self.fc(x))
        return self.out(x)


def plain_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.Sigmoid(), nn.Linear(32, 32), nn.Sigmoid(), nn.Linear(32, 10))


def nested() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Sequential(nn.Conv2d(1, 8, 3), nn.Sequential(nn.Dropout2d(0.1), nn.PReLU(8)), nn.MaxPool2d(2)),
        nn.Flatten(),
        nn.Sequential(nn.Linear(72, 32), nn.Hardswish(), nn.Linear(32, 10)),
    )


def conv1d() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (8, 8)), nn.Conv1d(8, 12, 3), nn.GELU(), nn.Flatten(), nn.Linear(72, 10)
    )


def conv3d() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 4, 4, 4)), nn.Conv3d(1, 6, 3), nn.Softplus(), nn.Flatten(), nn.Linear(48, 10)
    )
