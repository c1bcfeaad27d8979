"""`batchnorm export`: a saved model as a file for another program."""

import hashlib
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from batchnorm import files
from batchnorm.cli.batches import InputOptions, opened
from batchnorm.cli.fold import example_of, unsettled
from batchnorm.cli.saved import Saved
from batchnorm.data.augment import DEVIATION, MEAN
from batchnorm.deploy import export
from batchnorm.deploy.gate import check
from batchnorm.surgery import fold
from batchnorm.train import MLPRecipe
from batchnorm.train.run import MODEL_FILE, RECIPE_FILE

DESCRIPTION = """\
Write a saved model to one file: .onnx for onnxruntime and its kin, .pt2 (torch.export) for PyTorch without
your code.

Before: a gate stops what makes inference wrong (layers in training mode, statistics that are not finite,
were never updated, or belong to other weights) and names layer and cure. After: the file is run on the
example and on other batch sizes and compared; it gets its name only if it agrees. It also holds the names of
the classes, how inputs are prepared, versions and, of a run, the recipe.

Examples:
  batchnorm export runs/bn --fold --out bn.onnx
  batchnorm export mymodels:resnet --weights best.pt --input 3 224 224 --out resnet.pt2 \\
    --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225 --classes cat dog
  batchnorm export mymodels:resnet --weights swa.pt --data mymodels:batches --check-data --out swa.onnx
"""


@dataclass(frozen=True, kw_only=True)
class ExportArguments(InputOptions):
    """What `batchnorm export` is told."""

    model: Annotated[str, tyro.conf.Positional]
    """A run's folder, a recipe's name, or module:factory."""
    out: Path
    """The file: NAME.onnx or NAME.pt2."""
    fold: bool = False
    """Fold the normalizations first, as batchnorm fold does."""
    dynamic_batch: bool = True
    """Take batches of any size; else only of the example's."""
    input: tuple[int, ...] = ()
    """Shape of one input without the batch, such as 3 224 224; by default that of the data."""
    example: str | None = None
    """module:function that returns an example: a tensor, or a tuple of arguments."""
    classes: tuple[str, ...] = ()
    """Names of the outputs, to be kept in the file; by default those of the data."""
    check_data: bool = False
    """Also hold the running statistics against the data, which takes a few passes."""
    allow: tuple[Literal["never-updated", "averaged-weights"], ...] = ()
    """Let this through."""
    force: bool = False
    """Replace what stands at --out."""


def run(argv: list[str]) -> None:
    """Parse `argv`, export, and print what was compared."""
    arguments = tyro.cli(ExportArguments, prog="batchnorm export", description=DESCRIPTION, args=argv)
    files.check_free(arguments.out, force=arguments.force)
    saved, named = opened(arguments.model, arguments)
    batches = None if named is None else list(itertools.islice(named, arguments.num_batches))
    if arguments.check_data and batches is None:
        raise ValueError("--check-data needs --data")
    example = example_of(saved, batches, arguments.input, arguments.example)
    problems = [] if arguments.check_data or "averaged-weights" in arguments.allow else unsettled(saved)
    if problems:
        raise ValueError("not exported, nothing was written:\n" + "\n".join(f"  {p}" for p in problems))
    model, report = saved.model, None
    data = batches if arguments.check_data else None
    if arguments.fold:
        # What the gate looks at is not there any more afterwards.
        check(model, data, arguments.allow)
        model, report = fold(model, example)
        data = None
    done = export(
        model,
        example,
        arguments.out,
        dynamic_batch=arguments.dynamic_batch,
        batches=data,
        classes=_classes(saved, arguments),
        normalization=_normalization(saved, arguments),
        provenance=_provenance(saved, arguments),
        allow=arguments.allow,
        force=arguments.force,
    )
    sys.stdout.write((f"{report}\n" if report is not None else "") + f"{done}\n")


def _classes(saved: Saved, arguments: ExportArguments) -> tuple[str, ...] | None:
    if arguments.classes:
        return arguments.classes
    return None if saved.data is None or saved.recipe is None else saved.data.classes


def _normalization(saved: Saved, arguments: ExportArguments) -> dict[str, Any]:
    """From pixels to the input, so that another program does as training did."""
    recipe = saved.recipe
    if isinstance(recipe, MLPRecipe):
        pixels = {"layout": "N,H,W", "pixels": "uint8, 0 to 255, grey"}
        return {**pixels, "threshold": 128} if recipe.binarize else {**pixels, "divide_by": 255}
    known = {"layout": "N,C,H,W", "pixels": "uint8, 0 to 255", "divide_by": 255}
    if recipe is not None:
        return {**known, "channels": "red, green, blue", "mean": list(MEAN), "std": list(DEVIATION)}
    return {**known, "mean": list(arguments.mean), "std": list(arguments.std)}


def _provenance(saved: Saved, arguments: ExportArguments) -> dict[str, Any]:
    found: dict[str, Any] = {"folded": arguments.fold}
    if saved.recipe is not None:
        found["recipe"] = saved.recipe.to_json()
    folder = Path(arguments.model)
    weights = arguments.weights
    if weights is None and (folder / RECIPE_FILE).is_file():
        # The name alone: where it lies is nobody else's business.
        found["run"], weights = folder.absolute().name, folder / MODEL_FILE
    if weights is not None:
        with open(weights, "rb") as file:
            found["weights_sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
