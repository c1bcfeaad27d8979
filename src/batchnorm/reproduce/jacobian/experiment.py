"""What the experiment is: its settings, checked, and its networks."""

from dataclasses import dataclass
from pathlib import Path

from batchnorm.reproduce.parts import check_choices, check_counts

ACTIVATIONS = ("sigmoid", "relu")
NETWORKS = ("paper", "deep")
KINDS = ("bn", "plain")


@dataclass(frozen=True, kw_only=True)
class Jacobian:
    """Section 3.3's conjecture: singular values of layers' Jacobians near 1 under BN.

    On the paper's network (three hidden layers of 100) and on a fully connected one of fifty, sigmoid
    and ReLU, with and without BN, from several initial scales: singular values of the map from one
    layer's normalized inputs to the next's at several points of training, for each example with the
    statistics held fixed, and for a whole batch with the statistics as part of the map; whether the
    conditions that the paper names are met; and how the gradient changes through depth. Writes
    result.json, pictures and report.html into --out; a second call does only what is missing.
    Minutes on two idle cores.
    """

    data: str = "digits"
    """digits (comes with scikit-learn), mnist or fashion-mnist."""
    data_dir: Path | None = None
    """Folder that holds the data set; else $BATCHNORM_DATA, else it is downloaded."""
    out: Path = Path("runs/jacobian")
    """Folder for results; made if missing."""
    seeds: int = 3
    """Number of seeds; each has its own initial weights and order of examples."""
    init_stds: tuple[float, ...] = (0.1, 0.14, 0.2)
    """Deviations of the Gaussian initial weights; 0.14 is sqrt(2/100), which keeps ReLU's gradients level."""
    headline_std: float = 0.1
    """The one of them that is drawn, and whose Jacobians of whole batches are taken."""
    activations: tuple[str, ...] = ACTIVATIONS
    """Nonlinearities of the hidden layers: sigmoid, relu."""
    depth: int = 50
    """Hidden layers of the deep network, 100 units each."""
    steps: int = 1_000
    """Training steps of the paper's network."""
    rate: float = 0.1
    """Its learning rate, plain SGD."""
    deep_steps: int = 300
    """Training steps of the deep network."""
    deep_rate: float = 0.01
    """Its learning rate."""
    batch_size: int = 60
    """Examples a step, and in the batch whose gradients and statistics are measured."""
    examples: int = 5
    """Examples of that batch whose Jacobians are taken."""
    whole_batch: int = 20
    """Examples in the batch whose Jacobian is taken as a whole."""
    condition_examples: int = 1_000
    """Training examples on which the paper's conditions are measured."""
    processes: int | None = None
    """Networks of one depth, nonlinearity, kind and seed train in one process; this many at once
    (default: one a core)."""

    def __post_init__(self) -> None:
        check_counts(self, "seeds", "steps", "deep_steps", "examples", "processes")
        check_choices("init_stds", self.init_stds)
        check_choices("activations", self.activations, ACTIVATIONS)
        for name in ("batch_size", "depth"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} must be at least 2, got {getattr(self, name)}")
        if self.whole_batch < 3:
            raise ValueError(
                f"whole_batch must be at least 3, got {self.whole_batch}: mean and deviation take two "
                f"directions"
            )
        if self.headline_std not in self.init_stds:
            raise ValueError(f"headline_std {self.headline_std} is not one of init_stds {self.init_stds}")
        if self.examples > self.batch_size:
            raise ValueError(f"examples must be at most batch_size {self.batch_size}, got {self.examples}")
        for name in ("rate", "deep_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    def training(self, network: str) -> tuple[int, int, float]:
        """Hidden layers, steps and rate of "paper" or "deep"."""
        return (
            (3, self.steps, self.rate)
            if network == "paper"
            else (self.depth, self.deep_steps, self.deep_rate)
        )

    def points(self, network: str) -> list[int]:
        """Steps after which the network is measured: none, a tenth, all."""
        steps = self.training(network)[1]
        return sorted({0, max(1, steps // 10), steps})
