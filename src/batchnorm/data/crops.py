"""Where crops lie: pure geometry, no pixels.

Coordinates are pixels of the upright image: pixel i covers the interval from i to i + 1, so that the
picture reaches from 0 to its width, and fractions of a pixel mean what they say.
"""

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np

NUM_TRIES = 10
"""Boxes that `random_area_box` draws before it gives up."""

SCALES = (256, 288, 320, 352)
"""Shorter side of the resized image, for crops of 224 pixels. Source: the paper's 144 crops."""


class Box(NamedTuple):
    """A rectangle; whole numbers where it is cut at random, fractions where it comes from a resized image."""

    left: float
    top: float
    width: float
    height: float


class Crop(NamedTuple):
    """What one square of pixels shows."""

    box: Box
    """In the image as it is."""
    mirrored: bool = False
    """Left to right."""
    resized: tuple[int, int] | None = None
    """Width and height that the whole image is resized to, if the box is a window of that picture, at
    whole pixels; `None` if the box is cut out and then resized. They differ at the border, where the
    window's pixels know what lies outside."""


def random_area_box(
    width: int,
    height: int,
    rng: np.random.Generator,
    *,
    area: tuple[float, float] = (0.08, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
    """A box of random area, aspect ratio and place, for training.

    The share of the area is uniform, the logarithm of the aspect ratio uniform, and so is the place
    among those where the box fits. Ten boxes are tried; where none fits, as in very long images, it is
    the largest centred box of an allowed aspect ratio.

    Args:
        width: Of the image, pixels.
        height: Of the image, pixels.
        rng: Moves on by a number of draws that depends on the image.
        area: Smallest and largest share of the image's area.
        aspect: Smallest and largest ratio of width to height.

    Returns:
        Whole pixels, at least one each way; the bounds hold up to this rounding.

    Raises:
        ValueError: An image without pixels, or bounds that no box can meet.

    Source: section 4.2 of the paper trains as Szegedy et al. (2014, GoogLeNet, section 6) do.
    """
    _check_size(width, height)
    if not 0 < area[0] <= area[1] <= 1:
        raise ValueError(f"area must be two shares with 0 < smallest ≤ largest ≤ 1, got {area}.")
    if not 0 < aspect[0] <= aspect[1] < math.inf:
        raise ValueError(f"aspect must be two ratios with 0 < smallest ≤ largest, got {aspect}.")
    narrowest, widest = math.log(aspect[0]), math.log(aspect[1])
    for _ in range(NUM_TRIES):
        pixels = width * height * rng.uniform(*area)
        ratio = math.exp(rng.uniform(narrowest, widest))
        across, down = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 1 <= across <= width and 1 <= down <= height:
            left, top = rng.integers(width - across + 1), rng.integers(height - down + 1)
            return Box(int(left), int(top), across, down)
    across = max(1, min(width, round(height * aspect[1])))
    down = max(1, min(height, round(width / aspect[0])))
    return Box((width - across) // 2, (height - down) // 2, across, down)


def evaluation_crops(width: int, height: int, num: Literal[1, 10, 144] = 1, size: int = 224) -> list[Crop]:
    """The crops whose predictions are averaged, always in the same order.

    The image is resized until its shorter side has 256 pixels, and squares of 224 are cut from it:

    - 1: the centre.
    - 10: of the whole resized image, the corners (top left, top right, bottom left, bottom right) and
      the centre, each as it is and then mirrored.
    - 144: with shorter sides of 256, 288, 320 and 352; at each, three squares of that side (left, centre,
      right of a landscape; top, centre, bottom of a portrait); of each, the corners and the centre as
      above and then the square itself, resized to 224; each as it is and then mirrored. The three squares
      of a square image coincide: its crops are counted three times, so that every image has 144.

    For another `size` everything is in proportion, rounded to whole pixels of the resized image. Odd
    margins are divided with the smaller half left and above. Where an image is smaller, it is enlarged.
    The square itself is resized from the image as it is, in one step.

    Args:
        width: Of the image, pixels.
        height: Of the image, pixels.
        num: Of crops.
        size: Side of the crops that the network sees, pixels.

    Returns:
        The crops; `resized` is set but for the squares, which are no windows of 224 pixels.

    Raises:
        ValueError: An image or crops without pixels, or another number of crops.

    Source: 10 as Krizhevsky et al. (2012), on the resized image rather than on its middle; 144 as
    Szegedy et al. (2014, GoogLeNet, section 7), which section 4.2.3 of the paper follows.
    """
    _check_size(width, height)
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}.")
    if num == 1:
        resized = _Resized.of(width, height, SCALES[0], size)
        return [resized.window(*_centre(0, 0, resized.width, resized.height, size), size)]
    if num == 10:
        resized = _Resized.of(width, height, SCALES[0], size)
        places = _corners_and_centre(0, 0, resized.width, resized.height, size)
        return [crop for place in places for crop in _both(resized.window(*place, size))]
    if num == 144:
        return [crop for scale in SCALES for crop in _crops_of_scale(width, height, scale, size)]
    raise ValueError(f"num must be 1, 10 or 144 crops, got {num}.")


class _Resized(NamedTuple):
    """An image resized to whole pixels, and where its squares lie in the original."""

    width: int
    height: int
    original_width: int
    original_height: int

    @classmethod
    def of(cls, width: int, height: int, scale: int, size: int) -> "_Resized":
        """Shorter side `scale` for crops of 224 pixels, in proportion for other sizes."""
        side = _round(scale * size, 224)
        if width <= height:
            return cls(side, _round(height * side, width), width, height)
        return cls(_round(width * side, height), side, width, height)

    def window(self, left: int, top: int, side: int) -> Crop:
        """A square of the resized image as a window of it."""
        return Crop(self.box(left, top, side), resized=(self.width, self.height))

    def box(self, left: int, top: int, side: int) -> Box:
        """A square of the resized image, in pixels of the original."""
        return Box(
            left * self.original_width / self.width,
            top * self.original_height / self.height,
            side * self.original_width / self.width,
            side * self.original_height / self.height,
        )


def _crops_of_scale(width: int, height: int, scale: int, size: int) -> Iterator[Crop]:
    resized = _Resized.of(width, height, scale, size)
    side = min(resized.width, resized.height)
    spare_x, spare_y = resized.width - side, resized.height - side
    # One of the spares is zero, so the three squares lie along the other.
    for x, y in ((0, 0), (spare_x // 2, spare_y // 2), (spare_x, spare_y)):
        for left, top in _corners_and_centre(x, y, side, side, size):
            yield from _both(resized.window(left, top, size))
        yield from _both(Crop(resized.box(x, y, side)))


def _both(crop: Crop) -> tuple[Crop, Crop]:
    return crop, crop._replace(mirrored=True)


def _corners_and_centre(x: int, y: int, width: int, height: int, size: int) -> list[tuple[int, int]]:
    right, bottom = x + width - size, y + height - size
    return [(x, y), (right, y), (x, bottom), (right, bottom), _centre(x, y, width, height, size)]


def _centre(x: int, y: int, width: int, height: int, size: int) -> tuple[int, int]:
    return x + (width - size) // 2, y + (height - size) // 2


def _round(numerator: int, denominator: int) -> int:
    """Nearest whole number, halves upwards, without the doubts of floating point."""
    return (2 * numerator + denominator) // (2 * denominator)


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise ValueError(f"an image has at least 1×1 pixels, got {width}×{height}.")
