"""One job: a cell's networks of one seed, at every learning rate."""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchnorm.data import ImageData, batch_indices, epoch_order, load, to_input
from batchnorm.layers import Normalization
from batchnorm.reproduce.parts import keep
from batchnorm.reproduce.pool import advance
from batchnorm.reproduce.regularization.experiment import KINDS, Regularization
from batchnorm.reproduce.regularization.networks import network
from batchnorm.statistics import recalibrate

MOMENTUM = 0.9
CHUNK = 1_000
"""Images in a batch of evaluation."""


class Labelled(NamedTuple):
    """Images as a network takes them, and their labels."""

    images: Tensor
    labels: Tensor


class Parts(NamedTuple):
    """The data as one seed divides them."""

    train: Labelled
    held_out: Labelled
    test: Labelled


def run_part(
    experiment: Regularization, name: str, kind: str, dropout: float, batch_size: int, seed: int
) -> None:
    """Train at each learning rate and keep how well each network does."""
    data = load(experiment.data, experiment.data_dir, progress=False)
    parts = divide(experiment, data, seed)
    runs = []
    for rate in experiment.rates:
        net = network(data.image_shape, len(data.classes), normalize=kind == "bn", dropout=dropout, seed=seed)
        runs.append({"rate": rate, **train(experiment, net, parts, rate, batch_size, seed)})
    keep(experiment.out, name, {"runs": runs})


def divide(experiment: Regularization, data: ImageData, seed: int) -> Parts:
    """Images to train on and to hold out, which this seed draws, and all of the test set.

    Inputs have mean 0 and deviation 1 over the images to train on, in each colour.

    Raises:
        ValueError: The training set has fewer images than are asked for.
    """
    count, wanted = len(data.train_images), experiment.examples + experiment.held_out
    if wanted > count:
        raise ValueError(
            f"examples {experiment.examples} and held_out {experiment.held_out} need {wanted} images, and "
            f"{data.name} has {count} to train on"
        )
    order = epoch_order(0, count, seed).numpy()
    chosen, held_out = order[: experiment.examples], order[experiment.examples : wanted]
    train = to_input(torch.from_numpy(data.train_images[chosen]))
    axes = (0, 1, 2) if train.ndim == 3 else (0, 2, 3)
    std, mean = torch.std_mean(train, axes, keepdim=True)

    def labelled(images: Tensor, labels: Any) -> Labelled:
        return Labelled((images - mean) / std, torch.from_numpy(labels))

    return Parts(
        labelled(train, data.train_labels[chosen]),
        labelled(to_input(torch.from_numpy(data.train_images[held_out])), data.train_labels[held_out]),
        labelled(to_input(torch.from_numpy(data.test_images)), data.test_labels),
    )


def train(
    experiment: Regularization, net: nn.Module, parts: Parts, rate: float, batch_size: int, seed: int
) -> dict[str, Any]:
    """One network; accuracies at its end, or ``diverged`` with the step at which the loss was not finite.

    Returns:
        ``diverged``, a step or None; ``loss``, the mean over the last epoch's batches as training saw
        them; ``train``, ``held_out`` and ``test``, accuracies with population statistics of the training
        images; ``moving``, that on the test set with the moving averages of training. Without BN both are
        the same.
    """
    images, labels = parts.train
    optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=MOMENTUM)
    steps = experiment.steps(batch_size)
    total, last_epoch = 0.0, steps - experiment.examples // batch_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of dropout
        net.train()
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = experiment.rate_at(rate, batch_size, step)
            chosen = batch_indices(step, batch_size, len(labels), seed)
            loss = F.cross_entropy(net(images[chosen]), labels[chosen])
            value = loss.item()
            if not math.isfinite(value):
                advance(steps - step)
                return {"diverged": step, **dict.fromkeys(("loss", "train", "held_out", "test", "moving"))}
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += value if step >= last_epoch else 0.0
            if (step + 1) % 100 == 0:
                advance(100)
    advance(steps % 100)
    moving = accuracy(net, parts.test)
    if any(isinstance(layer, Normalization) for layer in net.modules()):
        recalibrate(net, images.split(CHUNK))
    found = {name: accuracy(net, part) for name, part in parts._asdict().items()}
    return {"diverged": None, "loss": total / (steps - last_epoch), **found, "moving": moving}


@torch.no_grad()
def accuracy(net: nn.Module, part: Labelled) -> float:
    """Share of images whose class is named, in evaluation mode."""
    net.eval()
    chunks = zip(part.images.split(CHUNK), part.labels.split(CHUNK), strict=True)
    right = sum(int((net(images).argmax(1) == labels).sum()) for images, labels in chunks)
    return right / len(part.labels)


def name_of(kind: str, dropout: float, batch_size: int, seed: int) -> str:
    """Of a part."""
    return f"{kind}-dropout-{dropout:g}-batch-{batch_size}-seed-{seed}"


def names(experiment: Regularization) -> dict[str, tuple[Regularization, str, str, float, int, int]]:
    """All parts by name, with the arguments of `run_part`; the long ones first."""
    cells = [
        (kind, dropout, batch_size, seed)
        for batch_size in sorted(experiment.batch_sizes)
        for seed in range(experiment.seeds)
        for kind in KINDS
        for dropout in experiment.dropouts
    ]
    return {name_of(*cell): (experiment, name_of(*cell), *cell) for cell in cells}


def num_steps(experiment: Regularization, name: str) -> int:
    """Steps that the part of this name reports."""
    return experiment.steps(int(name.split("-")[-3])) * len(experiment.rates)
