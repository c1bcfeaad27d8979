"""Which examples meet in which batch, and how bytes become a network's input."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

Drawn = TypeVar("Drawn")

Shuffle = Literal["all", "shards+within", "shards", "within", "none"]
"""What changes from epoch to epoch: the order of all examples; that of shards and of the examples within
each; of one of the two alone; nothing."""


@dataclass(frozen=True)
class Share:
    """What one of several processes takes of a batch."""

    places: Tensor
    """int64, shape (n,): where its examples stand in the batch, from micro-batch to micro-batch."""
    sizes: tuple[int, ...]
    """How many of them are in each micro-batch."""
    total: int
    """Examples in the batch."""

    @classmethod
    def of(cls, total: int, rank: int = 0, world_size: int = 1, num_parts: int = 1) -> "Share":
        """The contiguous part that a rank takes of each micro-batch; none of the two need divide evenly.

        Micro-batches are the same whatever the number of ranks.

        Args:
            total: Examples in the batch, over all ranks.
            rank: This process among those that train together.
            world_size: Their number.
            num_parts: Micro-batches, which follow each other in the batch.
        """
        ranges = []
        for part in range(num_parts):
            first, end = total * part // num_parts, total * (part + 1) // num_parts
            mine = ((end - first) * each // world_size for each in (rank, rank + 1))
            ranges.append(range(*(first + place for place in mine)))
        places = torch.tensor([place for each in ranges for place in each], dtype=torch.int64)
        return cls(places, tuple(map(len, ranges)), total)

    def take(self, draws: Tensor, dim: int = 0) -> Tensor:
        """What was drawn for this part, out of what was drawn for every example of the batch."""
        return draws.index_select(dim, self.places)

    def choose(self, draws: Sequence[Drawn]) -> list[Drawn]:
        """As `take`, out of a list."""
        return [draws[place] for place in self.places.tolist()]


def _generator(seed: int, epoch: int) -> torch.Generator:
    # SeedSequence mixes the pair, so that (seed 1, epoch 0) and (seed 0, epoch 1) have nothing in common.
    mixed = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed >> 1))


@lru_cache(maxsize=4)
def _order(epoch: int, num_examples: int, seed: int) -> Tensor:
    return torch.randperm(num_examples, generator=_generator(seed, epoch))


@lru_cache(maxsize=4)
def _sharded_order(epoch: int, seed: int, shards: tuple[int, ...], shuffle: Shuffle) -> Tensor:
    generator = _generator(seed, epoch)
    starts, sizes = shards[:-1], np.diff(shards).tolist()
    order = torch.arange(len(sizes))
    if shuffle in ("shards", "shards+within"):
        order = torch.randperm(len(sizes), generator=generator)
    if shuffle in ("within", "shards+within"):
        parts = [starts[shard] + torch.randperm(sizes[shard], generator=generator) for shard in order]
    else:
        parts = [torch.arange(starts[shard], starts[shard] + sizes[shard]) for shard in order]
    return torch.cat(parts)


def shuffled_order(epoch: int, seed: int, shards: np.ndarray, shuffle: Shuffle = "all") -> Tensor:
    """The order of all examples in one epoch: a function of its arguments alone.

    Args:
        epoch: Counted from 0.
        seed: Any non-negative integer.
        shards: Number of each shard's first example, and at the end that of all examples; int64.
        shuffle: What is put into another order in each epoch. Where examples within a shard are not, the same
            ones meet in a mini-batch again and again.

    Returns:
        A permutation of ``0 .. shards[-1] - 1``, int64, on the CPU.

    Raises:
        ValueError: ``shards`` does not begin at 0 or does not increase.

    Source: Ioffe & Szegedy (2015), section 4.2.1, for shuffling within shards.
    """
    bounds = tuple(int(bound) for bound in shards)
    if len(bounds) < 2 or bounds[0] != 0 or min(np.diff(bounds)) < 1:
        raise ValueError(f"shards must increase from 0 to the number of examples, got {bounds[:10]}.")
    if shuffle == "all":
        return _order(epoch, bounds[-1], seed).clone()
    return _sharded_order(epoch, seed, bounds, shuffle).clone()


def step_indices(
    step: int,
    batch_size: int,
    num_examples: int,
    seed: int,
    shards: np.ndarray | None = None,
    shuffle: Shuffle = "all",
) -> tuple[int, Tensor]:
    """The epoch of one training step, and its examples in the order of `shuffled_order`.

    Args:
        step: As in `batch_indices`, whose result this has for ``shuffle="all"``; so are the next three.
        batch_size: Examples in a batch, over all ranks.
        num_examples: Size of the training set.
        seed: Seed of the orders.
        shards: As in `shuffled_order`; one shard if None.
        shuffle: As in `shuffled_order`.

    Returns:
        The epoch, and int64 indices of shape (batch_size,).

    Raises:
        ValueError: As `batch_indices` and `shuffled_order`.
    """
    if shuffle == "all":
        indices = batch_indices(step, batch_size, num_examples, seed)
        return step // (num_examples // batch_size), indices
    _check(step, batch_size, num_examples)
    epoch, batch = divmod(step, num_examples // batch_size)
    bounds = np.array([0, num_examples]) if shards is None else shards
    order = shuffled_order(epoch, seed, bounds, shuffle)
    return epoch, order[batch * batch_size : (batch + 1) * batch_size].clone()


def epoch_order(epoch: int, num_examples: int, seed: int) -> Tensor:
    """The order of all examples in one epoch: a function of its arguments alone.

    Args:
        epoch: Counted from 0.
        num_examples: Size of the training set.
        seed: Any non-negative integer.

    Returns:
        A permutation of `0 .. num_examples - 1`, int64, shape (num_examples,), on the CPU.
    """
    return _order(epoch, num_examples, seed).clone()


def batch_indices(step: int, batch_size: int, num_examples: int, seed: int) -> Tensor:
    """The examples of one training step, computed without knowing what came before.

    An epoch has `num_examples // batch_size` batches, all full. The remainder of its order is dropped;
    as the next epoch has another order, every example has the same chance of being seen.

    Args:
        step: Counted from 0 over the whole training.
        batch_size: Examples in a batch.
        num_examples: Size of the training set.
        seed: Seed of the orders.

    Returns:
        int64 indices, shape (batch_size,), on the CPU.

    Raises:
        ValueError: The batch is empty or larger than the training set, or the step negative.
    """
    _check(step, batch_size, num_examples)
    epoch, batch = divmod(step, num_examples // batch_size)
    order = _order(epoch, num_examples, seed)
    return order[batch * batch_size : (batch + 1) * batch_size].clone()


def _check(step: int, batch_size: int, num_examples: int) -> None:
    if not 1 <= batch_size <= num_examples:
        raise ValueError(
            f"batch_size must be between 1 and the {num_examples} training examples, got {batch_size}: "
            "an incomplete batch is always dropped, so a larger one would never come."
        )
    if step < 0:
        raise ValueError(f"step is counted from 0, got {step}.")


def to_input(images: Tensor, *, binarize: bool = False) -> Tensor:
    """Turn grey levels into a network's input.

    Args:
        images: uint8, any shape.
        binarize: Ink or paper: 1 where the level is at least 128, else 0, as section 4.1 of the paper
            feeds its network. Otherwise levels are divided by 255.

    Returns:
        float32 between 0 and 1, same shape and device.

    Raises:
        TypeError: `images` is not uint8, so what its levels mean is unknown.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8 grey levels from 0 to 255, got {images.dtype}.")
    if binarize:
        return (images >= 128).to(torch.float32)
    return images.to(torch.float32).div_(255)
