"""How well a network does on images it was not trained on, with population statistics."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.data import ImageData, epoch_order, load, to_input
from batchnorm.statistics import recalibrate
from batchnorm.train.build import build_model, process_settings, resolve_device
from batchnorm.train.recipe import Recipe
from batchnorm.train.run import data_facts, load_model, read_run

BATCH = 1000
"""Examples evaluated at once; with fixed statistics this has no influence on the result."""


@dataclass(frozen=True)
class Scores:
    """Result of one evaluation."""

    top1: float
    """Share of examples whose most probable class is theirs, 0 to 1."""
    top5: float
    """Share whose class is among the five most probable, 0 to 1."""
    loss: float
    """Mean cross-entropy, nats."""
    num_examples: int
    """Examples evaluated."""


@dataclass(frozen=True)
class RunScores:
    """Scores of one run, or of several as an ensemble."""

    name: str
    """The run's folder, or what the ensemble consists of."""
    scores: Scores
    """Its result."""


def with_population_statistics(model: nn.Module, images: Tensor, recipe: Recipe) -> nn.Module:
    """A copy in evaluation mode whose BN layers hold the statistics of the training set.

    Training goes on with the original, which is not touched.

    Args:
        model: The network.
        images: All training images, uint8 of shape (N, H, W), on the model's device.
        recipe: Says how many of them to use (a fixed choice by its seed) and whether to binarize.

    Source: Ioffe & Szegedy (2015), Algorithm 2, lines 8 to 10; exact moments in place of averages.
    """
    twin = copy.deepcopy(model).eval()
    if any(isinstance(module, _BatchNorm) for module in twin.modules()):
        num_examples = min(recipe.recalibrate_examples or len(images), len(images))
        chosen = epoch_order(0, len(images), recipe.seed)[:num_examples].to(images.device)
        batches = [to_input(images[part], binarize=recipe.binarize) for part in chosen.split(BATCH)]
        recalibrate(twin, batches)
    return twin


@torch.no_grad()
def log_probabilities(model: nn.Module, images: Tensor, *, binarize: bool) -> Tensor:
    """Logarithm of the class probabilities: log-softmax of the model's logits.

    Args:
        model: In evaluation mode.
        images: uint8, shape (N, H, W), on the model's device.
        binarize: As in training.

    Returns:
        float64, shape (N, classes), on the CPU.
    """
    logits = [model(to_input(part, binarize=binarize)).double().cpu() for part in images.split(BATCH)]
    return torch.cat(logits).log_softmax(dim=1)


def score(log_probabilities: Tensor, labels: np.ndarray) -> Scores:
    """Compare log-probabilities, shape (N, classes), with labels, shape (N,).

    With fewer than five classes, top-5 looks at all of them and is 1.
    """
    truth = torch.from_numpy(labels)
    ranked = log_probabilities.topk(min(5, log_probabilities.shape[1]), dim=1).indices == truth[:, None]
    return Scores(
        top1=ranked[:, 0].double().mean().item(),
        top5=ranked.any(dim=1).double().mean().item(),
        loss=nn.functional.nll_loss(log_probabilities, truth).item(),
        num_examples=len(labels),
    )


def evaluate_runs(
    runs: Sequence[str | Path], *, data_dir: str | Path | None = None, checkpoint: str | None = None
) -> list[RunScores]:
    """Test-set scores of each run, and of all together when there are several.

    An ensemble predicts by the arithmetic mean of its members' class probabilities.

    Args:
        runs: Run folders.
        data_dir: Where the data of their recipes are looked for, as in `batchnorm.data.load`.
        checkpoint: `newest`, `best` or a step evaluates that checkpoint, with population statistics
            computed afresh; None the finished run's model.

    Raises:
        FileNotFoundError: A folder is no run, is not finished, or has no such checkpoint.
        ValueError: A file of the run is damaged, or the data are not those that it was trained on.

    Source: Ioffe & Szegedy (2015), section 4.2.3, for the ensemble.
    """
    if not runs:
        raise ValueError("Nothing to evaluate: give at least one run folder.")
    results, members, labels = [], [], None
    for folder in map(Path, runs):
        predictions, data = _run_predictions(folder, data_dir, checkpoint)
        if labels is not None and not np.array_equal(labels, data.test_labels):
            raise ValueError(
                f"{folder} was trained on other data ({data.name}) than {runs[0]}: no ensemble of both."
            )
        labels = data.test_labels
        members.append(predictions)
        results.append(RunScores(str(folder), score(predictions, labels)))
    if len(members) > 1:
        mean = torch.stack(members).logsumexp(dim=0) - math.log(len(members))
        results.append(RunScores(f"ensemble of {len(members)}", score(mean, data.test_labels)))
    return results


def _run_predictions(
    folder: Path, data_dir: str | Path | None, checkpoint: str | None
) -> tuple[Tensor, ImageData]:
    recipe, facts = read_run(folder)
    data = load(facts["name"], data_dir, size=facts["image_shape"][0])
    if (found := data_facts(data)) != facts:
        raise ValueError(f"{folder} was trained on other data: {facts}, and {data.name} is now {found}.")
    device = resolve_device(recipe.device)
    with process_settings(recipe, device):
        model = build_model(recipe, data.image_shape, len(data.classes))
        load_model(folder, model, checkpoint)
        model.to(device).eval()
        if checkpoint is not None:
            model = with_population_statistics(model, torch.from_numpy(data.train_images).to(device), recipe)
        images = torch.from_numpy(data.test_images).to(device)
        return log_probabilities(model, images, binarize=recipe.binarize), data
