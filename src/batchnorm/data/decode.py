"""Crops of compressed images: no more pixels are decoded, turned or converted than a crop needs.

Boxes are in pixels of the upright picture (`data.crops`). The stored picture may lie on its side: boxes
are laid upon it as it is, and the small results are turned.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

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

SLACK = 1e-6
"""Rounding of coordinates, pixels."""

SPARE_ROWS = 16
"""Decoded below the lowest box: chroma is interpolated from a few rows further down."""

SPARE_AREA = 3
"""A picture is resized whole for its windows unless that is more than this often their area."""


_BEFORE_FRAME = {0xC4, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE}
"""Markers of tables, of the restart interval, of applications and comments."""


class BadImage(ValueError):
    """These bytes are no picture, or not all of it."""


def read_crop(
    data: bytes, choose: Callable[[int, int], Crop | Box], size: int, *, name: str = ""
) -> np.ndarray:
    """Decode one crop of an image; see `read_crops` for how.

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
    """
    return read_crops(data, lambda width, height: [choose(width, height)], size, name=name)[0]


def read_crops(
    data: bytes, choose: Callable[[int, int], Sequence[Crop | Box]], size: int, *, name: str = ""
) -> np.ndarray:
    """Decode several crops of an image, whose bytes are decoded once.

    Resizing is bilinear with antialiasing. A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where every
    crop has at least `size` pixels left on its sides, and not below the lowest box. Windows of one
    resized picture share its resizing.

    EXIF orientation is obeyed. Grey, CMYK and palette pictures become RGB; transparency is dropped,
    of 16 bits the upper eight are kept, of several frames the first.

    Args:
        data: The file's content.
        choose: Given the upright picture's width and height, returns what to cut. A `Box` is cut out
            and then resized; pixels that its fractions cut through, and their neighbours, count there.
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
        turn = _turn(image)
    width, height = image.size[::-1] if turn.swap else image.size
    crops = [chosen if isinstance(chosen, Crop) else Crop(chosen) for chosen in choose(width, height)]
    for crop in crops:
        _check_inside(crop.box, width, height)
    stored = [turn.stored(crop, *image.size) for crop in crops]
    with _blamed(name):
        picture = _decoded(image, data, stored, size)
    result = np.empty((len(crops), 3, size, size), np.uint8)
    for out, crop, pixels in zip(result, crops, _resized(picture, stored, size), strict=True):
        # Grey pictures have one channel, which assignment repeats.
        out[:] = turn.upright(pixels, crop.mirrored)
    return result


class _Turn(NamedTuple):
    """How the stored picture becomes upright: mirrored within its axes, then axes swapped."""

    swap: bool
    flip_x: bool
    flip_y: bool

    def stored(self, crop: Crop, width: int, height: int) -> Crop:
        """Where a crop of the upright picture lies in the stored one, of `width` × `height`; not mirrored."""
        (left, top, across, down), _, resized = crop
        if self.swap:
            left, top, across, down = top, left, down, across
            resized = resized and resized[::-1]
        if self.flip_x:
            left = width - left - across
        if self.flip_y:
            top = height - top - down
        return Crop(Box(left, top, across, down), False, resized)

    def upright(self, pixels: np.ndarray, mirrored: bool) -> np.ndarray:
        """A view of stored pixels, (bands, rows, columns), as a viewer sees them."""
        pixels = pixels[:, :: -1 if self.flip_y else 1, :: -1 if self.flip_x else 1]
        if self.swap:
            pixels = pixels.swapaxes(1, 2)
        return pixels[:, :, ::-1] if mirrored else pixels


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


class _Picture(NamedTuple):
    """A decoded picture, eight bits a channel, grey or RGB."""

    pixels: Image.Image
    reduction: int
    width: float
    """Of what it shows, in its own pixels; the last of a reduced picture may show less than a whole one."""
    height: float


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
        what = str(error).rstrip(". ") or type(error).__name__
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
    if image.format not in ("JPEG", "MPO"):
        # There is nothing to save, and the orientation may come behind the pixels.
        image.load()
    return image


def _turn(image: ImageFile.ImageFile) -> _Turn:
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1), _TURNS[1])
    except Exception:
        # Notes about a picture, damaged: the picture itself is still good.
        return _TURNS[1]


