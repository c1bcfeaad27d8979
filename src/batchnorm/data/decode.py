"""Crops of compressed images: no more pixels are decoded, turned or converted than a crop needs.

Boxes are in pixels of the upright picture (`data.crops`). The stored picture may lie on its side; boxes
are turned to it, and the small results are turned back.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import NamedTuple

import numpy as np

from batchnorm.data.crops import Box, Crop

try:
    from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError
except ImportError as error:
    raise ImportError('Images are decoded by Pillow: pip install "batchnorm[train]"') from error

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF")
"""What is decoded; told apart by content, not by name."""

MAX_PIXELS = 89_478_485
"""Of an image; more is taken for a decompression bomb. Pillow warns from the same number on."""

REDUCTIONS = (8, 4, 2)
"""By which JPEG decoding can shrink a picture at a saving."""

_JPEG = ("JPEG", "MPO")
_SLACK = 1e-6
"""Rounding of coordinates, pixels."""
_REDUCING_GAP = 3.0
"""Pictures that shrink more than this often are averaged over whole pixels first."""


class BadImage(ValueError):
    """These bytes are no picture, or not all of it."""


def read_crop(
    data: bytes, choose: Callable[[int, int], Crop | Box], size: int, *, name: str = ""
) -> np.ndarray:
    """Decode one crop of an image.

    Args:
        data: The file's content.
        choose: Given the upright picture's width and height, returns what to cut.
        size: Side of the result, pixels.
        name: Of the file, for messages.

    Returns:
        uint8, shape (3, size, size): red, green and blue.

    Raises:
        BadImage: The bytes are no whole picture. Nothing else is raised for the bytes' sake.
        ValueError: A box does not lie within the picture, or `size` is less than a pixel.

    See `read_crops` for how.
    """
    return read_crops(data, lambda width, height: [choose(width, height)], size, name=name)[0]


def read_crops(
    data: bytes, choose: Callable[[int, int], Sequence[Crop | Box]], size: int, *, name: str = ""
) -> np.ndarray:
    """Decode several crops of an image, whose bytes are decoded once.

    Every box is resized by Pillow's antialiased bilinear filter, as if the whole picture were resized and
    the crop cut from it: pixels just outside a box count at its border. A JPEG is decoded at 1/2, 1/4
    or 1/8 of its size where every crop has at least `size` pixels left on its sides. Boxes that are
    windows of one resized picture share its resizing.

    EXIF orientation is obeyed. Grey, CMYK and palette pictures become RGB; transparency is dropped,
    of 16 bits the upper eight are kept, of several frames the first.

    Args:
        data: The file's content.
        choose: Given the upright picture's width and height, returns what to cut.
        size: Side of the results, pixels.
        name: Of the file, for messages.

    Returns:
        uint8, shape (K, 3, size, size), in the order of `choose`.

    Raises:
        BadImage: The bytes are no whole picture. Nothing else is raised for the bytes' sake.
        ValueError: A box does not lie within the picture, or `size` is less than a pixel.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}.")
    with _blamed(name):
        image = _opened(data)
        turn = _orientation(image)
    upright = image.size[::-1] if turn.swap else image.size
    crops = [crop if isinstance(crop, Crop) else Crop(crop) for crop in choose(*upright)]
    for crop in crops:
        _check_inside(crop.box, *upright)
    boxes = [turn.stored(crop.box, *image.size) for crop in crops]
    with _blamed(name):
        pixels, reduction = _decoded(image, boxes, size)
    pictures = _resized(pixels, [Box(*(side / reduction for side in box)) for box in boxes], size)
    result = np.empty((len(crops), 3, size, size), np.uint8)
    for out, crop, picture in zip(result, crops, pictures, strict=True):
        # Grey pictures have one channel, which assignment repeats.
        out[:] = turn.upright(picture, crop.mirrored)
    return result


class _Turn(NamedTuple):
    """How the stored picture becomes upright: mirrored within its axes, then axes swapped."""

    swap: bool
    flip_x: bool
    flip_y: bool

    def stored(self, box: Box, width: int, height: int) -> Box:
        """Where a box of the upright picture lies in the stored one, of `width` × `height`."""
        left, top, across, down = box
        if self.swap:
            left, top, across, down = top, left, down, across
        if self.flip_x:
            left = width - left - across
        if self.flip_y:
            top = height - top - down
        return Box(left, top, across, down)

    def upright(self, picture: np.ndarray, mirrored: bool) -> np.ndarray:
        """A view of stored pixels (bands, rows, columns) as the viewer sees them."""
        picture = picture[:, :: -1 if self.flip_y else 1, :: -1 if self.flip_x else 1]
        if self.swap:
            picture = picture.swapaxes(1, 2)
        return picture[:, :, ::-1] if mirrored else picture


_TURNS = {
    1: _Turn(False, False, False),
    2: _Turn(False, True, False),
    3: _Turn(False, True, True),
    4: _Turn(False, False, True),
    5: _Turn(True, False, False),
    6: _Turn(True, False, True),
    7: _Turn(True, True, True),
    8: _Turn(True, True, False),
}
"""By EXIF orientation."""


