"""How well a network does on images it was not trained on, with population statistics."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from batchnorm.train.inputs import Crops
from batchnorm.train.predictions import mean_log_probabilities, run_predictions
from batchnorm.train.ranks import ALONE, Ranks


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
    per_class: dict[str, float] = field(default_factory=dict)
    """Top-1 accuracy of each class by its name, 0 to 1; empty unless asked for."""


def score(log_probabilities: Tensor, labels: np.ndarray, ranks: Ranks = ALONE) -> Scores:
    """Compare log-probabilities, shape (N, classes), with labels, shape (N,).

    With fewer than five classes, top-5 looks at all of them and is 1.

    Args:
        log_probabilities: Of this rank's examples; with several ranks N may be 0.
        labels: Theirs.
        ranks: Whose examples are scored together.
    """
    truth = torch.from_numpy(labels)
    ranked = log_probabilities.topk(min(5, log_probabilities.shape[1]), dim=1).indices == truth[:, None]
    if ranks.num > 1:
        loss = nn.functional.nll_loss(log_probabilities, truth, reduction="sum")
        here = torch.stack([ranked[:, 0].double().sum(), ranked.any(dim=1).double().sum(), loss])
        *sums, total = ranks.sum(torch.cat([here, torch.tensor([len(labels)])]).double()).tolist()
        top1, top5, loss = (each / total for each in sums)
        return Scores(top1=top1, top5=top5, loss=loss, num_examples=int(total))
    return Scores(
        top1=ranked[:, 0].double().mean().item(),
        top5=ranked.any(dim=1).double().mean().item(),
        loss=nn.functional.nll_loss(log_probabilities, truth).item(),
        num_examples=len(labels),
    )


def evaluate_runs(
    runs: Sequence[str | Path],
    *,
    data_dir: str | Path | None = None,
    checkpoint: str | None = None,
    crops: Crops = 1,
    per_class: bool = False,
    num_workers: int | None = None,
) -> list[RunScores]:
    """Test-set scores of each run, and of all together when there are several.

    An ensemble predicts by the arithmetic mean of its members' class probabilities, and so does a
    run of its crops'. Predictions are kept in the runs' folders and read from there the next time.

    Args:
        runs: Run folders.
        data_dir: Where the data of their recipes are looked for, as in `batchnorm.data.load`.
        checkpoint: `newest`, `best` or a step evaluates that checkpoint, with population statistics
            computed afresh; None the finished run's model.
        crops: Views of each image: 1, 10 or 144.
        per_class: Whether to tell the accuracy of each class, too.
        num_workers: Processes that decode images on disk; None is one for each core but one.

    Raises:
        FileNotFoundError: A folder is no run, is not finished, or has no such checkpoint.
        ValueError: A file of the run is damaged, the data are not those that it was trained on, or its
            network cannot see crops.

    Source: Ioffe & Szegedy (2015), section 4.2.3.
    """
    if not runs:
        raise ValueError("Nothing to evaluate: give at least one run folder.")
    results: list[RunScores] = []
    members: list[Tensor] = []
    labels: np.ndarray | None = None
    classes: tuple[str, ...] = ()

    def add(name: str, predictions: Tensor, labels: np.ndarray) -> None:
        of_each = class_accuracy(predictions, labels, classes) if per_class else {}
        results.append(RunScores(name, score(predictions, labels), of_each))

    for folder in map(Path, runs):
        found, data = run_predictions(
            folder, data_dir=data_dir, checkpoint=checkpoint, crops=crops, num_workers=num_workers
        )
        if labels is not None and not np.array_equal(labels, found.labels):
            raise ValueError(
                f"{folder} was trained on other data ({data.name}) than {runs[0]}: no ensemble of both."
            )
        labels, classes = found.labels, data.classes
        members.append(found.log_probabilities)
        add(str(folder), found.log_probabilities, labels)
    if len(members) > 1 and labels is not None:
        add(f"ensemble of {len(members)}", mean_log_probabilities(torch.stack(members)), labels)
    return results


def class_accuracy(log_probabilities: Tensor, labels: np.ndarray, classes: Sequence[str]) -> dict[str, float]:
    """Top-1 accuracy of each class that has examples, by its name, 0 to 1."""
    right = (log_probabilities.argmax(1).numpy() == labels).astype(np.float64)
    return {name: float(right[labels == k].mean()) for k, name in enumerate(classes) if (labels == k).any()}