def _decoded(image: ImageFile.ImageFile, data: bytes, crops: Sequence[Crop], size: int) -> _Picture:
    width, height = image.size
    reduction = 1
    if image.format in ("JPEG", "MPO"):
        smallest = min((min(box.width, box.height) for box, _, _ in crops), default=0)
        reduction = next((by for by in REDUCTIONS if smallest >= by * size), 1)
        if image.format == "JPEG" and not any(crop.resized for crop in crops):
            image = _without_rows_below(image, data, crops, size)
        if reduction > 1:
            image.draft(None, (image.width // reduction, image.height // reduction))
        image.load()
    return _Picture(_grey_or_rgb(image), reduction, width / reduction, height / reduction)


def _without_rows_below(
    image: ImageFile.ImageFile, data: bytes, crops: Sequence[Crop], size: int
) -> ImageFile.ImageFile:
    """The same JPEG, told to be no higher than its crops need: its decoder stops there.

    Nothing is changed where it would hide a cut: only the end of the image proves that all is there.
    """
    # Resizing looks one pixel of the result further.
    lowest = max((box.top + box.height * (1 + 1 / size) for box, _, _ in crops), default=0)
    rows = int(lowest) + 1 + SPARE_ROWS
    at = _height_field(data)
    if rows >= image.height or at is None or not data.endswith(b"\xff\xd9"):
        return image
    shorter = BytesIO(data)
    shorter.seek(at)
    shorter.write(rows.to_bytes(2, "big"))
    shorter.seek(0)
    return Image.open(shorter, formats=("JPEG",))


def _height_field(data: bytes) -> int | None:
    """Where a baseline JPEG notes its height; None in other kinds. Source: ITU-T T.81, annex B."""
    at = 2
    while at + 9 < len(data) and data[at] == 0xFF and data[at + 1] in _BEFORE_FRAME:
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return at + 5 if data[at : at + 2] == b"\xff\xc0" else None


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


def _resized(picture: _Picture, crops: Sequence[Crop], size: int) -> list[np.ndarray]:
    """Each crop as uint8 of shape (bands, size, size)."""
    found: dict[Crop, np.ndarray] = {}
    for resized in dict.fromkeys(crop.resized for crop in crops):
        members = [crop for crop in dict.fromkeys(crops) if crop.resized == resized]
        if resized is None:
            found |= {crop: _cut(picture, crop.box, size) for crop in members}
        else:
            windows = _windows(picture, resized, [crop.box for crop in members], size)
            found |= zip(members, windows, strict=True)
    return [found[crop] for crop in crops]


def _windows(
    picture: _Picture, resized: tuple[int, int], boxes: Sequence[Box], size: int
) -> list[np.ndarray]:
    """Windows of the picture resized."""
    width, height = resized
    step_x, step_y = picture.width / width, picture.height / height
    by = picture.reduction
    corners = [(round(left / by / step_x), round(top / by / step_y)) for left, top, _, _ in boxes]
    if width * height <= SPARE_AREA * len(boxes) * size**2:
        whole = _resize(picture.pixels, (0, 0, picture.width, picture.height), width, height)
        return [whole[:, y : y + size, x : x + size] for x, y in corners]
    edges = [(x * step_x, y * step_y, (x + size) * step_x, (y + size) * step_y) for x, y in corners]
    return [_resize_within(picture.pixels, box, size, size) for box in edges]


def _cut(picture: _Picture, box: Box, size: int) -> np.ndarray:
    left, top, across, down = (side / picture.reduction for side in box)
    return _resize(picture.pixels, (left, top, left + across, top + down), size, size)


def _resize(
    pixels: Image.Image, edges: tuple[float, float, float, float], width: int, height: int
) -> np.ndarray:
    """Cut at these edges (left, top, right, bottom) and resized: uint8 of shape (bands, height, width)."""
    left, top, right, bottom = (round(edge) for edge in edges)
    if any(abs(a - b) > SLACK for a, b in zip(edges, (left, top, right, bottom), strict=True)):
        return _resize_within(pixels, edges, width, height)
    cut = pixels.crop((left, top, right, bottom))
    if cut.mode == "L" or cut.size == (width, height):
        return _resize_within(cut, (0, 0, *cut.size), width, height)
    # PyTorch resizes bytes in vector instructions, twice as fast as Pillow; pixels of four bytes, as they
    # lie in Pillow's memory, are the quickest for both.
    source = np.frombuffer(cut.tobytes("raw", "RGBX"), np.uint8).reshape(1, cut.height, cut.width, 4)
    tensor = torch.from_numpy(source.copy()).permute(0, 3, 1, 2)
    return F.interpolate(tensor, (height, width), mode="bilinear", antialias=True)[0, :3].numpy()


def _resize_within(
    pixels: Image.Image, edges: tuple[float, float, float, float], width: int, height: int
) -> np.ndarray:
    """As `_resize`, for edges anywhere; pixels outside, as far as the filter reaches, count too."""
    left, top, right, bottom = edges
    inside = (max(left, 0.0), max(top, 0.0), min(right, pixels.width), min(bottom, pixels.height))
    array = np.asarray(pixels.resize((width, height), Image.Resampling.BILINEAR, inside))
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _check_inside(box: Box, width: int, height: int) -> None:
    left, top, across, down = box
    inside = -SLACK <= left <= left + across <= width + SLACK
    inside &= -SLACK <= top <= top + down <= height + SLACK
    if not (inside and across > 0 and down > 0):
        raise ValueError(f"a crop must lie within the {width}×{height} picture, got {box}.")
