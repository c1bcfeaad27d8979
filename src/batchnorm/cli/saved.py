"""Models by name: a run's folder, a recipe, or a function of the user's, with weights from a file."""

import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from batchnorm.data import SOURCES, load, open_images
from batchnorm.train import RECIPES, InceptionRecipe, Recipe, get_recipe
from batchnorm.train.build import build_model
from batchnorm.train.feed import Data
from batchnorm.train.predictions import data_of
from batchnorm.train.recipes import Scale
from batchnorm.train.run import MODEL_FILE, RECIPE_FILE, image_shape, load_model, read_run


@dataclass(frozen=True)
class Saved:
    """A model and, where it is ours, what it was trained by and on."""

    model: nn.Module
    """In evaluation mode, on the CPU."""
    recipe: Recipe | None
    """None for a model of the user's own."""
    data: Data | None
    """What was named, else what the recipe or run has; None if there is nothing to go by."""


def open_saved(
    model: str,
    weights: Path | None,
    source: str | None,
    data_dir: Path | None,
    scale: Scale = "imagenet",
) -> Saved:
    """Build a model and load its weights.

    Args:
        model: A folder that `batchnorm train` wrote, a recipe's name, or ``module:factory``, where the
            module is looked for in the working directory, too, and the factory takes no arguments.
        weights: A ``.safetensors`` or ``.pt`` file with a state dict; None is the run's model, or what the
            factory returns.
        source: Data by name or place, or None.
        data_dir: Where named data are looked for.
        scale: Of an Inception recipe.

    Raises:
        ValueError: The name means nothing, a recipe comes without weights, or weights do not fit.
        ImportError: There is no such module.
        OSError: A file cannot be read.
    """
    if ":" in model:
        built = call(model)
        if not isinstance(built, nn.Module):
            raise ValueError(f"{model} returned {type(built).__name__}; a torch.nn.Module is needed")
        if weights is not None:
            load_weights(built, weights)
        return Saved(built.eval(), None, None if source is None else open_data(source, data_dir))
    if (Path(model) / RECIPE_FILE).is_file():
        folder = Path(model)
        recipe, facts = read_run(folder)
        data = data_of(facts, data_dir) if source is None else open_data(source, data_dir)
        built = build_model(recipe, image_shape(recipe, data), len(data.classes))
        if weights is None:
            load_model(folder, built)
        else:
            load_weights(built, weights)
        return Saved(built.eval(), recipe, data)
    if model not in RECIPES:
        raise ValueError(
            f"{model!r} is neither a folder with a run, nor module:factory, nor a recipe: "
            f"{', '.join(RECIPES)}"
        )
    if weights is None:
        raise ValueError(
            f"--weights is needed for {model}: the {MODEL_FILE} of a run; or give the run's folder alone"
        )
    recipe = get_recipe(model, scale)
    if source is None:
        small = isinstance(recipe, InceptionRecipe) and scale == "cifar10"
        source = "cifar10" if small else "digits" if not isinstance(recipe, InceptionRecipe) else None
    if source is None:
        raise ValueError(f"--data is needed for {model}: an image folder or shards; or give --scale cifar10")
    data = open_data(source, data_dir)
    built = build_model(recipe, image_shape(recipe, data), len(data.classes))
    load_weights(built, weights)
    return Saved(built.eval(), recipe, data)


def open_data(source: str, data_dir: Path | None) -> Data:
    """Data by name, or images on disk by place."""
    if source in SOURCES or not ("/" in source or Path(source).is_dir()):
        return load(source, data_dir)
    return open_images(Path(source).expanduser().absolute())


def call(what: str) -> Any:
    """The result of ``module:function``, called without arguments.

    Raises:
        ImportError: There is no such module.
        ValueError: It has no such function.
    """
    module_name, _, function = what.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    module = importlib.import_module(module_name)
    found = getattr(module, function, None)
    if not callable(found):
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise ValueError(f"{module_name} has no function {function!r}; it has {', '.join(names) or 'none'}")
    return found()


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict into a model, strictly; nothing is unpickled but tensors and plain containers.

    Raises:
        ValueError: The file holds something else, or the state dict of another model.
        OSError: It cannot be read.
    """
    if path.suffix == ".safetensors":
        try:
            tensors: Any = safetensors.torch.load(path.read_bytes())
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
    else:
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # whatever a file that is no checkpoint makes of the unpickler
            raise ValueError(
                f"{path} cannot be loaded safely (weights_only=True): {error}. Save model.state_dict() alone"
            ) from error
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(tensors, Mapping) and isinstance(tensors.get(key), Mapping):
            tensors = tensors[key]
    if not isinstance(tensors, Mapping) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"{path} holds no state dict: a dictionary from names to tensors is needed")
    if tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit {type(model).__name__}: {error}") from error
