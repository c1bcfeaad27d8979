"""`batchnorm train`: its flags are the fields of the recipe."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from batchnorm.data import load
from batchnorm.kernels import keep_freed_memory
from batchnorm.train import RECIPES, Recipe, train

DESCRIPTION = """\
Train a network by a recipe. Where --out holds an unfinished run of the same recipe, it goes on.

Examples:
  batchnorm train bn-mlp --out runs/bn
  batchnorm train mlp --data mnist --learning-rate 0.5 --steps 20000 --out runs/plain
  batchnorm train bn-mlp --help        (every field of the recipe as a flag)

A recipe's --help lists all flags; they may be given before or after the recipe's name.
Ctrl-C saves a checkpoint first. Watch a run with: tensorboard --logdir runs
"""

if TYPE_CHECKING:
    ByName = Recipe
else:
    ByName = tyro.extras.subcommand_type_from_defaults(
        {name: recipe() for name, recipe in RECIPES.items()},
        {name: recipe.__doc__.splitlines()[0] for name, recipe in RECIPES.items()},
        prefix_names=False,
    )


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """What `batchnorm train` is told beside the recipe."""

    recipe: ByName
    """Where the flags get their defaults from."""
    out: Path
    """Folder of the run: new, empty, or holding the run to go on with."""
    data: str = "digits"
    """Data source: digits (comes with scikit-learn), mnist or fashion-mnist."""
    data_dir: Path | None = None
    """Folder with the data's files; else the one BATCHNORM_DATA names, else a cache to download to."""
    progress: bool = True
    """Report on standard error: a bar on a terminal, else one line for each evaluation."""
    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""


def run(argv: list[str]) -> None:
    """Parse `argv`, train, and print the result."""
    arguments = tyro.cli(
        TrainArguments,
        prog="batchnorm train",
        description=DESCRIPTION,
        args=argv,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes, tyro.conf.CascadeSubcommandArgs),
    )
    keep_freed_memory()
    data = load(arguments.data, arguments.data_dir, progress=arguments.progress)
    result = train(
        arguments.recipe, data, arguments.out, progress=arguments.progress, tensorboard=arguments.tensorboard
    )
    scores = result.scores
    sys.stdout.write(
        f"{arguments.out}: top-1 {scores.top1:.2%}, top-5 {scores.top5:.2%}, loss {scores.loss:.4f} "
        f"on {scores.num_examples} test images; weights in {arguments.out / 'model.safetensors'}\n"
    )
