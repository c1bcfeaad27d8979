"""`batchnorm train`: its flags are the fields of the recipe."""

import dataclasses
import inspect
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import tyro
from rich.console import Console
from rich.table import Table

from batchnorm.cli.torchrun import joined, quiet_but_first, take_turns
from batchnorm.data import SOURCES, load, open_images
from batchnorm.kernels import keep_freed_memory
from batchnorm.train import RECIPES, InceptionRecipe, Recipe, describe, get_recipe, train
from batchnorm.train.feed import Data
from batchnorm.train.ranks import Ranks
from batchnorm.train.recipes import Scale

DESCRIPTION = """\
Train a network by a recipe. Where --out holds an unfinished run of the same recipe, it goes on.

Examples:
  batchnorm train bn-mlp --out runs/bn
  batchnorm train mlp --data mnist --learning-rate 0.5 --steps 20000 --out runs/plain
  batchnorm train bn-x5 --scale cifar10 --out runs/x5
  batchnorm train bn-x5 --describe     (the network's stages and parameters; trains nothing)
  batchnorm train bn-mlp --help        (every field of the recipe as a flag)
  torchrun --nproc-per-node 2 -m batchnorm train bn-mlp --out runs/two    (two processes, or GPUs, as one)

A recipe's --help lists all flags; they may be given before or after the recipe's name.
Under torchrun the processes share each batch and compute what one would; rank 0 alone writes to --out.
Ctrl-C saves a checkpoint first. Watch a run with: tensorboard --logdir runs
"""

CLASSES = {"imagenet": 1000, "cifar10": 10}
"""That --describe counts with when no data are read."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What `batchnorm train` is told beside the recipe."""

    out: Path | None = None
    """Folder of the run: new, empty, or holding the run to go on with. Needed to train."""
    data: str | None = None
    """Data source: digits, mnist, fashion-mnist or cifar10; a folder with train/CLASS/*.jpg and
    val/CLASS/*.jpg; or shards, …/train-{000000..000146}.tar. By default digits, which come with
    scikit-learn, or what --scale names."""
    workers: int | None = None
    """Processes that decode images on disk, of each rank (default: one for each core but one, shared with
    the other ranks of the machine)."""
    data_dir: Path | None = None
    """Folder with the data's files; else the one BATCHNORM_DATA names, else a cache to download to."""
    scale: Scale = "imagenet"
    """Of the Inception recipes: as in the paper, or at the scale of CIFAR-10, which changes only what must
    change and says what that is."""
    describe: bool = False
    """Print the network's stages with shapes and parameters, beside the paper's table, and exit."""
    progress: bool = True
    """Report on standard error: a bar on a terminal, else one line for each evaluation."""
    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""
    timeout: float = 300.0
    """Seconds that a process of torchrun waits for another before it gives up, so that nothing hangs. Longer
    than the slowest checkpoint, download or evaluation batch takes."""


def run(argv: list[str]) -> None:
    """Parse `argv`, train, and print the result."""
    with quiet_but_first():
        arguments: Any = tyro.cli(
            _arguments_type(_scale(argv)),
            prog="batchnorm train",
            description=DESCRIPTION,
            args=argv,
            config=(
                tyro.conf.OmitArgPrefixes,
                tyro.conf.OmitSubcommandPrefixes,
                tyro.conf.CascadeSubcommandArgs,
            ),
        )
    if arguments.describe:
        with quiet_but_first():
            _describe(arguments.recipe, CLASSES[arguments.scale])
        return
    with joined(arguments.timeout, arguments.recipe.device) as ranks:
        _train(argv, arguments, ranks)


def _train(argv: list[str], arguments: Any, ranks: Ranks) -> None:
    recipe: Recipe = arguments.recipe
    with ranks.together():
        data = _data(argv, arguments, ranks)
    result = train(
        recipe,
        data,
        arguments.out,
        progress=arguments.progress,
        tensorboard=arguments.tensorboard,
        num_workers=arguments.workers,
    )
    if not ranks.is_first:
        return
    if result.bad_images:
        listed = "".join(f"\n  {name}" for name in result.bad_images)
        sys.stderr.write(f"batchnorm: {len(result.bad_images)} bad images were left out:{listed}\n")
    scores = result.scores
    sys.stdout.write(
        f"{arguments.out}: top-1 {scores.top1:.2%}, top-5 {scores.top5:.2%}, loss {scores.loss:.4f} "
        f"on {scores.num_examples} test images; weights in {arguments.out / 'model.safetensors'}\n"
    )


