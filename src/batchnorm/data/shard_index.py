"""Where the images of a tar shard lie, and their labels: found by its headers, kept in a file beside it."""

import json
import os
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from batchnorm import files
from batchnorm.data.names import IMAGE_SUFFIXES, listing
from batchnorm.reading import parse_json, read_json

FORMAT = 1
BLOCK = tarfile.BLOCKSIZE
MAX_INDEX_BYTES = 1 << 30
"""Of the index of one shard: some hundred bytes an image."""
MAX_LABEL_BYTES = 1 << 20
"""Of a .cls, or of a .json that has the label among other things."""


@dataclass(frozen=True)
class ShardIndex:
    """The images of one shard in the order of the file; the four have the same length."""

    names: list[str]
    """Member names with their ending."""
    offsets: list[int]
    """First byte of each image in the shard."""
    sizes: list[int]
    """Bytes of each image."""
    labels: list[int]


def index_path(shard: Path) -> Path:
    """Where the index of a shard is kept."""
    return shard.with_name(f"{shard.name}.index.json")


def load_index(shard: Path) -> ShardIndex:
    """The index kept beside the shard if it fits, else one made by scanning; nothing is written.

    Raises:
        As `scan_shard`.
    """
    kept = read_index(shard)
    return scan_shard(shard) if kept is None else kept[0]


def read_index(shard: Path) -> tuple[ShardIndex, dict[str, Any]] | None:
    """The index beside the shard with what else was written there; None if it is not this shard's.

    It fits while the shard has the size and the time of modification that it had when it was indexed.
    """
    try:
        written = read_json(index_path(shard), MAX_INDEX_BYTES)
        state = shard.stat()
        if (written["format"], written["bytes"], written["mtime_ns"]) != (
            FORMAT,
            state.st_size,
            state.st_mtime_ns,
        ):
            return None
        index = ShardIndex(*(written[name] for name in ("names", "offsets", "sizes", "labels")))
        numbers = [*index.offsets, *index.sizes, *index.labels]
        lengths = {len(index.names), len(index.offsets), len(index.sizes), len(index.labels)}
        if len(lengths) > 1 or not all(type(number) is int and number >= 0 for number in numbers):
            return None
        if not all(type(name) is str for name in index.names):
            return None
        # What it says lies beyond the end would be asked for, whatever its size.
        ends = zip(index.offsets, index.sizes, strict=True)
        if any(offset + size > state.st_size for offset, size in ends):
            return None
        return index, written
    # It is a convenience: whatever is wrong with it, the shard itself tells what it would have told.
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_index(shard: Path, index: ShardIndex, facts: Mapping[str, Any]) -> None:
    """Keep the index beside the shard as it is now, with further facts."""
    state = shard.stat()
    written = {
        "format": FORMAT,
        "bytes": state.st_size,
        "mtime_ns": state.st_mtime_ns,
        **facts,
        "names": index.names,
        "offsets": index.offsets,
        "sizes": index.sizes,
        "labels": index.labels,
    }
    files.write_bytes(index_path(shard), json.dumps(written).encode() + b"\n")