@contextmanager
def _blamed(name: str) -> Iterator[None]:
    """Whatever Pillow raises while it reads is the image's fault; its plugins know no common error."""
    # Set by many a program, it would give us grey where pixels are missing.
    lenient = ImageFile.LOAD_TRUNCATED_IMAGES
    if lenient:
        ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    except MemoryError:
        raise  # sizes are limited, so this is the machine's fault
    except Exception as error:
        what = str(error) or type(error).__name__
        raise BadImage(f"{name or 'image'}: {what}. Replace the file or leave it out.") from error
    finally:
        if lenient:
            ImageFile.LOAD_TRUNCATED_IMAGES = True


def _opened(data: bytes) -> ImageFile.ImageFile:
    if not data:
        raise ValueError("an empty file, expected a picture")
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        known = ", ".join(FORMATS)
        begins = bytes(data[:12])
        raise ValueError(f"expected a picture ({known}), found what begins with {begins!r}") from None
    width, height = image.size
    if not 1 <= width * height <= MAX_PIXELS:
        raise ValueError(f"expected 1 to {MAX_PIXELS:,} pixels, found {width}×{height}")
    if image.format not in _JPEG:
        # No saving to be had; and the orientation may come behind the pixels.
        image.load()
    return image


def _orientation(image: ImageFile.ImageFile) -> _Turn:
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1), _TURNS[1])
    except Exception:
        # Notes about a picture, damaged: the picture itself is still good.
        return _TURNS[1]


def _decoded(image: ImageFile.ImageFile, boxes: Sequence[Box], size: int) -> tuple[Image.Image, int]:
    """The picture, grey or RGB, and by how much it is reduced."""
    reduction = 1
    if image.format in _JPEG:
        smallest = min((min(box.width, box.height) for box in boxes), default=0)
        reduction = next((by for by in REDUCTIONS if smallest >= by * size), 1)
        if reduction > 1:
            image.draft(None, (image.width // reduction, image.height // reduction))
        image.load()
    return _grey_or_rgb(image), reduction


def _grey_or_rgb(image: Image.Image) -> Image.Image:
    """Eight bits a channel; grey stays one channel, which is less to resize."""
    if image.mode in ("RGB", "L"):
        return image
    if image.mode.startswith("I;16"):
        # Pillow's own conversion would cut off at 255.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("expected 8 or 16 bits a channel, found 32, which have no known white")
    # Dropped here, as Pillow does not convert without a warning about it.
    image.info.pop("transparency", None)
    return image.convert("L" if image.mode in ("1", "LA") else "RGB")


def _resized(pixels: Image.Image, boxes: Sequence[Box], size: int) -> list[np.ndarray]:
    """Each box as uint8 of shape (bands, size, size)."""
    by_scale: defaultdict[tuple[float, float], list[Box]] = defaultdict(list)
    for box in dict.fromkeys(boxes):
        by_scale[box.width, box.height].append(box)
    found: dict[Box, np.ndarray] = {}
    for members in by_scale.values():
        found.update(zip(members, _windows(pixels, members, size), strict=True))
    return [found[box] for box in boxes]


def _windows(pixels: Image.Image, boxes: Sequence[Box], size: int) -> list[np.ndarray]:
    """Boxes of one width and height: cut from one resized picture where they lie on its pixels."""
    left, top = min(box.left for box in boxes), min(box.top for box in boxes)
    step_x, step_y = boxes[0].width / size, boxes[0].height / size
    places = [((box.left - left) / step_x, (box.top - top) / step_y) for box in boxes]
    corners = [(round(x), round(y)) for x, y in places]
    width, height = (size + max(corner[axis] for corner in corners) for axis in (0, 1))
    off = max(
        abs(at - to)
        for place, corner in zip(places, corners, strict=True)
        for at, to in zip(place, corner, strict=True)
    )
    # Of a very long image the windows may be far apart.
    if off > _SLACK or width * height > len(boxes) * size * size:
        return [_planes(pixels, box, size, size) for box in boxes]
    whole = _planes(pixels, Box(left, top, width * step_x, height * step_y), width, height)
    return [whole[:, y : y + size, x : x + size] for x, y in corners]


def _planes(pixels: Image.Image, box: Box, width: int, height: int) -> np.ndarray:
    """One box, resized: uint8 of shape (bands, height, width)."""
    edges = (
        max(box.left, 0.0),
        max(box.top, 0.0),
        min(box.left + box.width, pixels.width),
        min(box.top + box.height, pixels.height),
    )
    small = pixels.resize((width, height), Image.Resampling.BILINEAR, edges, _REDUCING_GAP)
    array = np.asarray(small)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _check_inside(box: Box, width: int, height: int) -> None:
    left, top, across, down = box
    inside = -_SLACK <= left <= left + across <= width + _SLACK
    inside &= -_SLACK <= top <= top + down <= height + _SLACK
    if not (inside and across > 0 and down > 0):
        raise ValueError(f"a crop must lie within the {width}×{height} picture, got {box}.")
