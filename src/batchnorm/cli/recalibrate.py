"""`batchnorm recalibrate`: population statistics for a saved model."""

import itertools
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from batchnorm import files
from batchnorm.cli.batches import InputOptions, Part, opened, test_accuracy
from batchnorm.cli.saved import Saved, check_ending, save_weights
from batchnorm.statistics import recalibrate
from batchnorm.train.feed import feed_of

DESCRIPTION = """\
Replace the running statistics of a saved model's batch normalizations by those of data, and write its state
dict. For averaged weights (SWA, EMA, soups), for weights that were changed after training, for a new domain.
The weights themselves stay as they are.

Examples:
  batchnorm recalibrate runs/bn --out bn.safetensors
  batchnorm recalibrate mymodels:resnet --weights swa.pt --data mymodels:batches --out settled.pt
  batchnorm recalibrate mymodels:resnet --weights best.pt --data photos --image-size 224 \\
    --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225 --method pooled --out photos.safetensors

Prints what moved, layer by layer and, for a data set by name, the accuracy on its test images before and
after: new statistics often serve better, and often not. --keep-better goes back to the old ones then.
"""


@dataclass(frozen=True, kw_only=True)
class RecalibrateArguments(InputOptions):
    """What `batchnorm recalibrate` is told."""

    model: Annotated[str, tyro.conf.Positional]
    """A run's folder, a recipe's name, or module:factory."""
    out: Path
    """The new state dict: NAME.safetensors or NAME.pt."""
    part: Part | None = None
    """Which images: by default train."""
    num_batches: int = 100
    """How many to use; of a run, its recipe says that, unless --data is given."""
    method: Literal["exact", "pooled", "paper"] | None = None
    """exact runs the data once for each layer; pooled and paper run them once. By default what the run's
    recipe does, else exact."""
    keep_better: bool = False
    """Keep the old statistics where the test accuracy is worse on the new ones."""
    force: bool = False
    """Replace what stands at --out."""
    progress: bool = True
    """Draw a progress bar on standard error."""


def run(argv: list[str]) -> None:
    """Parse `argv`, recalibrate, print the report, and write the weights."""
    arguments = tyro.cli(
        RecalibrateArguments, prog="batchnorm recalibrate", description=DESCRIPTION, args=argv
    )
    check_ending(arguments.out)
    files.check_free(arguments.out, force=arguments.force)
    if arguments.num_batches < 1:
        raise ValueError(f"--num-batches must be at least 1, got {arguments.num_batches}")
    arguments = replace(arguments, part=arguments.part or "train")
    saved, named = opened(arguments.model, arguments)
    batches, method = _batches(saved, named, arguments)
    metric = test_accuracy(saved, arguments)
    if arguments.keep_better and metric is None:
        raise ValueError("--keep-better needs test images to judge by: --data with a data set's name")
    try:
        report = recalibrate(
            saved.model,
            batches,
            method=arguments.method or method,
            progress=arguments.progress and sys.stderr.isatty(),
            metric=metric,
            keep_better=arguments.keep_better,
        )
    except RuntimeError as error:  # the user's model on the user's data
        raise ValueError(str(error)) from error
    num_bytes = save_weights(saved.model, arguments.out, force=arguments.force)
    sys.stdout.write(f"{report}\n{arguments.out}: {num_bytes:,} bytes\n")


def _batches(
    saved: Saved, named: Iterable[Any] | None, arguments: RecalibrateArguments
) -> tuple[list[Any], str]:
    if saved.recipe is not None and saved.data is not None and arguments.data is None:
        feed = feed_of(saved.recipe, saved.data, torch.device("cpu"))
        return list(feed.statistics()), feed.statistics_method
    if named is None:
        raise ValueError(
            "--data is needed: a data set's name, an image folder, shards, or module:function that returns "
            "batches"
        )
    return list(itertools.islice(named, arguments.num_batches)), "exact"
