"""The batches that a command runs a saved model on: from a data set, images on disk, or a function."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from batchnorm.cli.saved import Saved, call, open_saved
from batchnorm.data import ImageData, ImageFiles, num_cores, to_input
from batchnorm.train import InceptionRecipe, Recipe
from batchnorm.train.feed import Data
from batchnorm.train.inputs import evaluation_input
from batchnorm.train.recipes import Scale

Part = Literal["train", "test"]


@dataclass(frozen=True, kw_only=True)
class InputOptions:
    """What is told of the data, the same in every command that runs a saved model."""

    weights: Path | None = None
    """A state dict, .safetensors or .pt; by default the run's, or what the factory returns."""
    data: str | None = None
    """Data set by name, image folder, shards, or module:function; by default what the run was trained on."""
    data_dir: Path | None = None
    """Folder with the data's files, as for batchnorm train."""
    part: Part | None = None
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


def opened(model: str, options: InputOptions) -> tuple[Saved, Iterable[Any] | None]:
    """The saved model, and the batches where data are named or known; errors as `open_saved`."""
    named = options.data if options.data is not None and ":" in options.data else None
    source = None if named else options.data
    saved = open_saved(model, options.weights, source, options.data_dir, options.scale)
    if named:
        return saved, call(named)
    return saved, None if saved.data is None else batches_of(saved, saved.data, options)


def batches_of(
    saved: Saved, data: Data, options: InputOptions, *, whole: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs as the model wants them, with their labels.

    Args:
        saved: The model.
        data: Where they come from.
        options: Which, and how many.
        whole: Give what is left over at the end of a data set, too.

    Raises:
        ValueError: The options do not fit the data.
    """
    recipe = saved.recipe
    size = options.batch_size
    if size is None:
        size = recipe.batch_size if recipe else 32
    if size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {size}")
    if isinstance(data, ImageData):
        return _of_memory(data, recipe, options, size, whole=whole)
    if options.part == "test":
        raise ValueError(
            "--part test: the images of val are read in the order of their classes, and batches of one "
            "class would be taken as such; use train, or --data module:function"
        )
    return _of_files(data, recipe, options, size)


def test_accuracy(saved: Saved, options: InputOptions) -> Callable[[nn.Module], float] | None:
    """What a model gets right of all test images of a data set by name; ``None`` of other data."""
    data = saved.data
    if not isinstance(data, ImageData):
        return None
    test = replace(options, part="test", batch_size=250, num_batches=len(data.test_labels))

    @torch.no_grad()
    def accuracy(model: nn.Module) -> float:
        right = total = 0
        for x, labels in batches_of(saved, data, test, whole=True):
            right += int((model(x).argmax(1) == labels).sum())
            total += len(labels)
        return right / total

    return accuracy


def _of_files(
    data: ImageFiles, recipe: Recipe | None, options: InputOptions, size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    # Decoding needs Pillow, which data in memory do without.
    from batchnorm.data.stream import training_stream

    with training_stream(
        data.train,
        start_step=0,
        num_steps=min(options.num_batches, max(1, len(data.train) // size)),
        batch_size=size,
        size=recipe.image_size if isinstance(recipe, InceptionRecipe) else options.image_size,
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
                yield _normalized(to_input(batch.images), options), batch.labels


def _of_memory(
    data: ImageData, recipe: Recipe | None, options: InputOptions, size: int, *, whole: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    of_train = options.part == "train"
    images = data.train_images if of_train else data.test_images
    labels = data.train_labels if of_train else data.test_labels
    order = np.random.default_rng(0).permutation(len(images))
    for start in range(0, min(len(order), size * options.num_batches), size):
        chosen = order[start : start + size]
        if len(chosen) < min(size, len(order)) and not whole:
            return  # what is left over at the end of a data set is no batch to judge
        x = torch.from_numpy(images[chosen])
        if recipe is not None:
            yield evaluation_input(recipe, x), torch.from_numpy(labels[chosen])
        else:
            levels = to_input(x)
            levels = levels if levels.dim() == 4 else levels.unsqueeze(1)
            yield _normalized(levels, options), torch.from_numpy(labels[chosen])


def _normalized(levels: Tensor, options: InputOptions) -> Tensor:
    def column(values: tuple[float, ...], flag: str) -> Tensor:
        if len(values) not in (1, levels.shape[1]):
            raise ValueError(
                f"{flag} needs 1 or {levels.shape[1]} numbers for these images, got {len(values)}"
            )
        return torch.tensor(values).view(-1, 1, 1)

    return (levels - column(options.mean, "--mean")) / column(options.std, "--std")
