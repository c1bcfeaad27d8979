"""From uint8 images to a network's input as its recipe says, for training and for evaluation."""

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from batchnorm.data import (
    Share,
    crop_batch,
    crop_each,
    distort,
    evaluation_crops,
    random_area_box,
    shift_and_mirror,
    standardize,
    to_input,
)
from batchnorm.train.recipe import InceptionRecipe, MLPRecipe, Recipe

Crops = Literal[1, 10, 144]
"""Views of an image whose predictions are averaged."""


def evaluation_input(recipe: Recipe, images: Tensor) -> Tensor:
    """What the recipe's network is fed with: float32, nothing random.

    Args:
        recipe: Of either kind.
        images: uint8, (N, H, W) in grey or (N, 3, H, W) in colour.
    """
    if isinstance(recipe, MLPRecipe):
        return to_input(images, binarize=recipe.binarize)
    return _for_network(to_input(images))


def training_input(
    recipe: Recipe, images: Tensor, step: int, *, cropped: bool = False, share: Share | None = None
) -> Tensor:
    """Like `evaluation_input`, with the recipe's random changes: a function of seed, step and place.

    Args:
        recipe: Of either kind.
        images: As above.
        step: Counted from 0.
        cropped: Whether they are cropped and mirrored already, as those of a stream are.
        share: Which part of the step's batch they are, and are changed like; None: all of it.
    """
    if not isinstance(recipe, InceptionRecipe) or not len(images):
        return evaluation_input(recipe, images)
    mixed = np.random.SeedSequence([recipe.seed, step, 1]).generate_state(2, np.uint64)
    generator = torch.Generator().manual_seed(int(mixed[0] >> 1))
    if not cropped and recipe.crops != "area":
        reach = _reach(images) if recipe.crops == "shift" else 0
        images = shift_and_mirror(images, generator, reach=reach, mirror=recipe.mirror, share=share)
    levels = to_input(images)
    if not cropped and recipe.crops == "area":
        levels = _random_areas(levels, np.random.default_rng(mixed[1]), mirror=recipe.mirror, share=share)
    if recipe.distortion:
        levels = distort(levels, generator, strength=recipe.distortion, share=share)
    return _for_network(levels)


def views(recipe: Recipe, images: Tensor, crops: Crops) -> Iterator[Tensor]:
    """The views of images which have the network's size already, one after the other.

    Args:
        recipe: Of either kind.
        images: uint8, (N, H, W) in grey or (N, 3, H, W) in colour.
        crops: 1 is the image as it is. 10 and 144 are those of `batchnorm.data.evaluation_crops`, but where
            training moves images: a network that has seen one scale only is shown that one, moved as
            `shifts` says.
    """
    if crops == 1:
        yield evaluation_input(recipe, images)
        return
    height, width = images.shape[-2:]
    if isinstance(recipe, InceptionRecipe) and recipe.crops == "shift":
        reach = _reach(images)
        padded = to_input(torch.nn.functional.pad(images, [reach] * 4, value=128))
        for down, right, mirrored in shifts(crops, reach):
            moved = padded[..., reach + down :, reach + right :][..., :height, :width]
            yield _for_network(moved.flip(-1) if mirrored else moved)
        return
    levels = to_input(images)
    for crop in evaluation_crops(width, height, crops, width):
        yield _for_network(crop_batch(levels, crop, width))


def shifts(crops: Literal[10, 144], reach: int) -> Iterator[tuple[int, int, bool]]:
    """How images are moved for the views of a network that was trained on moved images.

    Args:
        crops: 10 are the corners of what training reaches and the image in its place; 144 a grid of eight
            rows and nine columns over it. Each view comes with its mirror image.
        reach: Pixels that training moves by at most.

    Yields:
        Where the view begins, in pixels down and to the right of the image, and whether it is mirrored.
    """
    if crops == 10:
        places = [(-reach, -reach), (-reach, reach), (reach, -reach), (reach, reach), (0, 0)]
    else:
        rows, columns = (np.linspace(-reach, reach, num).round().astype(int).tolist() for num in (8, 9))
        places = [(row, column) for row in rows for column in columns]
    for down, right in places:
        yield from ((down, right, False), (down, right, True))


def _reach(images: Tensor) -> int:
    return images.shape[-1] // 8


def _random_areas(
    levels: Tensor, random: np.random.Generator, *, mirror: bool, share: Share | None
) -> Tensor:
    height, width = levels.shape[-2:]
    total = len(levels) if share is None else share.total
    boxes = [random_area_box(width, height, random) for _ in range(total)]
    mirrored = [bool(flip) and mirror for flip in random.integers(0, 2, total)]
    if share is not None:
        boxes, mirrored = share.choose(boxes), share.choose(mirrored)
    return crop_each(levels, boxes, mirrored, width)


def _for_network(levels: Tensor) -> Tensor:
    return standardize(levels).contiguous(memory_format=torch.channels_last)
