"""One job: the networks of one seed, all learning rates, with or without BN."""

import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from batchnorm.data import ImageData, batch_indices, load, to_input
from batchnorm.files import write_bytes
from batchnorm.models.stack import StackedMLP
from batchnorm.reading import read_arrays
from batchnorm.reproduce.activations.experiment import Activations
from batchnorm.reproduce.pool import advance
from batchnorm.statistics import recalibrate

PERCENTILES = (15, 50, 85)


@dataclass(frozen=True)
class History:
    """What one job measured. K networks (one a rate), E evaluations, L hidden layers, U units."""

    steps: np.ndarray
    """(E,), training steps done at each evaluation."""
    accuracy: np.ndarray
    """(K, E), on the test set, with population statistics."""
    loss: np.ndarray
    """(K, E), mean training loss since the evaluation before; NaN at step 0."""
    percentiles: np.ndarray
    """(K, E, L, U, 3): the {15, 50, 85}th of each sigmoid's input over the probe examples."""
    seconds: np.ndarray
    """(2,): spent in training steps and in evaluations."""

    def save(self, path: Path) -> None:
        """Write all at once: the file is there whole or not at all."""
        buffer = io.BytesIO()
        np.savez(buffer, **vars(self))
        write_bytes(path, buffer.getvalue())

    @classmethod
    def read(cls, path: Path) -> "History":
        """Read what `save` wrote."""
        return cls(**read_arrays(path))


def path_of(experiment: Activations, seed: int, normalize: bool) -> Path:
    """Where the job keeps its history."""
    return experiment.out / "jobs" / f"seed-{seed}-{'bn' if normalize else 'plain'}.npz"


def run_job(experiment: Activations, seed: int, normalize: bool) -> None:
    """Train and evaluate, and write the `History`."""
    data = load(experiment.data, experiment.data_dir, progress=False)
    train(experiment, data, seed, normalize).save(path_of(experiment, seed, normalize))


def train(experiment: Activations, data: ImageData, seed: int, normalize: bool) -> History:
    """Train one network for each rate, side by side, and evaluate all of them on the way."""
    images = to_input(torch.from_numpy(data.train_images), binarize=True).flatten(1)
    labels = torch.from_numpy(data.train_labels)
    rates = torch.tensor(experiment.rates)
    num_copies = len(rates)
    net = StackedMLP(
        num_copies,
        normalize=normalize,
        seed=seed,
        in_features=images.shape[1],
        classes=len(data.classes),
        init_std=experiment.init_std,
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    evaluate = _evaluator(experiment, data, images)

    records, seconds = [], np.zeros(2)
    losses, unreported = torch.zeros(num_copies), 0
    evaluation_steps = experiment.evaluation_steps
    clock = time.perf_counter()
    for step in range(experiment.steps + 1):
        if step in evaluation_steps:
            seconds[0] += time.perf_counter() - clock
            clock = time.perf_counter()
            records.append((step, *evaluate(net), losses / unreported))
            advance(unreported * num_copies)
            losses, unreported = torch.zeros(num_copies), 0
            seconds[1] += time.perf_counter() - clock
            clock = time.perf_counter()
        if step == experiment.steps:
            break
        chosen = batch_indices(step, experiment.batch_size, len(labels), seed)
        loss = net.losses(images[chosen], labels[chosen])
        optimizer.zero_grad()
        loss.backward(rates)
        optimizer.step()
        losses += loss.detach()
        unreported += 1
    steps, accuracy, percentiles, mean_loss = zip(*records, strict=True)
    return History(
        np.array(steps),
        torch.stack(accuracy, 1).numpy(),
        torch.stack(mean_loss, 1).numpy(),
        np.stack(percentiles, 1),
        seconds,
    )


def _evaluator(
    experiment: Activations, data: ImageData, images: Tensor
) -> Callable[[StackedMLP], tuple[Tensor, np.ndarray]]:
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    known = images[order[: experiment.statistics_examples]]
    test = to_input(torch.from_numpy(data.test_images), binarize=True).flatten(1)
    test_labels = torch.from_numpy(data.test_labels)
    stride = max(1, len(test) // experiment.probe_examples)

    @torch.no_grad()
    def evaluate(net: StackedMLP) -> tuple[Tensor, np.ndarray]:
        """Accuracy of each copy (K,) and percentiles (K, L, U, 3)."""
        if net.norms:
            # All of the examples as one batch: its moments are the population's, at every depth.
            recalibrate(net, [known], method="pooled")
        net.eval()
        entering, logits = net.hidden_inputs(test)
        net.train()
        accuracy = (logits.argmax(-1) == test_labels[:, None]).double().mean(0)
        probed = np.stack([layer[::stride].numpy() for layer in entering])  # (L, N, K, U)
        percentiles = np.percentile(probed, PERCENTILES, axis=1)  # (3, L, K, U)
        return accuracy, percentiles.transpose(2, 1, 3, 0).astype(np.float32)

    return evaluate
