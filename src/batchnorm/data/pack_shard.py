"""One tar shard: written from the images of a folder, then read again and compared with them."""

import hashlib
import io
import mmap
import os
import re
import tarfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from batchnorm.data.folders import ImageFolder
from batchnorm.data.shard_index import ShardIndex, scan_shard

KEY_LETTERS = 80
"""Letters of an image's path that its key repeats; the format has room for a hundred in a name."""


@dataclass(frozen=True)
class Member:
    """An image as it was put into a shard."""

    name: str
    label: int
    sha256: bytes
    source: str


def write_shard(
    path: Path, folder: ImageFolder, numbers: Iterable[int], skip: Callable[[str], None]
) -> list[Member]:
    """Write the images of these numbers, and force them to the disk.

    Args:
        path: The file, replaced if it is there.
        folder: Has the images.
        numbers: Which, in this order.
        skip: Called with name and reason for each that is no image by its header.

    Returns:
        What was written, in order.

    Raises:
        OSError: The disk refused.
    """
    written = []
    with open(path, "wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for number in numbers:
                name, label = folder.name(number), int(folder.labels[number])
                try:
                    data = _read_image(folder, number)
                except _NoImage as error:
                    skip(f"{name}: {error}")
                    continue
                key, suffix = _key(number, folder.relative(number))
                _add(tar, key + suffix, data)
                _add(tar, f"{key}.cls", str(label).encode())
                written.append(Member(key + suffix, label, hashlib.sha256(data).digest(), name))
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            # So that verifying reads what the disk holds, not what memory remembers.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return written


def verify_shard(path: Path, written: Sequence[Member]) -> tuple[ShardIndex, str]:
    """Read the shard and compare every image with what was to be written.

    Returns:
        The shard's index, and the sha256 of the whole file.

    Raises:
        OSError: Something differs.
    """
    index = scan_shard(path)
    if index.names != [member.name for member in written]:
        raise OSError(f"{path}: other members were read than written. {CURE}")
    places = zip(written, index.offsets, index.sizes, index.labels, strict=True)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for member, offset, size, label in places:
            same = hashlib.sha256(content[offset : offset + size]).digest() == member.sha256
            if not same or label != member.label:
                raise OSError(f"{path}: {member.name} differs from {member.source} after writing. {CURE}")
        return index, hashlib.file_digest(file, "sha256").hexdigest()


CURE = "Check the disk and the memory of this machine, then give the same command again"


class _NoImage(ValueError):
    """This file cannot be packed."""


def _read_image(folder: ImageFolder, number: int) -> bytes:
    from PIL import Image

    from batchnorm.data.decode import FORMATS

    try:
        data = folder.read(number)
    except OSError as error:
        raise _NoImage(f"cannot be read ({error.strerror})") from error
    if not data:
        raise _NoImage("an empty file, expected a picture")
    try:
        with warnings.catch_warnings():
            # The decoder refuses such a size too.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS):
                return data
    except MemoryError:
        raise
    except Image.UnidentifiedImageError:
        known = ", ".join(FORMATS)
        raise _NoImage(f"expected a picture ({known}), found what begins with {data[:12]!r}") from None
    except Exception as error:
        raise _NoImage(f"a damaged header ({error})") from error


def _key(number: int, relative: str) -> tuple[str, str]:
    """A name without points, unique by its number and still telling where the image comes from."""
    stem, suffix = os.path.splitext(relative)
    suffix = suffix.lower()
    readable = re.sub(r"[^A-Za-z0-9_-]+", "_", stem)[-KEY_LETTERS:]
    return f"{number:08d}-{readable}", ".jpg" if suffix == ".jpeg" else suffix


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    # Time and owner stay zero: equal images make equal shards.
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
