"""What the experiment is: its settings, checked."""

from dataclasses import dataclass
from pathlib import Path

from batchnorm.reproduce.parts import check_choices, check_counts

TASKS = ("rows", "pixels")


@dataclass(frozen=True, kw_only=True)
class Recurrent:
    """Section 5's later work: batch-normalized recurrent networks, on sequential digits.

    An LSTM reads an image row by row, or pixel by pixel, and then names the digit; with the products and
    the cell state batch-normalized (Cooijmans et al., 2017; statistics of each time step, γ initialized
    small, and for comparison at 1) and without. Test accuracy over steps with the seeds' spread, steps to
    the plain LSTM's best, and the gradient of the loss in the hidden state of every time step, before and
    after training. Writes result.json, pictures and report.html into --out; a second call does only what
    is missing. Two minutes on two idle cores.
    """

    data: str = "digits"
    """digits (comes with scikit-learn), mnist or fashion-mnist."""
    data_dir: Path | None = None
    """Folder that holds the data set; else $BATCHNORM_DATA, else it is downloaded."""
    out: Path = Path("runs/recurrent")
    """Folder for results; made if missing."""
    seeds: int = 3
    """Number of seeds; each has its own initial weights, order of examples and noise."""
    tasks: tuple[str, ...] = TASKS
    """How images are read: rows (a row is a time step), pixels (a pixel is)."""
    pixel_side: int = 7
    """For pixels, images are averaged down to at most this many rows and columns; a divisor of theirs."""
    hidden_size: int = 100
    """Units of the LSTM."""
    row_steps: int = 500
    """Training steps of networks that read rows."""
    pixel_steps: int = 250
    """Training steps of networks that read pixels."""
    evaluations: int = 20
    """How often in training the accuracy is taken."""
    test_examples: int = 1_000
    """Of the first so many test images; at the end of all."""
    batch_size: int = 64
    """Examples a step."""
    rate: float = 0.001
    """Learning rate of all networks: RMSProp with a momentum of 0.9."""
    plain_rates: tuple[float, ...] = (0.0001, 0.0003)
    """Further learning rates that the plain LSTM is given, of which its best counts beside."""
    gammas: tuple[float, ...] = (0.1, 1.0)
    """Initial γ; the first is the headline."""
    noise: float = 0.1
    """Deviation of the Gaussian initial hidden state in training, without which equal first pixels have no
    variance; all networks get it."""
    clip: float = 1.0
    """Largest norm of the gradient of all parameters; it is scaled down to that."""
    processes: int | None = None
    """Networks that train at once (default: one a core)."""

    def __post_init__(self) -> None:
        check_counts(
            self, "seeds", "pixel_side", "hidden_size", "row_steps", "pixel_steps", "evaluations",
            "test_examples", "processes",
        )  # fmt: skip
        check_choices("tasks", self.tasks, TASKS)
        check_choices("gammas", self.gammas)
        if self.plain_rates:
            check_choices("plain_rates", self.plain_rates)
        if self.rate in self.plain_rates:
            raise ValueError(f"plain_rates {self.plain_rates} are tried beside rate {self.rate}: omit it")
        if self.batch_size < 2:
            raise ValueError(f"batch_size must be at least 2, got {self.batch_size}")
        for name in ("rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not self.noise >= 0:
            raise ValueError(f"noise must be zero or more, got {self.noise}")
        for task in self.tasks:
            if self.steps(task) < self.evaluations:
                raise ValueError(
                    f"evaluations must be at most the steps, {self.steps(task)} for {task}, "
                    f"got {self.evaluations}"
                )

    def steps(self, task: str) -> int:
        """Training steps of a task."""
        return self.row_steps if task == "rows" else self.pixel_steps

    def networks(self) -> list[tuple[str, float]]:
        """Kind and learning rate of all networks: "plain", or "bn-γ"."""
        plain = [("plain", rate) for rate in (self.rate, *self.plain_rates)]
        return plain + [(f"bn-{gamma:g}", self.rate) for gamma in self.gammas]
