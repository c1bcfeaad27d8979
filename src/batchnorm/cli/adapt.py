"""`batchnorm adapt`: a saved model in another domain."""

import itertools
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from batchnorm import files
from batchnorm.cli.batches import InputOptions, Part, opened, test_accuracy
from batchnorm.cli.saved import check_ending, save_weights
from batchnorm.statistics import Domains, adapt

DESCRIPTION = """\
Adapt a saved model's batch normalizations to the domain of unlabelled data, and write its state dict; or,
with --domain, keep what they hold there under a name, in one small file for all domains of the model.

Examples:
  batchnorm adapt runs/bn --data mnist --out on-mnist.safetensors
  batchnorm adapt mymodels:resnet --weights best.pt --data night --method blended --out night.safetensors
  batchnorm adapt mymodels:resnet --weights best.pt --data night --domain night --out domains.safetensors

Prints what moved, layer by layer, how predictions changed and, for a data set by name, the accuracy on its
test images before and after. Too few examples, and predictions that are too one-sided, are refused: see
--trust.
"""

SOURCE = "source"
"""Name of the domain that a model comes with, in a new file of domains."""


@dataclass(frozen=True, kw_only=True)
class AdaptArguments(InputOptions):
    """What `batchnorm adapt` is told."""

    model: Annotated[str, tyro.conf.Positional]
    """A run's folder, a recipe's name, or module:factory."""
    out: Path
    """The new state dict, NAME.safetensors or NAME.pt; with --domain, the file of domains."""
    part: Part | None = None
    """Which images: by default train."""
    num_batches: int = 100
    """How many to use."""
    method: Literal["statistics", "blended", "entropy"] = "statistics"
    """statistics replaces the stored ones; blended weighs few examples against them; entropy learns γ and β,
    too."""
    prior: float | None = None
    """Examples that stored statistics count as, of blended (default: 16)."""
    rate: float | None = None
    """Learning rate of entropy (default: 0.001)."""
    epochs: int | None = None
    """How often entropy goes through the data (default: once)."""
    trust: bool = False
    """Adapt to few or one-sided examples, too."""
    domain: str | None = None
    """Name of the domain: --out is then a file of domains, made, with "source" in it, or added to."""
    force: bool = False
    """Replace what stands at --out; with --domain, the domain of that name in it."""


def run(argv: list[str]) -> None:
    """Parse `argv`, adapt, print the report, and write the weights or the domain."""
    arguments = tyro.cli(AdaptArguments, prog="batchnorm adapt", description=DESCRIPTION, args=argv)
    if arguments.domain is None:
        check_ending(arguments.out)
    elif arguments.out.suffix != ".safetensors":
        raise ValueError(
            f"--out {arguments.out} must end in .safetensors: with --domain it is a file of domains"
        )
    files.check_free(arguments.out, force=arguments.force or arguments.domain is not None)
    if arguments.num_batches < 1:
        raise ValueError(f"--num-batches must be at least 1, got {arguments.num_batches}")
    if arguments.data is None:
        raise ValueError(
            "--data is needed, of the other domain: a data set's name, an image folder, shards, or "
            "module:function that returns batches"
        )
    arguments = replace(arguments, part=arguments.part or "train")
    saved, batches = opened(arguments.model, arguments)
    assert batches is not None
    domains = None if arguments.domain is None else _domains(saved.model, arguments)
    accuracy = test_accuracy(saved, arguments)
    before = accuracy and accuracy(saved.model)
    options: dict[str, Any] = {
        name: getattr(arguments, name) for name in ("prior", "rate", "epochs", "trust")
    }
    try:
        used = list(itertools.islice(batches, arguments.num_batches))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "learning collapsed")  # an error below
            report = adapt(saved.model, used, method=arguments.method, **options)
    except RuntimeError as error:  # the user's model on the user's data
        raise ValueError(str(error)) from error
    sys.stdout.write(f"{report}\n")
    if before is not None and accuracy is not None:
        sys.stdout.write(f"accuracy on test images: {before:.4f} before, {accuracy(saved.model):.4f} after\n")
    if report.undone:
        raise ValueError(f"nothing was written: {report.undone}")
    if domains is None:
        num_bytes = save_weights(saved.model, arguments.out, force=arguments.force)
        sys.stdout.write(f"{arguments.out}: {num_bytes:,} bytes\n")
        return
    assert arguments.domain is not None
    domains.store(arguments.domain, replace=arguments.force)
    domains.save(arguments.out)
    sys.stdout.write(f"{arguments.out}: {', '.join(domains.names)}; {arguments.out.stat().st_size:,} bytes\n")


def _domains(model: Any, arguments: AdaptArguments) -> Domains:
    if not arguments.out.exists():
        domains = Domains(model)
        domains.store(SOURCE)
    else:
        domains = Domains.load(model, arguments.out)
    if arguments.domain in domains.names and not arguments.force:
        raise ValueError(
            f"{arguments.out} has a domain {arguments.domain!r} already; --force replaces it. It has "
            f"{', '.join(map(repr, domains.names))}"
        )
    return domains
