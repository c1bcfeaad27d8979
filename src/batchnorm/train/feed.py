"""What training and evaluation are fed with: data in memory, made into a network's input as a recipe says."""

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from batchnorm.data import (
    ImageData,
    crop_batch,
    distort,
    epoch_order,
    evaluation_crops,
    shift_and_mirror,
    standardize,
    step_indices,
    to_input,
)
from batchnorm.train.recipe import InceptionRecipe, MLPRecipe, Recipe

Crops = Literal[1, 10, 144]
"""Views of an image whose predictions are averaged."""

BATCH = 1000
"""Small grey images evaluated at once; with fixed statistics this has no influence on the result."""
BATCH_COLOUR = 250
"""Likewise of colour images, through a network with many activations."""


class MemoryFeed:
    """Batches of a data set that fits into the device's memory: these need no loader, and no loader's state.

    Args:
        recipe: Order, batch size, random changes.
        data: Images and labels.
        device: Where they shall be.
    """

    def __init__(self, recipe: Recipe, data: ImageData, device: torch.device) -> None:
        self.recipe = recipe
        self._images = torch.from_numpy(data.train_images).to(device)
        self._labels = torch.from_numpy(data.train_labels).to(device)
        self._test_images = torch.from_numpy(data.test_images).to(device)
        self.test_labels = data.test_labels
        # Exact moments take a pass for each layer; pooled ones of large batches take one for all of seventy.
        self.statistics_method = "exact" if isinstance(recipe, MLPRecipe) else "pooled"
        num = len(data.train_images)
        self._shards = np.append(np.arange(0, num, recipe.shard_size), num)
        self._batch(0)  # A batch that never fits fails here.

    def _batch(self, step: int) -> Tensor:
        recipe = self.recipe
        num = len(self._images)
        return step_indices(step, recipe.batch_size, num, recipe.seed, self._shards, recipe.shuffle)[1]

    def training(self, start_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Input and labels of every step from ``start_step`` on, without end."""
        for step in range(start_step, 2**62):
            indices = self._batch(step).to(self._images.device)
            yield training_input(self.recipe, self._images[indices], step), self._labels[indices]

    def statistics(self) -> Iterator[Tensor]:
        """Input from the training set as evaluation sees it, for population statistics: a fixed choice."""
        recipe, num = self.recipe, len(self._images)
        num_examples = min(recipe.recalibrate_examples or num, num)
        chosen = epoch_order(0, num, recipe.seed)[:num_examples].to(self._images.device)
        for part in chosen.split(_at_once(recipe)):
            yield evaluation_input(recipe, self._images[part])

    def test(self, crops: Crops = 1, num_examples: int = 0) -> Iterator[Iterator[Tensor]]:
        """Views of the whole test set, in the order of ``test_labels``.

        Args:
            crops: Views of each image. 1 is the image as it is, which has the network's size already;
                10 and 144 are the paper's, in proportion (`batchnorm.data.evaluation_crops`).
            num_examples: The first so many; 0 for all.

        Yields:
            For each part of the set its views one after the other.

        Raises:
            ValueError: Several crops for a network that cannot see them.
        """
        recipe = self.recipe
        if crops != 1 and not isinstance(recipe, InceptionRecipe):
            raise ValueError(f"{recipe.model} sees whole images only: use 1 crop, not {crops}.")
        for part in self._test_images[: num_examples or None].split(_at_once(recipe)):
            yield _views(recipe, part, crops)


def _views(recipe: Recipe, images: Tensor, crops: Crops) -> Iterator[Tensor]:
    if crops == 1:
        yield evaluation_input(recipe, images)
        return
    height, width = images.shape[-2:]
    levels = to_input(images)
    for crop in evaluation_crops(width, height, crops, width):
        yield standardize(crop_batch(levels, crop, width)).contiguous(memory_format=torch.channels_last)


def evaluation_input(recipe: Recipe, images: Tensor) -> Tensor:
    """What the recipe's network is fed with: float32 from uint8 images, nothing random.

    Args:
        recipe: Of either kind.
        images: uint8, (N, H, W) in grey or (N, 3, H, W) in colour.
    """
    if isinstance(recipe, MLPRecipe):
        return to_input(images, binarize=recipe.binarize)
    return standardize(to_input(images)).contiguous(memory_format=torch.channels_last)


def training_input(recipe: Recipe, images: Tensor, step: int) -> Tensor:
    """Like `evaluation_input`, with the recipe's random changes: a function of seed and step.

    Args:
        recipe: Of either kind.
        images: As above; where the recipe's crops are by area, they are cropped and mirrored already.
        step: Counted from 0.
    """
    if not isinstance(recipe, InceptionRecipe):
        return evaluation_input(recipe, images)
    mixed = np.random.SeedSequence([recipe.seed, step, 1]).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(mixed >> 1))
    if recipe.crops == "shift":
        images = shift_and_mirror(images, generator, reach=images.shape[-1] // 8, mirror=recipe.mirror)
    levels = to_input(images)
    if recipe.distortion:
        levels = distort(levels, generator, strength=recipe.distortion)
    return standardize(levels).contiguous(memory_format=torch.channels_last)


def _at_once(recipe: Recipe) -> int:
    return BATCH if isinstance(recipe, MLPRecipe) else BATCH_COLOUR
