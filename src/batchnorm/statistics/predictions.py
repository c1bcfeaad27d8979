"""What a classifier says of some examples, without their labels: how certain it is, and of which classes."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.statistics.feeding import Forward, run

Logits = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Predictions:
    """A classifier's predictions of some examples, in sums.

    Attributes:
        entropy: Mean entropy of the predicted distributions, nats; 0 is certain, ln K knows nothing.
        counts: How many examples were predicted to be of each class, K numbers.
        batch_counts: The same of each batch.
    """

    entropy: float
    counts: tuple[int, ...]
    batch_counts: tuple[tuple[int, ...], ...] = ()

    @property
    def num_examples(self) -> int:
        """Examples predicted; those whose logits are not finite are left out."""
        return sum(self.counts)

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of the predictions that each class has."""
        return tuple(count / self.num_examples for count in self.counts)

    @property
    def effective_classes(self) -> float:
        """exp of the entropy of `shares`: K where all classes come equally often, 1 where only one does."""
        return math.exp(-sum(share * math.log(share) for share in self.shares if share))

    @property
    def favourite(self) -> int:
        """The class predicted most often."""
        return max(range(len(self.counts)), key=self.counts.__getitem__)

    def __str__(self) -> str:
        return (
            f"mean entropy {self.entropy:.3g} nats, {self.effective_classes:.3g} effective classes of "
            f"{len(self.counts)}, class {self.favourite} most often ({max(self.shares):.0%} of "
            f"{self.num_examples:,})"
        )


def logits_of(output: Any) -> Tensor:
    """The output itself, or the first item of a tuple or list, as logits of shape (N, K), K at least 2.

    Raises:
        TypeError: It is nothing of the kind.
    """
    if isinstance(output, tuple | list) and output:
        output = output[0]
    if (
        isinstance(output, Tensor)
        and output.is_floating_point()
        and output.dim() == 2
        and output.shape[1] > 1
    ):
        return output
    came = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
    raise TypeError(
        f"the model's output is no table of logits (N, K) with two classes or more: got {came}. Say where "
        "they are, logits=callable(output), or that there are none: logits=None"
    )


def entropies(logits: Tensor) -> Tensor:
    """Entropy of each row's softmax in nats, shape (N,), float32 or wider; differentiable."""
    logs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)
    return -(logs.exp() * logs).sum(1)


def predictions(
    model: nn.Module, batches: Iterable[Any], forward: Forward, logits: Logits
) -> Predictions | None:
    """What the model, as it is set, says of the batches; ``None`` of no finite logits at all.

    Raises:
        TypeError: An output has no logits, or a batch does not fit the model.
        RuntimeError: The model failed.
    """
    total, of_batches = 0.0, []
    for index, batch in enumerate(batches):
        found = logits(run(forward, model, batch, index))
        found = found[found.isfinite().all(1)]
        total += entropies(found).double().sum().item()
        of_batches.append(found.argmax(1).bincount(minlength=found.shape[1]).tolist())
    counts = tuple(map(sum, zip(*of_batches, strict=True)))
    if not sum(counts):
        return None
    return Predictions(total / sum(counts), counts, tuple(map(tuple, of_batches)))
