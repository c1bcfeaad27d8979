"""`batchnorm doctor`: what is wrong with the normalizations of a saved model."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from batchnorm.cli.batches import InputOptions, opened
from batchnorm.doctor import Diagnosis, diagnose

DESCRIPTION = """\
Run a model on data in both modes, layer by layer, and say what is wrong with its batch normalizations,
where, and how much each cure helps, which is tried. Nothing is changed.

Examples:
  batchnorm doctor runs/bn
  batchnorm doctor bn-x5 --scale cifar10 --weights model.safetensors --data cifar10
  batchnorm doctor mymodels:resnet --weights best.pt --data mymodels:batches
  batchnorm doctor mymodels:resnet --weights best.pt --data imagenet --image-size 224 \\
    --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225

A function that --data names returns an iterable of batches as the training loop gets them: their size and
order are judged, too. Data sets and images on disk are mixed first, so only their batch size is.
"""


@dataclass(frozen=True, kw_only=True)
class DoctorArguments(InputOptions):
    """What `batchnorm doctor` is told."""

    model: Annotated[str, tyro.conf.Positional]
    """A run's folder, a recipe's name, or module:factory."""
    out: Path = Path("runs/doctor")
    """Folder for diagnosis.json and report.html; made if missing, older ones are replaced."""
    progress: bool = True
    """Draw a progress bar on standard error."""


def run(argv: list[str]) -> None:
    """Parse `argv`, diagnose, print a table, and write JSON and a page."""
    arguments = tyro.cli(DoctorArguments, prog="batchnorm doctor", description=DESCRIPTION, args=argv)
    saved, batches = opened(arguments.model, arguments)
    if batches is None:
        raise ValueError(
            "--data is needed: a data set's name, an image folder, shards, or module:function that "
            "returns batches"
        )
    try:
        diagnosis = diagnose(
            saved.model, batches, num_batches=arguments.num_batches, progress=arguments.progress
        )
    except RuntimeError as error:  # the user's model on the user's data
        raise ValueError(str(error)) from error
    arguments.out.mkdir(parents=True, exist_ok=True)
    diagnosis.save(arguments.out / "diagnosis.json")
    page = diagnosis.write_page(arguments.out / "report.html", f"Doctor: {arguments.model}")
    _print(diagnosis)
    sys.stdout.write(f"Page: {page}\n")


def _print(diagnosis: Diagnosis) -> None:
    console = Console()
    if diagnosis.inference_loss is not None and diagnosis.batch_loss is not None:
        console.print(
            f"loss {diagnosis.inference_loss:.4g} at inference, {diagnosis.batch_loss:.4g} with the "
            "batches' own "
            f"statistics ({diagnosis.num_examples} examples, {len(diagnosis.layers)} normalizations)"
        )
    if diagnosis.healthy:
        console.print("nothing found")
    else:
        table = Table(show_lines=True)
        for column in ("", "finding", "where"):
            table.add_column(column, no_wrap=True)
        table.add_column("evidence, cure, and what the cure did when it was tried")
        for number, finding in enumerate(diagnosis.findings, 1):
            where = [name or "(model)" for name in finding.layers[:4]]
            if len(finding.layers) > 4:
                where.append(f"and {len(finding.layers) - 4} more")
            said = [finding.evidence, f"[bold]cure[/]: {escape(finding.cure)}"]
            if finding.effect is not None:
                said.append(f"[bold]tried[/]: {finding.effect}")
            kind = f"{finding.cause}\n({finding.level})"
            table.add_row(str(number), kind, "\n".join(where), "\n".join([escape(said[0]), *said[1:]]))
        console.print(table)
    for note in diagnosis.notes:
        console.print(f"note: {note}")
