"""Image sets in tar shards: any image by its number, at the cost of one read.

The format is webdataset's (members ``KEY.jpg`` and ``KEY.cls``); its library is not used. That one reads
shards as streams: the order is what comes out of a shuffling buffer, depends on the number of workers, and
cannot be taken up in the middle. Here each image has a number and is read from where it lies, so that the
order is a function of a seed, the same for any number of workers, and resuming costs nothing.
"""

import os
import re
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from batchnorm.data.names import Names, listing
from batchnorm.data.shard_index import expect_leaps, load_index
from batchnorm.reading import read_json

CLASSES_FILE, MANIFEST_FILE = "classes.json", "shards.json"
MAX_OPEN = 64
"""Shards that one process keeps open; the usual limit is 1024 files a process, whatever else it has open."""
MAX_SHARDS = 1_000_000
"""That a pattern may stand for."""
NUM_SCANNERS = 8
"""Threads that read headers: they wait for the disk, not for each other."""


def is_shard_pattern(source: str | Path) -> bool:
    """Whether this names shards rather than a folder."""
    return "{" in str(source) or str(source).endswith(".tar")


def open_shards(source: str | Path, val: str | Path | None = None) -> tuple["ImageShards", "ImageShards"]:
    """The training and the validation shards.

    Args:
        source: A folder with ``train-*.tar`` and ``val-*.tar``, or the training shards as
            ``…/train-{000000..000146}.tar``.
        val: The validation shards; by default those named as the training shards, with ``val`` for ``train``.

    Raises:
        FileNotFoundError: A shard is missing, or there are none.
        ValueError: The pattern is not understood, the packing was not finished, or a shard is bad.
    """
    if is_shard_pattern(source):
        folder = Path(source).expanduser().parent
        train_paths = expand(source)
        val_paths = expand(val) if val is not None else _numbered(folder, _val_name(Path(source).name))
    else:
        folder = Path(source).expanduser()
        train_paths = _numbered(folder, ("train-", ".tar"))
        val_paths = expand(val) if val is not None else _numbered(folder, ("val-", ".tar"))
    _check_manifest(
        folder, None if is_shard_pattern(source) else train_paths, val_paths if val is None else None
    )
    classes = _classes(folder)
    train = ImageShards(train_paths, classes)
    return train, ImageShards(val_paths, train.classes)


def expand(pattern: str | Path) -> list[Path]:
    """The paths that ``name-{000000..000146}.tar`` stands for; without braces the path itself.

    Raises:
        ValueError: There is something else between the braces.
    """
    text = str(Path(pattern).expanduser())
    if "{" not in text:
        return [Path(text)]
    match = re.fullmatch(r"([^{}]*)\{(\d+)\.\.(\d+)\}([^{}]*)", text)
    if match is None or int(match[2]) > int(match[3]):
        raise ValueError(
            f"{pattern} is not understood: shards are named as train-{{000000..000146}}.tar, with one range "
            "of numbers from the first to the last."
        )
    before, first, last, after = match.groups()
    if int(last) - int(first) >= MAX_SHARDS:
        raise ValueError(
            f"{pattern} stands for more than {MAX_SHARDS:,} shards: correct the range of numbers."
        )
    return [Path(f"{before}{number:0{len(first)}}{after}") for number in range(int(first), int(last) + 1)]


