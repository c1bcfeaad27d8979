"""`batchnorm doctor`: what is wrong with the normalizations of a saved model."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from batchnorm.cli.saved import Saved, call, open_saved
from batchnorm.data import ImageData, ImageFiles, num_cores, to_input
from batchnorm.doctor import Diagnosis, diagnose
from batchnorm.train import InceptionRecipe, Recipe
from batchnorm.train.feed import Data
from batchnorm.train.inputs import evaluation_input
from batchnorm.train.recipes import Scale

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
class DoctorArguments:
    """What `batchnorm doctor` is told."""

    model: Annotated[str, tyro.conf.Positional]
    """A run's folder, a recipe's name, or module:factory."""
    weights: Path | None = None
    """A state dict, .safetensors or .pt; by default the run's, or what the factory returns."""
    data: str | None = None
    """Data set by name, image folder, shards, or module:function; by default what the run was trained on."""
    data_dir: Path | None = None
    """Folder with the data's files, as for batchnorm train."""
    part: Literal["train", "test"] | None = None
    """Which images: by default test of a data set by name, train of images on disk (those of val lie in the
    order of their classes)."""
    batch_size: int | None = None
    """Examples in a batch (default: the recipe's, else 32)."""
    num_batches: int = 32
    """How many to look at."""
    scale: Scale = "imagenet"
    """Of an Inception recipe, as for batchnorm train."""
    image_size: int = 224
    """Of images on disk, for a model of your own."""
    mean: tuple[float, ...] = (0.0,)
    """Subtracted from images in 0 to 1, one for each colour or one for all, for a model of your own."""
    std: tuple[float, ...] = (1.0,)
    """What they are divided by then."""
    out: Path = Path("runs/doctor")
    """Folder for diagnosis.json and report.html; made if missing, older ones are replaced."""
    progress: bool = True
    """Draw a progress bar on standard error."""


def run(argv: list[str]) -> None:
    """Parse `argv`, diagnose, print a table, and write JSON and a page."""
    arguments = tyro.cli(DoctorArguments, prog="batchnorm doctor", description=DESCRIPTION, args=argv)
    named = arguments.data if arguments.data is not None and ":" in arguments.data else None
    source = None if named else arguments.data
    saved = open_saved(arguments.model, arguments.weights, source, arguments.data_dir, arguments.scale)
    if named:
        batches: Any = call(named)
    elif saved.data is None:
        raise ValueError(
            "--data is needed: a data set's name, an image folder, shards, or module:function that "
            "returns batches"
        )
    else:
        batches = _batches(saved, saved.data, arguments)
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


def _batches(saved: Saved, data: Data, arguments: DoctorArguments) -> Iterator[tuple[Tensor, Tensor]]:
    recipe = saved.recipe
    size = arguments.batch_size
    if size is None:
        size = recipe.batch_size if recipe else 32
    if size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {size}")
    if isinstance(data, ImageData):
        return _of_memory(data, recipe, arguments, size)
    if arguments.part == "test":
        raise ValueError(
            "--part test: the images of val are read in the order of their classes, and batches of one "
            "class would "
            "be diagnosed as such; use train, or --data module:function"
        )
    return _of_files(data, recipe, arguments, size)


def _of_files(
    data: ImageFiles, recipe: Recipe | None, arguments: DoctorArguments, size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    # Decoding needs Pillow, which data in memory do without.
    from batchnorm.data.stream import training_stream

    with training_stream(
        data.train,
        start_step=0,
        num_steps=min(arguments.num_batches, max(1, len(data.train) // size)),
        batch_size=size,
        size=recipe.image_size if isinstance(recipe, InceptionRecipe) else arguments.image_size,
        seed=0,
        shuffle="all" if recipe is None else recipe.shuffle,
        mirror=False,
        num_workers=max(1, num_cores() - 1),
        pin_memory=False,
    ) as stream:
        for batch in stream:
            if recipe is not None:
                yield evaluation_input(recipe, batch.images), batch.labels
            else:
                yield _normalized(to_input(batch.images), arguments), batch.labels


def _of_memory(
    data: ImageData, recipe: Recipe | None, arguments: DoctorArguments, size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    of_train = arguments.part == "train"
    images = data.train_images if of_train else data.test_images
    labels = data.train_labels if of_train else data.test_labels
    order = np.random.default_rng(0).permutation(len(images))
    for start in range(0, min(len(order), size * arguments.num_batches), size):
        chosen = order[start : start + size]
        if len(chosen) < min(size, len(order)):
            return  # what is left over at the end of a data set is no batch to judge
        x = torch.from_numpy(images[chosen])
        if recipe is not None:
            yield evaluation_input(recipe, x), torch.from_numpy(labels[chosen])
        else:
            levels = to_input(x)
            levels = levels if levels.dim() == 4 else levels.unsqueeze(1)
            yield _normalized(levels, arguments), torch.from_numpy(labels[chosen])


def _normalized(levels: Tensor, arguments: DoctorArguments) -> Tensor:
    def column(values: tuple[float, ...], flag: str) -> Tensor:
        if len(values) not in (1, levels.shape[1]):
            raise ValueError(
                f"{flag} needs 1 or {levels.shape[1]} numbers for these images, got {len(values)}"
            )
        return torch.tensor(values).view(-1, 1, 1)

    return (levels - column(arguments.mean, "--mean")) / column(arguments.std, "--std")


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
