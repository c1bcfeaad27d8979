"""What the experiment is: its settings, checked, and the ways to normalize that it compares."""

from dataclasses import dataclass
from pathlib import Path

from batchnorm.reproduce.parts import check_choices, check_counts

ACTIVATIONS = ("sigmoid", "relu")


@dataclass(frozen=True)
class Kind:
    """A way to normalize W u + b before the nonlinearity."""

    about: str
    """For people."""
    scales: bool
    """Divides by the deviation too."""
    inside: bool
    """The gradient goes through mean and deviation; else it takes them for constants."""
    affine: bool = False
    """γ and β follow."""
    moving: bool = False
    """By moving averages of the batches' moments instead of the batch's own."""


KINDS = {
    "mean-outside": Kind("mean, outside the gradient", scales=False, inside=False),
    "mean-inside": Kind("mean, inside the gradient", scales=False, inside=True),
    "both-outside": Kind("mean and deviation, outside", scales=True, inside=False),
    "moving-outside": Kind("moving averages of both, outside", scales=True, inside=False, moving=True),
    "affine-outside": Kind("both, outside, with γ and β", scales=True, inside=False, affine=True),
    "algorithm-1": Kind("Algorithm 1: both, inside, with γ and β", scales=True, inside=True, affine=True),
}
"""What is compared, by name; the last is this project's layer."""


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """Section 2: normalization that the gradient step does not see.

    First the section's own example: a layer u + b of which the mean over the data is subtracted;
    only b learns, by a gradient that takes the mean for a constant. Then whole networks, in which
    all learns: 784-100-100-100-10, each hidden layer normalized by the mean alone, or by mean and
    deviation, with the statistics outside the gradient or inside it, at several learning rates.
    Writes result.json, pictures and report.html into --out; a second call does only what is missing.
    Minutes on two idle cores.
    """

    data: str = "digits"
    """digits (comes with scikit-learn), mnist or fashion-mnist."""
    data_dir: Path | None = None
    """Folder that holds the data set; else $BATCHNORM_DATA, else it is downloaded."""
    out: Path = Path("runs/divergence")
    """Folder for results; made if missing."""
    seeds: int = 3
    """Number of seeds; each has its own initial weights and order of examples."""
    rates: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0)
    """Learning rates of plain SGD."""
    headline_rate: float = 1.0
    """The one of the rates that is drawn."""
    activations: tuple[str, ...] = ACTIVATIONS
    """Nonlinearities of the hidden layers: sigmoid, relu."""
    steps: int = 3_000
    """Training steps of each network."""
    batch_size: int = 60
    """Examples a step."""
    init_std: float = 0.1
    """Deviation of the Gaussian initial weights; biases start at 0."""
    moving_weight: float = 0.1
    """Weight of the newest batch in moving averages."""
    bias_steps: int = 1_000
    """Steps of the first part, in which only b learns."""
    bias_examples: int = 2_000
    """Training examples of the first part, all of them in each step."""
    processes: int | None = None
    """Networks of one kind, nonlinearity and seed train in one process; this many at once
    (default: one a core)."""

    def __post_init__(self) -> None:
        check_counts(self, "seeds", "steps", "bias_steps", "processes")
        check_choices("rates", self.rates)
        check_choices("activations", self.activations, ACTIVATIONS)
        for name in ("batch_size", "bias_examples"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} must be at least 2 for batch statistics, got {getattr(self, name)}")
        if self.headline_rate not in self.rates:
            raise ValueError(f"headline_rate {self.headline_rate} is not one of the rates {self.rates}")
        if self.init_std <= 0:
            raise ValueError(f"init_std must be positive, got {self.init_std}")
        if not 0 < self.moving_weight <= 1:
            raise ValueError(f"moving_weight must be above 0 and at most 1, got {self.moving_weight}")