class ImageShards:
    """The images of some tar files, numbered in the order of the files and within each.

    Can be pickled into workers; each process opens its own files, when it first reads from them. Not
    for several threads at once.

    Args:
        paths: The shards, uncompressed tar files.
        classes: Name of each label; ``None`` names them by their numbers, up to the largest.

    Raises:
        FileNotFoundError: A shard is missing.
        ValueError: A shard is bad (see `scan_shard`), a label out of range, or there is no image at all.
    """

    def __init__(self, paths: Sequence[str | Path], classes: Sequence[str] | None = None) -> None:
        self.paths = tuple(Path(path) for path in paths)
        if missing := [str(path) for path in self.paths if not path.is_file()]:
            raise FileNotFoundError(
                f"{len(missing)} of {len(self.paths)} shards are missing: {listing(missing)}. "
                "Fetch or pack them, or correct the range of numbers."
            )
        with ThreadPoolExecutor(NUM_SCANNERS) as pool:
            indexes = list(pool.map(load_index, self.paths))
        self._bounds = np.cumsum([0, *(len(index.names) for index in indexes)], dtype=np.int64)
        if self._bounds[-1] == 0:
            raise ValueError(f"No image in {listing([str(path) for path in self.paths])}.")
        # A shard of skipped images alone is none.
        self.shards = np.unique(self._bounds)
        self._names = Names(name for index in indexes for name in index.names)
        self._offsets, self._sizes, self.labels = (
            np.array([value for index in indexes for value in getattr(index, column)], dtype=np.int64)
            for column in ("offsets", "sizes", "labels")
        )
        if classes is None:
            classes = [str(label) for label in range(int(self.labels.max()) + 1)]
        self.classes = tuple(classes)
        self._check_labels()
        self._open: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """The shard's path and the member's name."""
        return f"{self.paths[self._shard(index)]}:{self._names[index]}"

    def read(self, index: int) -> bytes:
        """The encoded image."""
        size, offset = int(self._sizes[index]), int(self._offsets[index])
        data = os.pread(self._descriptor(self._shard(index)), size, offset)
        if len(data) < size:
            raise OSError(
                f"{self.name(index)}: {size} bytes expected at offset {offset}, {len(data)} found: "
                "the shard was cut off after it was opened"
            )
        return data

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __del__(self) -> None:
        # After a failed construction there is none.
        for descriptor in self.__dict__.get("_open", {}).values():
            os.close(descriptor)

    def _shard(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        return int(np.searchsorted(self._bounds, index, side="right")) - 1

    def _descriptor(self, shard: int) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if len(self._open) >= MAX_OPEN:
            os.close(self._open.popitem(last=False)[1])
        descriptor = os.open(self.paths[shard], os.O_RDONLY)
        expect_leaps(descriptor)
        self._open[shard] = descriptor
        return descriptor

    def _check_labels(self) -> None:
        wrong = np.flatnonzero(self.labels >= len(self.classes))
        if len(wrong):
            named = listing([f"{self.name(int(number))} (label {self.labels[number]})" for number in wrong])
            raise ValueError(
                f"{len(wrong)} labels are out of range: {named}. There are {len(self.classes)} classes, so "
                f"labels go from 0 to {len(self.classes) - 1}: correct {CLASSES_FILE} or pack again."
            )


def _val_name(train: str) -> tuple[str, str]:
    """What stands before and after the number in the names of the validation shards."""
    match = re.fullmatch(r"([^{}]*?)(?:\{.*\}|\d*)(\.tar)", train)
    if match is None or "train" not in match[1]:
        raise ValueError(
            f"The validation shards of {train} cannot be guessed, as its name does not say train: "
            "name them too."
        )
    before, _, after = match[1].rpartition("train")
    return f"{before}val{after}", match[2]


def _numbered(folder: Path, name: tuple[str, str]) -> list[Path]:
    """All files ``BEFORE<digits>AFTER`` by their numbers, which must have no gap."""
    pattern = re.compile(rf"{re.escape(name[0])}(\d+){re.escape(name[1])}")
    found = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        if match := pattern.fullmatch(path.name):
            found[int(match[1])] = path
    if not found:
        raise FileNotFoundError(
            f"There are no shards {folder / '*'.join(name)}: pack them, or correct the name."
        )
    # Some count from one.
    numbers = range(min(1, min(found)), max(found))
    if missing := [str(number) for number in numbers if number not in found]:
        raise FileNotFoundError(
            f"Of the shards {folder / '*'.join(name)}, numbers {listing(missing)} are missing "
            f"(the last is {found[max(found)].name}): fetch or pack them."
        )
    return [found[number] for number in sorted(found)]


def _check_manifest(folder: Path, train: Sequence[Path] | None, val: Sequence[Path] | None) -> None:
    """What `batchnorm shards` says of its work: that it is finished, and which shards there are."""
    try:
        manifest = read_json(folder / MANIFEST_FILE)
        finished = manifest["finished"]
        names = {
            part: [str(shard["name"]) for shard in manifest.get(part, {}).get("shards", ())]
            for part in ("train", "val")
        }
        if finished and not all(names.values()):
            raise ValueError("it names no shards")
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder / MANIFEST_FILE} is damaged ({error!r}): delete it, or pack the shards again."
        ) from error
    if not finished:
        raise ValueError(
            f"{folder} is not packed to the end: give the same batchnorm shards command again, which goes on."
        )
    for part, paths in (("train", train), ("val", val)):
        if paths is not None:
            there = {path.name for path in paths}
            if missing := [name for name in names[part] if name not in there]:
                raise FileNotFoundError(
                    f"{folder} lacks {listing(missing)}, which its {MANIFEST_FILE} names: fetch or pack them."
                )


def _classes(folder: Path) -> list[str] | None:
    path = folder / CLASSES_FILE
    try:
        classes = read_json(path)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(
            f"{path} is no JSON ({error}): it should be a list of the classes' names."
        ) from error
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"{path} should be a list of the classes' names, in the order of their labels.")
    return classes
