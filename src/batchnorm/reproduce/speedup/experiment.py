"""What the experiment is: its settings, checked, and the trainings that it consists of."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from batchnorm.train import InceptionRecipe, get_recipe

NETWORKS = ("inception", "bn-x5", "bn-x30", "bn-baseline", "bn-x5-sigmoid")
"""The five of figure 2 and 3, the most telling first."""
PLAIN_SIGMOID = "inception-sigmoid"
EVALUATIONS = 20
"""Of each training; one costs as much as fifty steps."""

PAPER: dict[str, dict[str, float | None]] = {
    "inception": {"steps": 31.0e6, "best": 0.722},
    "bn-baseline": {"steps": 13.3e6, "best": 0.727},
    "bn-x5": {"steps": 2.1e6, "best": 0.730},
    "bn-x30": {"steps": 2.7e6, "best": 0.748},
    "bn-x5-sigmoid": {"steps": None, "best": 0.698},
}
"""Figure 3: steps to 72.2 % (None: never) and best top-1 on ImageNet."""

KEPT: dict[str, tuple[str, ...]] = {
    "rate": ("learning_rate",),
    "dropout": ("dropout",),
    "L2": ("weight_decay",),
    "decay": ("decay_every",),
    "response normalization": ("response_norm",),
    "shuffling": ("shuffle",),
    "distortion": ("distortion",),
}
"""Changes of section 4.2.1 by the fields of the recipe: an ablation keeps one as the baseline has it."""


@dataclass(frozen=True, kw_only=True)
class Speedup:
    """Section 4.2, figures 2 and 3: how many fewer steps a batch-normalized Inception needs.

    Trains plain Inception, BN-Baseline, BN-x5, BN-x30 and BN-x5-Sigmoid at the scale of CIFAR-10, all
    networks of a seed on the same order of images; plain Inception also at higher rates, the
    best of which is compared too; a sigmoid network without BN; and BN-x5 with one change of section 4.2.1
    undone at a time. Writes result.json, pictures and report.html into --out; a second call goes
    on where the first one stopped. About four hours on two cores; --time 0.05 gives a first look.
    """

    data: str = "cifar10"
    """Images of 32×32 pixels: cifar10."""
    data_dir: Path | None = None
    """Folder that holds the data set; else $BATCHNORM_DATA, else it is downloaded."""
    out: Path = Path("runs/speedup")
    """Folder for results; made if missing."""
    seeds: int = 3
    """Number of seeds; each has its own initial weights and order of images."""
    rates: tuple[float, ...] = (2.0, 5.0, 10.0)
    """Plain Inception's rate is also multiplied by these (with the first seed; the best of them with all)."""
    ablations: bool = True
    """Train BN-x5 with one change undone at a time, too."""
    ablation_seeds: int = 1
    """Number of seeds for these."""
    width: float = 0.25
    """Multiplies every number of channels."""
    bn_steps: int = 6_000
    """Steps of BN-x5, BN-x30 and BN-x5-Sigmoid: twice the paper's share of plain Inception's 15,500, since at
    this scale they are still rising."""
    time: float = 1.0
    """Multiplies all steps."""
    processes: int | None = None
    """Networks trained at once, each on one core (default: as many as there are cores)."""

    def __post_init__(self) -> None:
        for name in ("seeds", "ablation_seeds", "bn_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.processes is not None and self.processes < 1:
            raise ValueError(f"processes must be at least 1, got {self.processes}")
        if any(rate <= 1 for rate in self.rates):
            raise ValueError(f"rates multiply the paper's and must be above 1, got {self.rates}")
        if not 0 < self.time < float("inf"):
            raise ValueError(f"time must be above 0, got {self.time}")

    def recipe(self, name: str, seed: int, **changes: Any) -> InceptionRecipe:
        """A recipe at this experiment's scale.

        Args:
            name: Of the recipe.
            seed: Of weights, order and random changes.
            changes: Fields to replace.
        """
        recipe = get_recipe(name, "cifar10")
        assert isinstance(recipe, InceptionRecipe)
        longest = recipe.steps if name in ("inception", "bn-baseline") else self.bn_steps
        steps = max(1, round(longest * self.time))
        every = max(1, round(steps / EVALUATIONS))
        return replace(
            recipe,
            width=self.width,
            seed=seed,
            steps=steps,
            log_every=every,
            eval_every=every,
            checkpoint_every=every,
            **changes,
        )

    def networks(self) -> dict[str, InceptionRecipe]:
        """The five networks, every seed, and what the claims need beside them, by the name of the job."""
        jobs = {
            f"{name}-seed-{seed}": self.recipe(name, seed) for seed in range(self.seeds) for name in NETWORKS
        }
        short = self.recipe("bn-x5", 0).steps
        jobs[f"{PLAIN_SIGMOID}-seed-0"] = replace(
            self.recipe("inception", 0, activation="sigmoid"), steps=short
        )
        return jobs | {self.at_rate_name(rate, 0): self.at_rate(rate, 0) for rate in self.rates}

    def at_rate(self, factor: float, seed: int) -> InceptionRecipe:
        """Plain Inception at a multiple of the paper's rate."""
        recipe = self.recipe("inception", seed)
        return replace(recipe, learning_rate=factor * recipe.learning_rate)

    def at_rate_name(self, factor: float, seed: int) -> str:
        """The name of its job."""
        return f"inception-x{factor:g}-seed-{seed}" if factor != 1 else f"inception-seed-{seed}"

    def ablated(self) -> dict[str, InceptionRecipe]:
        """BN-x5 with one change of section 4.2.1 undone, by the name of the job."""
        if not self.ablations:
            return {}
        jobs = {}
        for seed in range(self.ablation_seeds):
            changed, baseline = self.recipe("bn-x5", seed), self.recipe("bn-baseline", seed)
            for what, fields in KEPT.items():
                kept = {field: getattr(baseline, field) for field in fields}
                jobs[self.ablation_name(what, seed)] = replace(changed, **kept)
        return jobs

    def ablation_name(self, what: str, seed: int) -> str:
        """The name of the job that keeps ``what`` as the baseline has it."""
        return f"bn-x5-kept-{what.replace(' ', '-').lower()}-seed-{seed}"
