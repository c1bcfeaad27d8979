"""Networks trained on the real MNIST and CIFAR-10 are healthy."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from batchnorm.data import load
from batchnorm.doctor import diagnose
from batchnorm.train import get_recipe, train
from batchnorm.train.inputs import evaluation_input


@pytest.mark.slow
def test_the_papers_network_on_mnist(real_data, tmp_path):
    from dataclasses import replace

    recipe = replace(get_recipe("bn-mlp"), steps=1500, eval_every=1500, checkpoint_every=1500, log_every=500)
    data = load("mnist", real_data, progress=False)
    result = train(recipe, data, tmp_path / "run", progress=False, tensorboard=False)
    assert result.scores.top1 > 0.9
    x = evaluation_input(recipe, torch.from_numpy(data.test_images[:1920]))
    given = list(zip(x.split(60), torch.from_numpy(data.test_labels[:1920]).split(60), strict=True))
    assert diagnose(result.model, given).healthy


class Block(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, after // before, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.way = (
            nn.Identity() if before == after else nn.Conv2d(before, after, 1, after // before, bias=False)
        )

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.way(x))


@pytest.mark.slow
def test_a_residual_network_on_cifar10(real_data):
    data = load("cifar10", real_data, progress=False)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        Block(16, 16),
        Block(16, 32),
        Block(32, 64),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )

    def batch(images, labels, chosen):
        x = torch.from_numpy(images[chosen]).float() / 127.5 - 1
        return x, torch.from_numpy(labels[chosen])

    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    random = np.random.default_rng(0)
    for step in range(300):
        x, y = batch(data.train_images, data.train_labels, random.integers(0, 50_000, 64))
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 - step / 300)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    given = [batch(data.test_images, data.test_labels, slice(i * 64, i * 64 + 64)) for i in range(16)]
    diagnosis = diagnose(model.eval(), given)
    assert diagnosis.inference_loss < 1.5
    assert diagnosis.healthy, str(diagnosis)