def _data(argv: list[str], arguments: Any, ranks: Ranks) -> Data:
    recipe: Recipe = arguments.recipe
    if arguments.out is None:
        raise ValueError(
            "--out is needed: the folder where the run shall be, new or holding the run to go on with."
        )
    if arguments.scale != "imagenet" and not isinstance(recipe, InceptionRecipe):
        raise ValueError(f"--scale changes the Inception recipes; {recipe.model} has one scale only.")
    keep_freed_memory()
    source = arguments.data or _default_data(recipe, arguments.scale)
    told = arguments.progress and ranks.is_first
    with take_turns(ranks):
        data = _open(source, arguments.data_dir, progress=told)
    if told:
        _tell_scale(argv, recipe, arguments.scale)
    return data


def _open(source: str, data_dir: Path | None, *, progress: bool) -> Data:
    if source in SOURCES or not ("/" in source or Path(source).is_dir()):
        return load(source, data_dir, progress=progress)
    if data_dir is not None:
        raise ValueError(f"--data-dir is where data sets are looked for by name; --data {source} is a place.")
    # Absolute, so that the run can be evaluated from anywhere.
    return open_images(Path(source).expanduser().absolute())


def _scale(argv: list[str]) -> Scale:
    # Flags get their defaults from the recipe, and the recipe from the scale: that is read first.
    for flag, value in zip(argv, [*argv[1:], ""], strict=True):
        name, _, joined = flag.partition("=")
        if name == "--scale" and (joined or value) in get_args(Scale):
            return "cifar10" if (joined or value) == "cifar10" else "imagenet"
    return "imagenet"


def _arguments_type(scale: Scale) -> type:
    by_name: Any = tyro.extras.subcommand_type_from_defaults(
        {name: get_recipe(name, scale) for name in RECIPES},
        {name: (inspect.getdoc(_function(recipe)) or "").splitlines()[0] for name, recipe in RECIPES.items()},
        prefix_names=False,
    )
    recipe = Annotated[by_name, tyro.conf.arg(help="Where the flags get their defaults from.")]
    return dataclasses.make_dataclass(
        "TrainArguments", [("recipe", recipe)], bases=(TrainOptions,), frozen=True, kw_only=True
    )


def _function(recipe: Any) -> Any:
    # One of the ensemble is its function with the member's number given.
    return getattr(recipe, "func", recipe)


def _default_data(recipe: Recipe, scale: Scale) -> str:
    if not isinstance(recipe, InceptionRecipe):
        return "digits"
    if scale == "cifar10":
        return "cifar10"
    raise ValueError(
        "--data is needed: a folder with train/CLASS/*.jpg and val/CLASS/*.jpg, or shards such as "
        "imagenet/train-{000000..001281}.tar; or give --scale cifar10."
    )


def _tell_scale(argv: list[str], recipe: Recipe, scale: Scale) -> None:
    if scale == "imagenet" or not isinstance(recipe, InceptionRecipe):
        return
    # A folder may have a recipe's name, too.
    given = [name for name in RECIPES if name in argv]
    name = min(given, key=lambda name: len(recipe.differences(get_recipe(name, scale))))
    here, paper = get_recipe(name, scale).to_json(), get_recipe(name).to_json()
    changed = [f"{field} {paper[field]} → {here[field]}" for field in paper if here[field] != paper[field]]
    sys.stderr.write(f"--scale {scale} changes of {name}: {', '.join(changed)}\n")


def _describe(recipe: Recipe, num_classes: int) -> None:
    if not isinstance(recipe, InceptionRecipe):
        raise ValueError(f"--describe has a table for Inception recipes; {recipe.model} is {recipe}.")
    stages = describe(recipe, num_classes)
    table = Table(
        "stage", "output", "the paper's", "parameters", title=f"Inception for {num_classes} classes"
    )
    for stage in stages:
        paper = "" if stage.paper is None else _shape(stage.paper)
        table.add_row(stage.name, _shape(stage.shape), paper, f"{stage.num_parameters:,}")
    total = sum(stage.num_parameters for stage in stages)
    table.add_section()
    table.add_row("all", "", "13.6·10⁶ parameters", f"{total:,}")
    Console().print(table)


def _shape(shape: tuple[int, ...]) -> str:
    channels, *places = shape
    return "×".join(map(str, (*places, channels)))
