"""What training and evaluation are fed with: data in memory, or images that are decoded on the way."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from batchnorm.data import (
    ImageData,
    ImageFiles,
    Share,
    epoch_order,
    num_cores,
    step_indices,
)
from batchnorm.train.inputs import Crops, evaluation_input, training_input, views
from batchnorm.train.ranks import ALONE, Ranks
from batchnorm.train.recipe import InceptionRecipe, MLPRecipe, Recipe

Data = ImageData | ImageFiles

BATCH = 1000
"""Small grey images evaluated at once; with fixed statistics this has no influence on the result."""
BATCH_COLOUR = 250
"""Likewise of small colour images, through a network with many activations."""
BATCH_FILES = 32
"""Likewise of images that are decoded on the way."""


class Part(NamedTuple):
    """Some images of the test set."""

    views: Iterator[Tensor]
    """Inputs of the network, one for each view, of shape (N, …) each."""
    labels: np.ndarray
    """int64, shape (N,)."""


class Feed(Protocol):
    """Where the trainer's batches come from: of one rank, its part of each."""

    share: Share
    """Which places of a step's batch are this rank's, and in which micro-batch."""
    statistics_method: str
    """How `batchnorm.recalibrate` shall use `statistics`."""

    def training(self, start_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Input and labels of every step from ``start_step`` on, of all its micro-batches together."""

    def statistics(self) -> Iterator[Tensor]:
        """Input from the training set for population statistics: a fixed choice.

        Where batches are normalized by themselves, whole ones go to the ranks in turn, so that the
        statistics are those of one process.
        """

    def test(self, crops: Crops = 1, num_examples: int = 0) -> Iterator[Part]:
        """Views of the test set.

        Args:
            crops: Of each image.
            num_examples: The first so many; 0 for all.
        """

    @property
    def bad_images(self) -> list[str]:
        """Names of images that could not be decoded so far, and why."""


def feed_of(
    recipe: Recipe,
    data: Data,
    device: torch.device,
    num_workers: int | None = None,
    ranks: Ranks = ALONE,
) -> Feed:
    """What a recipe's training on some data is fed with.

    Args:
        recipe: Order, batch size, random changes.
        data: In memory or on disk.
        device: Where batches shall be.
        num_workers: Processes that decode images on disk; None is one for each core but one, shared with
            the other ranks of this machine, and 0 decodes in this process.
        ranks: That train together; each is fed its part.

    Raises:
        ValueError: Recipe and data do not fit.
    """
    if isinstance(data, ImageData):
        return MemoryFeed(recipe, data, device, ranks)
    if not isinstance(recipe, InceptionRecipe) or recipe.crops != "area":
        raise ValueError(
            "images on disk have all sizes and are cut by area: use an Inception recipe with crops area, "
            f"not {recipe.model}."
        )
    if recipe.shard_size != InceptionRecipe().shard_size:
        raise ValueError(
            f"images on disk have shards already (a folder's are of a thousand): leave shard_size as it is, "
            f"not {recipe.shard_size}; batchnorm shards --per-shard packs others."
        )
    if num_workers is None:
        num_workers = max(1, num_cores() // ranks.num_local - 1)
    return FilesFeed(recipe, data, device, num_workers, ranks)


def share_of(recipe: Recipe, ranks: Ranks) -> Share:
    """What a rank takes of each step's batch.

    Raises:
        ValueError: A rank would have a single example to normalize.
    """
    total = recipe.batch_size * (ranks.num if recipe.batch_per_rank else 1)
    # The smallest part of all ranks, so that all of them fail.
    fewest = min(min(Share.of(total, rank, ranks.num, recipe.accumulate).sizes) for rank in range(ranks.num))
    if recipe.normalize and not recipe.sync_bn and fewest < 2:
        raise ValueError(
            f"batch_size: of {total} examples a step on {ranks.num} ranks with accumulate "
            f"{recipe.accumulate}, some rank normalizes {fewest} at a time, and one example has no variance. "
            "Take a larger batch, fewer ranks, or sync_bn, which normalizes over all ranks."
        )
    return Share.of(total, ranks.rank, ranks.num, recipe.accumulate)


class MemoryFeed:
    """Batches of a data set that fits into the device's memory: these need no loader.

    Args:
        recipe: Order, batch size, random changes.
        data: Images and labels.
        device: Where they shall be.
        ranks: That train together.
    """

    def __init__(self, recipe: Recipe, data: ImageData, device: torch.device, ranks: Ranks = ALONE) -> None:
        self.recipe, self._ranks = recipe, ranks
        self.share = share_of(recipe, ranks)
        self._images = torch.from_numpy(data.train_images).to(device)
        self._labels = torch.from_numpy(data.train_labels).to(device)
        self._test_images = torch.from_numpy(data.test_images).to(device)
        self._test_labels = data.test_labels
        # Exact moments take a pass for each layer; pooled ones of large batches take one for all of seventy.
        self.statistics_method = "exact" if isinstance(recipe, MLPRecipe) else "pooled"
        self.bad_images: list[str] = []
        self._at_once = BATCH if isinstance(recipe, MLPRecipe) else BATCH_COLOUR
        num = len(data.train_images)
        self._shards = np.append(np.arange(0, num, recipe.shard_size), num)
        self._indices(0)  # A batch that never fits fails here.

    def _indices(self, step: int) -> Tensor:
        recipe, num = self.recipe, len(self._images)
        return step_indices(step, self.share.total, num, recipe.seed, self._shards, recipe.shuffle)[1]

    def training(self, start_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """As `Feed.training`."""
        for step in range(start_step, self.recipe.steps):
            indices = self.share.take(self._indices(step)).to(self._images.device)
            x = training_input(self.recipe, self._images[indices], step, share=self.share)
            yield x, self._labels[indices]

    def statistics(self) -> Iterator[Tensor]:
        """Training images as evaluation sees them, the first of an epoch's order."""
        recipe, num = self.recipe, len(self._images)
        num_examples = min(recipe.recalibrate_examples or num, num)
        chosen = epoch_order(0, num, recipe.seed)[:num_examples].to(self._images.device)
        if self.statistics_method == "exact":
            mine = chosen[self._ranks.part(num_examples)].split(self._at_once)
        else:
            mine = chosen.split(self._at_once)[self._ranks.rank :: self._ranks.num]
        for part in mine:
            if len(part):
                yield evaluation_input(recipe, self._images[part])

    def test(self, crops: Crops = 1, num_examples: int = 0) -> Iterator[Part]:
        """As `Feed.test`. One crop is the image as it is, which has the network's size already.

        Raises:
            ValueError: Several crops for a network that cannot see them.
        """
        recipe = self.recipe
        if crops != 1 and not isinstance(recipe, InceptionRecipe):
            raise ValueError(f"{recipe.model} sees whole images only: use 1 crop, not {crops}.")
        mine = self._ranks.part(min(num_examples or len(self._test_labels), len(self._test_labels)))
        for start in range(mine.start, mine.stop, self._at_once):
            part = slice(start, min(start + self._at_once, mine.stop))
            yield Part(views(recipe, self._test_images[part], crops), self._test_labels[part])


class FilesFeed:
    """Batches of images that worker processes decode.

    Args:
        recipe: Order, batch size, random changes.
        data: Where the images are.
        device: Where batches shall be.
        num_workers: Processes that decode.
        ranks: That train together.
    """

    def __init__(
        self,
        recipe: InceptionRecipe,
        data: ImageFiles,
        device: torch.device,
        num_workers: int,
        ranks: Ranks = ALONE,
    ) -> None:
        self.recipe, self._data, self._device, self._num_workers = recipe, data, device, num_workers
        self._ranks = ranks
        self.share = share_of(recipe, ranks)
        self.statistics_method = "pooled"
        self.bad_images: list[str] = []

    def training(self, start_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """As `Feed.training`."""
        recipe, ranks = self.recipe, self._ranks
        steps = self._steps(
            start_step,
            recipe.steps - start_step,
            batch_size=self.share.total,
            rank=ranks.rank,
            world_size=ranks.num,
            num_parts=recipe.accumulate,
        )
        for step, (images, labels) in enumerate(steps, start=start_step):
            yield training_input(recipe, images, step, cropped=True, share=self.share), labels

    def statistics(self) -> Iterator[Tensor]:
        """The first mini-batches of training, cropped likewise and not distorted."""
        num_examples = self.recipe.recalibrate_examples or len(self._data.train)
        num_steps = max(1, min(num_examples, len(self._data.train)) // self.recipe.batch_size)
        first, stride = self._ranks.rank, self._ranks.num
        num_mine = len(range(first, num_steps, stride))
        for images, _ in self._steps(first, num_mine, batch_size=self.recipe.batch_size, stride=stride):
            yield evaluation_input(self.recipe, images)

    def _steps(self, start_step: int, num_steps: int, **which: int) -> Iterator[tuple[Tensor, Tensor]]:
        # Decoding needs Pillow, which data in memory do without.
        from batchnorm.data.stream import training_stream

        recipe = self.recipe
        with training_stream(
            self._data.train,
            start_step=start_step,
            num_steps=num_steps,
            size=recipe.image_size,
            seed=recipe.seed,
            shuffle=recipe.shuffle,
            mirror=recipe.mirror,
            num_workers=self._num_workers,
            pin_memory=self._device.type == "cuda",
            **which,
        ) as stream:
            for batch in stream:
                self._note(stream.bad)
                yield batch.images.to(self._device, non_blocking=True), batch.labels.to(self._device)

    def test(self, crops: Crops = 1, num_examples: int = 0) -> Iterator[Part]:
        """As `Feed.test`, without images that cannot be decoded."""
        from batchnorm.data.stream import evaluation_stream

        with evaluation_stream(
            self._data.val,
            size=self.recipe.image_size,
            crops=crops,
            batch_size=BATCH_FILES,
            num_images=num_examples,
            rank=self._ranks.rank,
            world_size=self._ranks.num,
            num_workers=self._num_workers,
            pin_memory=self._device.type == "cuda",
        ) as stream:
            for batch in stream:
                self._note(stream.bad)
                yield Part(self._views(batch.images), batch.labels.numpy())

    def _views(self, images: Tensor) -> Iterator[Tensor]:
        for view in images.unbind(1):
            yield evaluation_input(self.recipe, view.to(self._device, non_blocking=True))

    def _note(self, bad: list[str]) -> None:
        self.bad_images += [name for name in bad if name not in self.bad_images]
