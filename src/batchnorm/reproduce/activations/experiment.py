"""What the experiment is: its settings, checked, and the points at which it looks."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Section 4.1, figure 1: the paper's network on digits, with and without BN.

    Binary 28×28 input, three layers of 100 sigmoids, plain SGD on batches of 60. Trains both
    networks from the same initial weights on the same batches, for every seed and learning
    rate, and evaluates with population statistics. Writes result.json, pictures and
    report.html into --out; a second call goes on where the first one stopped.
    """

    data: str = "digits"
    """digits (comes with scikit-learn), mnist or fashion-mnist."""
    data_dir: Path | None = None
    """Folder that holds the data set; else $BATCHNORM_DATA, else it is downloaded."""
    out: Path = Path("runs/activations")
    """Folder for results; made if missing."""
    seeds: int = 5
    """Number of seeds; each has its own initial weights and order of examples."""
    rates: tuple[float, ...] = (0.05, 0.1, 0.5, 1.0)
    """Learning rates of plain SGD."""
    headline_rate: float | None = None
    """One of the rates, to stand for the paper's, which gives none (default: 0.1, or else the lowest)."""
    steps: int = 50_000
    """Training steps."""
    batch_size: int = 60
    """Examples a step."""
    init_std: float = 0.1
    """Deviation of the Gaussian initial weights; the paper says small."""
    evaluate_every: int = 500
    """Steps between evaluations; there are a few more in the first of these intervals."""
    statistics_examples: int = 10_000
    """Training examples for the population statistics (all of them where there are fewer)."""
    probe_examples: int = 2_000
    """Test examples for the percentiles of sigmoid inputs (all of them where there are fewer)."""
    processes: int | None = None
    """Networks of one seed and kind train in one process; this many at once (default: one a core)."""

    def __post_init__(self) -> None:
        for name in ("seeds", "steps", "evaluate_every", "statistics_examples", "probe_examples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.processes is not None and self.processes < 1:
            raise ValueError(f"processes must be at least 1, got {self.processes}")
        if self.batch_size < 2:
            raise ValueError(f"batch_size must be at least 2 for batch statistics, got {self.batch_size}")
        if not self.rates or min(self.rates) <= 0 or len(set(self.rates)) < len(self.rates):
            raise ValueError(f"rates must be positive and different from each other, got {self.rates}")
        if self.headline_rate is None:
            object.__setattr__(self, "headline_rate", 0.1 if 0.1 in self.rates else min(self.rates))
        if self.headline_rate not in self.rates:
            raise ValueError(f"headline_rate {self.headline_rate} is not one of the rates {self.rates}")
        if self.init_std <= 0:
            raise ValueError(f"init_std must be positive, got {self.init_std}")

    @property
    def evaluation_steps(self) -> list[int]:
        """Steps after which the networks are evaluated: 0, a few early ones, the grid, the last."""
        early = [round(self.evaluate_every * part) for part in (0.1, 0.2, 0.4, 0.6, 0.8)]
        grid = range(self.evaluate_every, self.steps + 1, self.evaluate_every)
        return sorted({s for s in (0, *early, *grid, self.steps) if s <= self.steps})
