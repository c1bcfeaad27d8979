"""A deep network, its data, and the one truth: all the data as one batch in training mode."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.layers import BatchNorm1d, BatchNorm2d

DATA = 40


class Deep(nn.Module):
    """Four normalizations in depth: convolutions with a shortcut, linear layers, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5)
        self.conv2, self.bn2 = nn.Conv2d(5, 5, 3, padding=1), BatchNorm2d(5, activation="relu")
        self.drop = nn.Dropout(0.5)
        self.linear1, self.bn3 = nn.Linear(5 * 16, 7), nn.BatchNorm1d(7)
        self.linear2, self.bn4 = nn.Linear(7, 3), BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.drop(self.bn2(self.conv2(x), residual=x))
        x = torch.sigmoid(self.bn3(self.linear1(x.flatten(1))))
        return self.bn4(self.linear2(x))


def deep(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(3)
    model = Deep().to(dtype)
    for norm in norms(model).values():  # as if it had trained on something else
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.1, 9)
        norm.num_batches_tracked.fill_(77)
    return model


def images(num: int = DATA, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    scale = torch.rand(num, 2, 1, 1, generator=generator, dtype=dtype) * 3
    return torch.randn(num, 2, 6, 6, generator=generator, dtype=dtype) * scale + 0.7


def norms(model: nn.Module) -> dict[str, _BatchNorm]:
    return {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}


def truth(model: nn.Module, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Statistics after one training-mode batch of all the data, without dropout."""
    model = copy.deepcopy(model).eval()
    for norm in norms(model).values():
        norm.train()
        norm.momentum = 1.0
    model(x)
    return {name: (norm.running_mean, norm.running_var) for name, norm in norms(model).items()}


def assert_statistics(
    model: nn.Module, expected: dict[str, tuple[Tensor, Tensor]], **tolerances: float
) -> None:
    for name, (mean, var) in expected.items():
        got = norms(model)[name]
        torch.testing.assert_close(got.running_mean, mean, msg=lambda m, n=name: f"{n}: {m}", **tolerances)
        torch.testing.assert_close(got.running_var, var, msg=lambda m, n=name: f"{n}: {m}", **tolerances)


def snapshot(model: nn.Module) -> dict[str, object]:
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "training": [m.training for m in model.modules()],
        "momentum": [n.momentum for n in norms(model).values()],
        "hooks": [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()],
        "grad": [p.requires_grad for p in model.parameters()],
        "rng": torch.get_rng_state(),
    }


def assert_unchanged(model: nn.Module, before: dict[str, object], *, but_statistics: bool = False) -> None:
    after = snapshot(model)
    states = before.pop("state"), after.pop("state")
    rng = before.pop("rng"), after.pop("rng")
    assert after == before
    assert torch.equal(*rng)
    for key, value in states[0].items():
        if not (but_statistics and ("running" in key or "tracked" in key)):
            assert torch.equal(value, states[1][key]), key
