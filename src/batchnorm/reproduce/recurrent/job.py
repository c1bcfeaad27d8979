"""One job: one network, trained and measured on the way."""

import copy
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from batchnorm.data import batch_indices, load
from batchnorm.reproduce.parts import keep
from batchnorm.reproduce.pool import advance
from batchnorm.reproduce.recurrent.experiment import Recurrent
from batchnorm.reproduce.recurrent.network import Reader, gradients_through_time, initial_state, sequences

CHUNK = 500
"""Test images at a time."""


def run_part(experiment: Recurrent, name: str, task: str, kind: str, rate: float, seed: int) -> None:
    """Train one network, and keep what `train` gives."""
    keep(experiment.out, name, train(experiment, task, kind, rate, seed))


def train(experiment: Recurrent, task: str, kind: str, rate: float, seed: int) -> dict[str, Any]:
    """Train one network.

    Returns:
        ``steps`` and ``accuracy``, lists, of the first test images; ``loss``, the mean since the last
        evaluation; ``final``, the accuracy on all test images; ``gradients``, norms in h of every time
        step before training and after, with the loss; ``seconds``. A network whose loss is not finite
        ends early, with ``final`` None.
    """
    data = load(experiment.data, experiment.data_dir, progress=False)
    x, test = (sequences(data, part, task, experiment.pixel_side) for part in ("train", "test"))
    labels, test_labels = torch.from_numpy(data.train_labels), torch.from_numpy(data.test_labels)
    gamma = None if kind == "plain" else float(kind.removeprefix("bn-"))
    net = Reader(x.shape[2], x.shape[0], experiment.hidden_size, len(data.classes), gamma, seed)
    optimizer = torch.optim.RMSprop(net.parameters(), lr=rate, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    steps, num = experiment.steps(task), experiment.test_examples
    points = {round(steps * (1 + index) / experiment.evaluations) for index in range(experiment.evaluations)}
    found: dict[str, Any] = {"steps": [], "accuracy": [], "loss": [], "final": None}
    found["gradients"] = [measured(experiment, net, x, labels)]
    start, losses = time.process_time(), []
    for step in range(steps):
        chosen = batch_indices(step, experiment.batch_size, len(labels), seed)
        state = initial_state(len(chosen), experiment.hidden_size, experiment.noise, generator)
        loss = F.cross_entropy(net(x[:, chosen], state), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), experiment.clip)
        optimizer.step()
        losses.append(loss.item())
        advance(1)
        if step + 1 in points:
            found["steps"].append(step + 1)
            found["accuracy"].append(accuracy(net, test[:, :num], test_labels[:num]))
            found["loss"].append(sum(losses) / len(losses))
            losses = []
    found["seconds"] = time.process_time() - start
    if all(torch.isfinite(parameter).all() for parameter in net.parameters()):
        found["final"] = accuracy(net, test, test_labels)
        found["gradients"].append(measured(experiment, net, x, labels))
    return found


@torch.no_grad()
def accuracy(net: Reader, x: Tensor, labels: Tensor) -> float:
    """Share of sequences that are named rightly, with running statistics and a state of zeros."""
    net.eval()
    right = [
        (net(some).argmax(1) == those).sum().item()
        for some, those in zip(x.split(CHUNK, 1), labels.split(CHUNK), strict=True)
    ]
    net.train()
    return sum(right) / len(labels)


def measured(experiment: Recurrent, net: Reader, x: Tensor, labels: Tensor) -> dict[str, Any]:
    """Gradients through time of the first training examples, the same at every point."""
    num = experiment.batch_size
    state = initial_state(num, experiment.hidden_size, experiment.noise, torch.Generator().manual_seed(0))
    loss, norms = gradients_through_time(copy.deepcopy(net), x[:, :num], labels[:num], state)
    return {"loss": loss, "norms": norms}


def name_of(task: str, kind: str, rate: float, seed: int) -> str:
    """The name of a part."""
    return f"{task}-{kind}-rate-{rate:g}-seed-{seed}"


def names(experiment: Recurrent) -> dict[str, tuple[Recurrent, str, str, str, float, int]]:
    """All parts by name, with the arguments of `run_part`; seed by seed, the short ones first."""
    return {
        name_of(task, kind, rate, seed): (
            experiment, name_of(task, kind, rate, seed), task, kind, rate, seed
        )
        for task in experiment.tasks
        for seed in range(experiment.seeds)
        for kind, rate in experiment.networks()
    }  # fmt: skip


def num_steps(experiment: Recurrent, name: str) -> int:
    """Steps that the part of this name reports."""
    return experiment.steps(name.split("-")[0])
