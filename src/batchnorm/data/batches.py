"""Which examples meet in which batch, and how bytes become a network's input."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


@lru_cache(maxsize=4)
def _order(epoch: int, num_examples: int, seed: int) -> Tensor:
    # SeedSequence mixes the pair, so that (seed 1, epoch 0) and (seed 0, epoch 1) have nothing in common.
    mixed = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(mixed >> 1))
    return torch.randperm(num_examples, generator=generator)


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
    if not 1 <= batch_size <= num_examples:
        raise ValueError(
            f"batch_size must be between 1 and the {num_examples} training examples, got {batch_size}: "
            "an incomplete batch is always dropped, so a larger one would never come."
        )
    if step < 0:
        raise ValueError(f"step is counted from 0, got {step}.")
    epoch, batch = divmod(step, num_examples // batch_size)
    order = _order(epoch, num_examples, seed)
    return order[batch * batch_size : (batch + 1) * batch_size].clone()


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
