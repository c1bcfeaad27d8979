"""`batchnorm choose`: which kind of normalization to take, by short trials."""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from batchnorm.choosing import CANDIDATES, USUAL, Choice, choose
from batchnorm.choosing.examples import Order
from batchnorm.cli.batches import InputOptions, batches_of
from batchnorm.cli.saved import Saved, call, load_weights, open_data, open_saved
from batchnorm.data import ImageData, ImageFiles
from batchnorm.train import RECIPES, InceptionRecipe, get_recipe
from batchnorm.train.build import build_model
from batchnorm.train.feed import Data
from batchnorm.train.run import RECIPE_FILE, image_shape

DESCRIPTION = """\
Try several kinds of normalization in a model on data, at a batch size and within a time budget, and say
which is best, with numbers and their spread, or that the trials cannot tell. Every candidate starts from
the same weights, sees the same batches, takes turns with the others, and is scored on the same images,
which are held out from the training set. Nothing is changed.

Examples:
  batchnorm choose bn-mlp --data mnist --batch-size 4 --budget 5m
  batchnorm choose bn-x5 --scale cifar10 --data cifar10 --batch-size 8 --budget 1h --rates 0.003 0.01
  batchnorm choose runs/bn --batch-size 2 --budget 10m
  batchnorm choose mymodels:resnet --data mymodels:dataset --batch-size 16 --budget 20m

A recipe, or a function without --weights, makes a new model for every repetition; a run's folder and
--weights give the one from which all trials start, and only then "frozen" makes sense. A function that
--data names returns what bn.choose takes for data: (inputs, labels), a Dataset, a DataLoader, or batches.

candidates: """ + ", ".join(CANDIDATES)


@dataclass(frozen=True, kw_only=True)
class ChooseArguments(InputOptions):
    """What `batchnorm choose` is told."""

    model: Annotated[str, tyro.conf.Positional]
    """A recipe's name, module:factory, or a run's folder."""
    # field(): without it the other commands' default would be inherited.
    batch_size: int = field()
    """Examples in a step."""
    num_batches: tyro.conf.Suppress[int] = 32
    part: tyro.conf.Suppress[None] = None
    budget: str | None = None
    """Time for everything, such as 90s, 5m or 1h (default: 5m, unless --steps are given)."""
    steps: int | None = None
    """Of each trial, in place of a budget; results are then the same in every run."""
    repetitions: int = 5
    """Trials of each candidate; two at least show a spread."""
    candidates: tuple[str, ...] = USUAL
    """What to try."""
    rates: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1)
    """Learning rates of SGD with momentum 0.9, of which each candidate takes its best; one alone saves the
    search."""
    order: Order = "examples"
    """Which batches there are: examples mixed; batches of examples that follow one another; all as given."""
    examples: int | None = None
    """Use only so many images (default: all of a data set by name, 4,000 of images on disk)."""
    ghost_size: int | None = None
    """Of ghost (default: 32, or half the batch where that is less)."""
    groups: int = 32
    """Of group, at most."""
    confidence: float = 0.95
    """Of the verdict."""
    seed: int = 0
    """Of everything that is drawn."""
    out: Path = Path("runs/choose")
    """Folder for choice.json and report.html; made if missing, older ones are replaced."""
    progress: bool = True
    """Draw a progress bar on standard error."""