def scan_shard(shard: Path) -> ShardIndex:
    """Read the headers and labels of a shard, and check that it is whole.

    A sample is the members that share a name up to its first point, as webdataset has it: one image, and
    its label as a decimal number in ``KEY.cls`` or as ``label`` in ``KEY.json``. The rest is passed over.

    Args:
        shard: An uncompressed tar file.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is cut off, damaged, compressed, has two images of one key, an image without a
            label, a label without an image, or a label that is no number from 0 on.
    """
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, tarfile.TarInfo] = {}
    others: dict[str, tarfile.TarInfo] = {}
    with open(shard, "rb") as file:
        descriptor = file.fileno()
        expect_leaps(descriptor)
        for member in _members(shard, file):
            folder, slash, name = member.name.rpartition("/")
            stem, _, ending = name.partition(".")
            if not stem or not member.isreg():
                continue
            ending = f".{ending.lower()}"
            kind = images if ending in IMAGE_SUFFIXES else {".cls": labels, ".json": others}.get(ending)
            if kind is None:
                continue
            key = folder + slash + stem
            if (first := kind.setdefault(key, member)) is not member:
                raise ValueError(
                    f"{shard}: the key {key} comes twice, as {first.name} at offset {first.offset} and as "
                    f"{member.name} at offset {member.offset}. Keys must be unique in a shard: pack it again."
                )
        if without := [key for key in labels if key not in images]:
            raise ValueError(
                f"{shard}: {listing(without)} ({len(without)} labels) without an image. "
                f"Images end in {', '.join(sorted(IMAGE_SUFFIXES))}: pack the shard again."
            )
        found = [_label(shard, descriptor, key, labels.get(key), others.get(key)) for key in images]
    members = images.values()
    return ShardIndex(
        [member.name for member in members],
        [member.offset_data for member in members],
        [member.size for member in members],
        found,
    )


def expect_leaps(descriptor: int) -> None:
    """Tell the system not to read ahead: what comes next in an open shard is not what is read next."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)


def _members(shard: Path, file: Any) -> list[tarfile.TarInfo]:
    """All members; tarfile itself takes a damaged header in the middle, and a missing end, for the end."""
    size = os.fstat(file.fileno()).st_size
    if os.pread(file.fileno(), 2, 0) == b"\x1f\x8b":
        raise ValueError(f"{shard} is compressed, so that nothing in it can be found: unpack it with gunzip.")
    members: list[tarfile.TarInfo] = []
    last = None
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.offset_data + member.size > size:
                    _refuse_cut(
                        shard, size, member.offset, f"{member.name} needs {member.size} bytes of data"
                    )
                members.append(member)
                last = member
            end = tar.offset
    except tarfile.TarError as error:
        offset = 0 if last is None else _after(last)
        if offset >= size:
            _refuse_cut(shard, size, offset, "there should be an end mark or another member")
        _refuse_damaged(shard, offset, str(error))
    mark = os.pread(file.fileno(), BLOCK, end)
    if len(mark) < BLOCK:
        _refuse_cut(shard, size, end, "there should be an end mark or another member")
    if any(mark):
        _refuse_damaged(shard, end, "neither a header nor an end mark")
    return members


def _after(member: tarfile.TarInfo) -> int:
    return member.offset_data + -(-member.size // BLOCK) * BLOCK


def _refuse_cut(shard: Path, size: int, offset: int, missing: str) -> NoReturn:
    raise ValueError(
        f"{shard} is cut off: it ends after {size} bytes, but at offset {offset} {missing}. "
        "Copy it again, or delete it and have it packed again."
    ) from None


def _refuse_damaged(shard: Path, offset: int, reason: str) -> NoReturn:
    raise ValueError(
        f"{shard} is no intact tar file: at offset {offset} there is a bad header ({reason}). "
        "Copy it again, or delete it and have it packed again."
    ) from None


def _label(
    shard: Path, descriptor: int, key: str, plain: tarfile.TarInfo | None, described: tarfile.TarInfo | None
) -> int:
    member = plain or described
    if member is None:
        raise ValueError(
            f"{shard}: {key} has no label: neither {key}.cls, which holds a number, nor {key}.json with "
            '"label". Pack the shard again.'
        )
    content = os.pread(descriptor, min(member.size, MAX_LABEL_BYTES), member.offset_data)
    try:
        if member.size > MAX_LABEL_BYTES:
            raise ValueError("too long")
        label = int(content) if plain else parse_json(content)["label"]
        if type(label) is not int or label < 0:
            raise ValueError(label)
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{shard}: {member.name} should give the label of {key}, a whole number from 0 on, "
            f"and holds {content[:40]!r}. Pack the shard again."
        ) from None
    return label
