"""How good a model is on examples held out, and the loss that it learns from."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from batchnorm.choosing.examples import Examples
from batchnorm.doctor.data import labels_of, run_batch
from batchnorm.statistics.feeding import Forward

Loss = Callable[[Any, Any], Tensor]
Metric = Callable[[nn.Module], Any]
Score = Literal["accuracy", "loss", "metric"]

CHUNK = 256
"""Examples in a batch of evaluation."""


def moved(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device."""
    plain = dict(batch) if isinstance(batch, Mapping) else batch
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, plain)


def scores_of(output: Any) -> Any:
    """Of an output, what may be class scores: itself, its ``"logits"``, or the first of several."""
    if isinstance(output, Mapping):
        return output.get("logits")
    if isinstance(output, tuple | list) and output:
        return output[0]
    return getattr(output, "logits", output)


def are_classes(output: Any, batch: Any) -> bool:
    """Whether class scores, (N, K), meet integer labels, (N,), as the batch's second item."""
    scores, labels = scores_of(output), labels_of(batch)
    return (
        isinstance(scores, Tensor) and labels is not None and scores.dim() == 2 and len(scores) == len(labels)
    )


def training_loss(output: Any, batch: Any, loss: Loss | None) -> Tensor:
    """What a step descends: the user's, the output's own ``loss``, or cross-entropy of class scores.

    Raises:
        TypeError: The user's loss is not a tensor of one number.
        ValueError: There is none of them.
    """
    if loss is not None:
        value = loss(output, batch)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise TypeError(f"loss(output, batch) must be a tensor of one number, got {type(value).__name__}")
        return value
    own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(own, Tensor):
        return own
    if not are_classes(output, batch):
        raise ValueError(
            "loss=callable(output, batch) is needed: the output has no loss of its own, and is not class "
            "scores (N, K) beside integer labels (N,) as the batch's second item"
        )
    return F.cross_entropy(scores_of(output), labels_of(batch))


@dataclass(frozen=True)
class Judge:
    """Gives a model in evaluation mode a number.

    Attributes:
        held_out: Examples that no step sees.
        loss: As in `training_loss`.
        forward: How to call the model; None for the usual way.
        metric: ``metric(model)`` in place of accuracy or loss.
        score: What is counted.
        higher_is_better: Of the number.
    """

    held_out: Examples
    loss: Loss | None
    forward: Forward | None
    metric: Metric | None
    score: Score
    higher_is_better: bool

    def __call__(self, model: nn.Module, numbers: Tensor, device: torch.device) -> float:
        """The score on the held-out examples with these numbers; nan or infinite where it is so.

        Raises:
            TypeError: The user's metric is not a number.
        """
        if self.metric is not None:
            try:
                return float(self.metric(model))
            except (TypeError, ValueError) as error:
                raise TypeError(f"metric(model) must return one number: {error}") from error
        total = 0.0
        for chunk in numbers.split(CHUNK):
            batch = moved(self.held_out.take(chunk), device)
            output = run_batch(model, batch, 0, self.forward)
            if self.score == "accuracy":
                right = scores_of(output).argmax(1) == labels_of(batch)
                total += float(right.sum())
            else:
                total += float(training_loss(output, batch, self.loss)) * len(chunk)
        return total / len(numbers)

    def better(self, first: float, second: float) -> bool:
        """Whether the first score is better; what is not finite is worst."""
        if not math.isfinite(first) or not math.isfinite(second):
            return math.isfinite(first)
        return first > second if self.higher_is_better else first < second
