"""What the experiment is: its settings, checked, and its six members."""

from dataclasses import dataclass, replace
from pathlib import Path

from batchnorm.train import InceptionRecipe, get_recipe
from batchnorm.train.inputs import Crops
from batchnorm.train.recipes import ENSEMBLE


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """Section 4.2.3, figure 4: what many crops and six networks add to one network and one crop.

    Trains the six members, each BN-x30 with some changes, at the scale of CIFAR-10; evaluates each with one
    crop and with many; and averages the members' class probabilities. Writes result.json, a picture and
    report.html into --out; a second call goes on where the first one stopped. About an hour on two
    cores; --time 0.05 gives a first look.
    """

    data: str = "cifar10"
    """Images of 32×32 pixels: cifar10."""
    data_dir: Path | None = None
    """Folder that holds the data set; else $BATCHNORM_DATA, else it is downloaded."""
    out: Path = Path("runs/ensemble")
    """Folder for results; made if missing."""
    crops: Crops = 10
    """Views of each image for the multi-crop figures; the paper's 144 take fourteen times as long as 10."""
    width: float = 0.25
    """Multiplies every number of channels."""
    time: float = 1.0
    """Multiplies all steps."""
    processes: int | None = None
    """Networks trained at once, each on one core (default: as many as there are cores)."""

    def __post_init__(self) -> None:
        if self.crops == 1:
            raise ValueError("crops must be 10 or 144: with 1 there is nothing to compare")
        if self.processes is not None and self.processes < 1:
            raise ValueError(f"processes must be at least 1, got {self.processes}")
        if not 0 < self.time < float("inf"):
            raise ValueError(f"time must be above 0, got {self.time}")

    def members(self) -> dict[str, InceptionRecipe]:
        """The recipes of the six, by the name of the job."""
        jobs = {}
        for number in range(1, len(ENSEMBLE) + 1):
            recipe = get_recipe(f"ensemble-{number}", "cifar10")
            assert isinstance(recipe, InceptionRecipe)
            steps = max(1, round(recipe.steps * self.time))
            every = max(1, round(steps / 10))
            jobs[f"ensemble-{number}"] = replace(
                recipe,
                width=self.width,
                steps=steps,
                log_every=every,
                eval_every=every,
                checkpoint_every=every,
            )
        return jobs
