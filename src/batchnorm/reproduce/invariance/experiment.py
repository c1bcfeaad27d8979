"""What the experiment is: its settings, checked."""

from dataclasses import dataclass
from pathlib import Path

from batchnorm.reproduce.parts import check_choices, check_counts

EQUATIONS = {
    "output": "BN(aWu) = BN(Wu)",
    "input": "∂BN(aWu)/∂u = ∂BN(Wu)/∂u",
    "weight": "∂BN(aWu)/∂(aW) = (1/a) ∂BN(Wu)/∂W",
}
"""Section 3.3's three, by what is compared."""

LAYERS = ("fc", "conv")
STATES = ("initial", "trained")
DTYPES = ("float64", "float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Invariance:
    """Section 3.3: BN(aWu) = BN(Wu), its gradients, and what follows for training.

    The three equations for scales a from 10^-decades to 10^decades, on a fully connected and a
    convolutional layer of networks before and after training, with real activations u, random
    cotangents, every kernel of this machine, eps = 0 and eps as layers have it, in float64,
    float32 and bfloat16; beside what eps must do to them by calculation. Then the paper's network
    trains from small and large weights at several rates: weights grow, gradients shrink, and the
    effective rate, rate / ‖W‖², settles. Writes result.json, pictures and report.html into --out;
    a second call does only what is missing. Minutes on two idle cores.
    """

    data: str = "digits"
    """digits (comes with scikit-learn), mnist or fashion-mnist."""
    data_dir: Path | None = None
    """Folder that holds the data set; else $BATCHNORM_DATA, else it is downloaded."""
    out: Path = Path("runs/invariance")
    """Folder for results; made if missing."""
    seeds: int = 3
    """Number of seeds; each has its own initial weights, order of examples and cotangents."""
    decades: int = 3
    """Scales a reach from 10^-decades to 10^decades, two a decade."""
    eps: float = 1e-5
    """The eps beside 0; added to the variance."""
    examples: int = 100
    """Training images on which the equations are tested."""
    prior_steps: int = 500
    """Steps of training, at rate 0.5, before the equations are tested on trained layers."""
    init_stds: tuple[float, ...] = (0.01, 0.1, 1.0)
    """Deviations of initial weights from which the paper's network trains."""
    rates: tuple[float, ...] = (0.1, 0.5, 2.0)
    """Its learning rates, plain SGD."""
    headline_rate: float = 0.5
    """The one of the rates that is drawn."""
    steps: int = 3_000
    """Its training steps."""
    batch_size: int = 60
    """Examples a step."""
    processes: int | None = None
    """Parts done at once (default: one a core)."""

    def __post_init__(self) -> None:
        check_counts(self, "seeds", "decades", "prior_steps", "steps", "processes")
        check_choices("rates", self.rates)
        check_choices("init_stds", self.init_stds)
        for name in ("batch_size", "examples"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} must be at least 2 for batch statistics, got {getattr(self, name)}")
        if self.headline_rate not in self.rates:
            raise ValueError(f"headline_rate {self.headline_rate} is not one of the rates {self.rates}")
        if not self.eps > 0:
            raise ValueError(f"eps must be positive, got {self.eps}: 0 is tested in any case")

    @property
    def scales(self) -> list[float]:
        """Every a, ascending; 1 is among them."""
        return [10 ** (half / 2) for half in range(-2 * self.decades, 2 * self.decades + 1)]
