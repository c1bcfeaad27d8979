"""What the experiment is: its settings, checked, and the learning rate of each cell."""

import math
from dataclasses import dataclass
from pathlib import Path

from batchnorm.reproduce.parts import check_choices, check_counts

KINDS = ("plain", "bn")
REFERENCE_BATCH = 32
"""At this batch size a cell's learning rate is the one that is named."""


@dataclass(frozen=True, kw_only=True)
class Regularization:
    """Section 3.4: BN's noise as a regularizer, with and without dropout, at several batch sizes.

    On few training images, so that networks overfit: every combination of dropout, BN and batch size,
    each at several learning rates, of which held-out images choose one. All see the same number of
    examples. Grey images train a fully connected network of two hidden layers with dropout after each;
    colour images a convolutional one with dropout before its last layer, where the paper's Inception
    has it. Writes result.json, pictures and report.html into --out; a second call does only what is
    missing. A minute or two on two idle cores.
    """

    data: str = "digits"
    """digits (comes with scikit-learn), mnist, fashion-mnist or cifar10."""
    data_dir: Path | None = None
    """Folder that holds the data set; else $BATCHNORM_DATA, else it is downloaded."""
    out: Path = Path("runs/regularization")
    """Folder for results; made if missing."""
    seeds: int = 3
    """Number of seeds; each has its own training images, initial weights and order of examples."""
    dropouts: tuple[float, ...] = (0.0, 0.25, 0.5)
    """Probabilities of dropping a unit; 0 must be among them."""
    batch_sizes: tuple[int, ...] = (4, 16, 64, 256)
    """Examples a step."""
    rates: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1)
    """Learning rates of SGD with momentum 0.9 at batches of 32; times batch / 32 at others, and falling
    to zero along half a cosine."""
    examples: int = 1024
    """Training images; every batch size must divide them, so that all networks see as many."""
    held_out: int = 400
    """Images of the training set, not trained on, that choose each cell's learning rate."""
    epochs: int = 10
    """How often each training image is seen."""
    processes: int | None = None
    """All learning rates of one cell and seed train in one process; this many at once (default: one a
    core)."""

    def __post_init__(self) -> None:
        check_counts(self, "seeds", "examples", "held_out", "epochs", "processes")
        check_choices("rates", self.rates)
        check_choices("batch_sizes", self.batch_sizes)
        if 0 not in self.dropouts or len(set(self.dropouts)) < len(self.dropouts):
            raise ValueError(
                f"dropouts must be different from each other, and 0, with which they are compared, among "
                f"them, got {self.dropouts}"
            )
        if not all(0 <= dropout < 1 for dropout in self.dropouts):
            raise ValueError(f"dropouts must be at least 0 and below 1, got {self.dropouts}")
        for batch_size in self.batch_sizes:
            if batch_size < 2:
                raise ValueError(f"batch_sizes must be at least 2 for batch statistics, got {batch_size}")
            if self.examples % batch_size:
                raise ValueError(
                    f"every batch size must divide examples {self.examples}, so that all networks see as "
                    f"many; {batch_size} does not"
                )

    def steps(self, batch_size: int) -> int:
        """Training steps: the same number of examples at every batch size."""
        return self.epochs * self.examples // batch_size

    def rate_at(self, rate: float, batch_size: int, step: int) -> float:
        """The learning rate of a step counted from 0, in proportion to the batch and along half a cosine."""
        fall = (1 + math.cos(math.pi * step / self.steps(batch_size))) / 2
        return rate * batch_size / REFERENCE_BATCH * fall