def run(argv: list[str]) -> None:
    """Parse `argv`, run the trials, print the table, and write JSON and a page."""
    arguments = tyro.cli(ChooseArguments, prog="batchnorm choose", description=DESCRIPTION, args=argv)
    budget = "5m" if arguments.budget is None and arguments.steps is None else arguments.budget
    model, data = _opened(arguments)
    try:
        choice = choose(
            model,
            data,
            batch_size=arguments.batch_size,
            budget_s=None if budget is None else seconds(budget),
            steps=arguments.steps,
            repetitions=arguments.repetitions,
            candidates=arguments.candidates,
            rates=arguments.rates,
            order=arguments.order,
            examples=arguments.examples,
            ghost_size=arguments.ghost_size,
            groups=arguments.groups,
            confidence=arguments.confidence,
            seed=arguments.seed,
            progress=arguments.progress,
        )
    except RuntimeError as error:  # the user's model on the user's data
        raise ValueError(str(error)) from error
    arguments.out.mkdir(parents=True, exist_ok=True)
    choice.save(arguments.out / "choice.json")
    page = choice.write_page(arguments.out / "report.html", f"Choice: {arguments.model}")
    _print(choice)
    sys.stdout.write(f"Page: {page}\n")


def seconds(text: str) -> float:
    """A time such as 90, 90s, 1.5m or 1h, in seconds.

    Raises:
        ValueError: It is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([smh]?)", text.strip())
    if match is None:
        raise ValueError(f"--budget {text!r} is not understood: give a time such as 90s, 5m or 1h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def _opened(arguments: ChooseArguments) -> tuple[nn.Module | Callable[[], nn.Module], Any]:
    """The model, or what makes it, and the data."""
    named = arguments.data if arguments.data is not None and ":" in arguments.data else None
    source = None if named else arguments.data
    is_run = (Path(arguments.model) / RECIPE_FILE).is_file()
    if ":" in arguments.model:
        if named is None and source is None:
            raise ValueError(
                "--data is needed: a data set's name, an image folder, shards, or module:function"
            )
        data = call(named) if named else _inputs(open_data(source or "", arguments.data_dir), None, arguments)
        if arguments.weights is None:
            return lambda: call(arguments.model), data
        return load_weights(call(arguments.model), arguments.weights)[0].train(), data
    if is_run or arguments.weights is not None or arguments.model not in RECIPES:
        saved = open_saved(arguments.model, arguments.weights, source, arguments.data_dir, arguments.scale)
        assert saved.data is not None  # a run and a recipe have data of their own
        return saved.model.train(), call(named) if named else _inputs(saved.data, saved.recipe, arguments)
    recipe = get_recipe(arguments.model, arguments.scale)
    small = not isinstance(recipe, InceptionRecipe)
    if source is None:
        if not small and arguments.scale != "cifar10":
            raise ValueError(
                f"--data is needed for {arguments.model}: an image folder or shards; or give --scale cifar10"
            )
        source = "digits" if small else "cifar10"
    known = open_data(source, arguments.data_dir)

    def made() -> nn.Module:
        # Recipes draw their weights from their own seed, which is to be another in every repetition.
        own = replace(recipe, seed=int(torch.randint(2**31, ())))
        return build_model(own, image_shape(own, known), len(known.classes))

    return made, call(named) if named else _inputs(known, recipe, arguments)


def _inputs(data: Data, recipe: Any, arguments: ChooseArguments) -> Any:
    """Training images as the model wants them, with their labels."""
    examples = arguments.examples
    if isinstance(data, ImageFiles):
        examples = 4_000 if examples is None else examples
    elif examples is None:
        examples = len(data.train_labels)
    assert isinstance(data, ImageData | ImageFiles)
    size = min(examples, 100)
    whole = replace(arguments, part="train", batch_size=size, num_batches=-(-examples // size))
    return batches_of(Saved(nn.Identity(), recipe, data), data, whole, whole=True)


def _print(choice: Choice) -> None:
    console = Console()
    table = Table(caption=choice.caption)
    for column in choice.columns[:-1]:
        table.add_column(column)
    for row in choice.rows():
        table.add_row(*row[:-1])
    console.print(table)
    console.print(f"[bold]{escape(choice.sentence)}[/]")
    for one in choice.tried:
        console.print(escape(f"{one.name}: {one.about}"))
    for name, reason in choice.not_tried:
        console.print(escape(f"not tried: {name}: {reason}"))
    for note in choice.notes:
        console.print(escape(f"note: {note}"))
