"""Models by name: a run's folder, a recipe, or a function of the user's, with weights from a file."""

import importlib
import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm import __version__, files
from batchnorm.data import SOURCES, load, open_images
from batchnorm.reading import parse_json, parse_safetensors, read_torch, safetensors_metadata
from batchnorm.surgery import fold
from batchnorm.train import RECIPES, InceptionRecipe, Recipe, get_recipe
from batchnorm.train.build import build_model
from batchnorm.train.checkpoint import to_safetensors
from batchnorm.train.feed import Data
from batchnorm.train.predictions import data_of
from batchnorm.train.recipes import Scale
from batchnorm.train.run import MODEL_FILE, RECIPE_FILE, image_shape, load_model, read_run

ABOUT = "batchnorm"
"""Entry of a safetensors file's metadata with what we have to say of it, as JSON."""
MOST_LINES = 12
"""Of what does not fit, in a message."""
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32)
}


@dataclass(frozen=True)
class Saved:
    """A model and, where it is ours, what it was trained by and on."""

    model: nn.Module
    """In evaluation mode, on the CPU."""
    recipe: Recipe | None
    """None for a model of the user's own."""
    data: Data | None
    """What was named, else what the recipe or run has; None if there is nothing to go by."""
    averaged: bool = False
    """Whether the file says that its weights are an average, whose statistics nobody has measured since."""


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
        averaged = False
        if weights is not None:
            built, averaged = load_weights(built, weights)
        data = None if source is None else open_data(source, data_dir)
        return Saved(built.eval(), None, data, averaged)
    if (Path(model) / RECIPE_FILE).is_file():
        folder = Path(model)
        recipe, facts = read_run(folder)
        data = (
            data_of(facts, data_dir)
            if source is None
            else open_data(source, data_dir, size=facts["image_shape"][-1])
        )
        built = build_model(recipe, image_shape(recipe, data), len(data.classes))
        averaged = False
        if weights is None:
            load_model(folder, built)
        else:
            built, averaged = load_weights(built, weights)
        return Saved(built.eval(), recipe, data, averaged)
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
    built, averaged = load_weights(built, weights)
    return Saved(built.eval(), recipe, data, averaged)


def open_data(source: str, data_dir: Path | None, *, size: int | None = None) -> Data:
    """Data by name, of a size that a network takes if it is given, or images on disk by place."""
    if source in SOURCES or not ("/" in source or Path(source).is_dir()):
        return load(source, data_dir, size=size)
    return open_images(Path(source).expanduser().absolute())


def call(what: str) -> Any:
    """The result of ``module:function``, called without arguments.

    Raises:
        ImportError: There is no such module.
        ValueError: It has no such function.
    """
    module_name, _, function = what.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), function]):
        raise ValueError(f"{what!r} is not understood: module:function is needed, such as mymodels:resnet")
    with _working_directory():
        return _called(importlib.import_module(module_name), function)


def _called(module: Any, function: str) -> Any:
    found = getattr(module, function, None)
    if not callable(found):
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise ValueError(
            f"{module.__name__} has no function {function!r}; it has {', '.join(names) or 'none'}"
        )
    return found()


@contextmanager
def _working_directory() -> Iterator[None]:
    """The user's folder first while what they named is imported, and last ever after.

    First for good, a file of theirs (or of whoever filled the folder) named as a package would stand in
    for that package wherever we import it later.
    """
    here = str(Path.cwd())
    known = here in sys.path
    if not known:
        sys.path.insert(0, here)
    try:
        yield
    finally:
        if not known and here in sys.path:
            sys.path.remove(here)
            sys.path.append(here)


def load_weights(model: nn.Module, path: Path) -> tuple[nn.Module, bool]:
    """Load a state dict strictly; nothing is unpickled but tensors and plain containers.

    Args:
        model: Changed in place, unless the file is of a folded model.
        path: ``.safetensors``, or what `torch.save` wrote. Of `AveragedModel` and of wrappers for data
            parallelism the inner model's weights are taken.

    Returns:
        The model with the weights, in evaluation mode: folded where `batchnorm fold` wrote the file. And
        whether they are an average whose statistics are unsettled.

    Raises:
        ValueError: The file holds something else, or the state dict of another model.
        OSError: It cannot be read.
    """
    about: dict[str, Any] = {}
    if path.suffix == ".safetensors":
        content = path.read_bytes()
        try:
            tensors: Any = parse_safetensors(content)
            about = parse_json(safetensors_metadata(content).get(ABOUT, "{}"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
    else:
        tensors = read_torch(path)
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(tensors, Mapping) and isinstance(tensors.get(key), Mapping):
            tensors = tensors[key]
    if not isinstance(tensors, Mapping) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"{path} holds no state dict: a dictionary from names to tensors is needed")
    averaged = "n_averaged" in tensors
    tensors = {name: value for name, value in tensors.items() if name != "n_averaged"}
    if tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    if isinstance(about, dict) and "folded" in about:
        model = _folded(model, about["folded"], path)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        lines = str(error).splitlines()
        shown = "\n".join(lines[:MOST_LINES]) + (
            f"\n\t… and {len(lines) - MOST_LINES} more" if len(lines) > MOST_LINES else ""
        )
        raise ValueError(f"{path} does not fit {type(model).__name__}: {shown}") from error
    return model.eval(), averaged


def _folded(model: nn.Module, shapes: Any, path: Path) -> nn.Module:
    """A new model in the form that the weights of a folded one fit."""
    try:
        example = tuple(torch.zeros([int(n) for n in shape], dtype=DTYPES[dtype]) for dtype, shape in shapes)
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path} does not tell the inputs that its model was folded with") from error
    return fold(model.eval(), example)[0]


def save_weights(
    model: nn.Module, path: Path, *, force: bool, folded_with: tuple[Any, ...] | None = None
) -> int:
    """Write a model's state dict, read it again and compare, and only then give the file its name.

    Args:
        model: As `load_weights` shall find it.
        path: Ends in ``.safetensors`` or ``.pt``.
        force: Replace what is there.
        folded_with: Of a folded model, the example: from a file .safetensors it is folded again by.

    Returns:
        Bytes.

    Raises:
        ValueError: The name ends otherwise.
        FileExistsError: It is there, and `force` is false.
        OSError: It cannot be written.
    """
    check_ending(path)
    state = model.state_dict()
    about: dict[str, Any] = {"batchnorm": __version__}
    if folded_with is not None:
        names = {dtype: name for name, dtype in DTYPES.items()}
        about["folded"] = [(names[t.dtype], list(t.shape)) for t in folded_with]
    if path.suffix == ".safetensors":
        # One entry only: safetensors writes several in random order.
        content = to_safetensors(state, {ABOUT: json.dumps(about)})
    else:
        whole = io.BytesIO()
        torch.save({name: tensor.cpu() for name, tensor in state.items()}, whole)
        content = whole.getvalue()
    with files.beside(path, content, force=force) as partial:
        again = (
            parse_safetensors(partial.read_bytes()) if path.suffix == ".safetensors" else read_torch(partial)
        )
        if again.keys() != state.keys() or not all(torch.equal(again[n], t.cpu()) for n, t in state.items()):
            raise OSError(f"{path}: what was written is not what is read again; the disk may be failing")
    return len(content)


def check_ending(path: Path, also: Sequence[str] = ()) -> None:
    """Refuse a name that does not say in which form to write.

    Raises:
        ValueError: It does not.
    """
    known = (".safetensors", ".pt", *also)
    if path.suffix not in known:
        raise ValueError(f"--out {path} must end in {', '.join(known[:-1])} or {known[-1]}")
