"""A folder of images into tar shards: one shard at a time, each verified, so that it can stop and go on."""

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from batchnorm import files
from batchnorm.data.folders import PER_SHARD, ImageFolder, open_folder
from batchnorm.data.names import listing
from batchnorm.data.pack_shard import verify_shard, write_shard
from batchnorm.data.shard_index import BLOCK, read_index, write_index
from batchnorm.data.shards import CLASSES_FILE, MANIFEST_FILE
from batchnorm.reading import read_json

FORMAT = 1
LOCK_FILE = "shards.lock"
MAX_BAD = 0.01
"""Share of images that may be left out."""


@dataclass(frozen=True)
class PackedPart:
    """The shards of the training or of the validation images."""

    num_images: int
    shards: tuple[Path, ...]
    num_bytes: int
    num_kept: int
    """Shards that an earlier call had finished."""
    skipped: tuple[str, ...]
    """Images that are not in the shards: path and reason."""


@dataclass(frozen=True)
class Packed:
    """What lies in the folder now."""

    out: Path
    classes: tuple[str, ...]
    train: PackedPart
    val: PackedPart


def pack(
    source: str | Path,
    out: str | Path,
    *,
    per_shard: int = PER_SHARD,
    shard_bytes: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Packed:
    """Pack ``source/train`` and ``source/val`` into ``out/train-000000.tar`` and so on.

    The order of the images is permuted by ``seed``, so that every shard holds all classes. Each shard
    is written beside its place, forced to the disk, read again, compared with the source image by
    image, and renamed; beside it lies its index. Shards that an earlier call finished are kept.

    A file that is no image by its header is left out and named.

    Args:
        source: Folder with ``train/CLASS/IMAGE`` and ``val/CLASS/IMAGE``.
        out: New or empty, or where an earlier call with the same arguments was stopped.
        per_shard: Images of a shard.
        shard_bytes: Close a shard before it has more bytes than this, instead.
        seed: Of the order.
        progress: Draw a bar on standard error when that is a terminal.

    Returns:
        What was packed, kept and left out.

    Raises:
        FileNotFoundError: The source is not such a folder.
        ValueError: As `ImageFolder`; or ``out`` holds something else; or more than 1 % of the images are bad.
        BlockingIOError: Another process packs there.
        OSError: The disk refused, or returned something else than what was written; the shards finished
            so far are whole.
    """
    if shard_bytes is not None and shard_bytes < 1:
        raise ValueError(f"shard_bytes must be at least 1 byte, got {shard_bytes}.")
    source, out = Path(source), Path(out)
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is not a folder. Give one with train/CLASS/ and val/CLASS/.")
    train, val = open_folder(source, seed=seed, per_shard=per_shard)
    plans = [_Plan.of(part, folder, shard_bytes) for part, folder in (("train", train), ("val", val))]
    digest = hashlib.sha256("".join(plan.digest for plan in plans).encode()).hexdigest()
    packing = {
        "seed": seed,
        "per_shard": None if shard_bytes else per_shard,
        "shard_bytes": shard_bytes,
        "num_train": len(train),
        "num_val": len(val),
        "sha256": digest,
    }
    with _told(out), _held(out):
        _claim(out, packing)
        files.write_json(out / CLASSES_FILE, list(train.classes))
        with _bar(len(train) + len(val), shown=progress) as advance:
            packers = [_Packer(out, plan, digest, advance).run() for plan in plans]
        manifest = {"format": FORMAT, "finished": True, "packing": packing, "classes": list(train.classes)}
        parts = {packer.plan.part: packer.manifest() for packer in packers}
        files.write_json(out / MANIFEST_FILE, manifest | parts)
    return Packed(out, train.classes, *(packer.report() for packer in packers))


@dataclass(frozen=True)
class _Plan:
    """Which images go into which shard."""

    part: str
    folder: ImageFolder
    bounds: np.ndarray
    """First image of each shard, and the number of images."""
    digest: str
    """Changes when any name, size, label or bound does."""

    @classmethod
    def of(cls, part: str, folder: ImageFolder, shard_bytes: int | None) -> "_Plan":
        sizes = [_size(folder.name(number)) for number in range(len(folder))]
        bounds = folder.shards if shard_bytes is None else _bounds(sizes, shard_bytes)
        digest = hashlib.sha256(json.dumps([folder.classes, bounds.tolist()]).encode())
        for number, size in enumerate(sizes):
            digest.update(os.fsencode(f"{folder.relative(number)}\0{size}\0"))
        return cls(part, folder, bounds, digest.hexdigest())


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        # Reading it will tell why, and leave it out.
        return 0


def _bounds(sizes: Sequence[int], shard_bytes: int) -> np.ndarray:
    bounds, filled = [0], 2 * BLOCK
    for number, size in enumerate(sizes):
        # A header and whole blocks of data, for the image and for its label.
        needed = 3 * BLOCK + -(-size // BLOCK) * BLOCK
        if filled + needed > shard_bytes and number > bounds[-1]:
            bounds.append(number)
            filled = 2 * BLOCK
        filled += needed
    return np.array([*bounds, len(sizes)], dtype=np.int64)


@dataclass
class _Packer:
    out: Path
    plan: _Plan
    digest: str
    advance: Callable[[int], None]
    shards: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    num_kept: int = 0

    def run(self) -> "_Packer":
        """Make all shards that are not there."""
        bounds = self.plan.bounds.tolist()
        for shard, (first, end) in enumerate(pairwise(bounds)):
            path = self.out / f"{self.plan.part}-{shard:06d}.tar"
            kept = read_index(path)
            if kept is not None and kept[1].get("packing") == self.digest:
                self.num_kept += 1
                facts = kept[1]
                for reason in facts["skipped"]:
                    self._skip(reason)
                self.advance(end - first)
            else:
                facts = self._make(path, range(first, end))
            num_images, size = end - first - len(facts["skipped"]), path.stat().st_size
            self.shards.append(
                {"name": path.name, "images": num_images, "bytes": size, "sha256": facts["sha256"]}
            )
        return self

    def manifest(self) -> dict[str, Any]:
        """What is kept in the manifest."""
        images = sum(shard["images"] for shard in self.shards)
        return {"images": images, "shards": self.shards, "skipped": self.skipped}

    def report(self) -> PackedPart:
        """What the caller is told."""
        return PackedPart(
            sum(shard["images"] for shard in self.shards),
            tuple(self.out / shard["name"] for shard in self.shards),
            sum(shard["bytes"] for shard in self.shards),
            self.num_kept,
            tuple(self.skipped),
        )

    def _make(self, path: Path, numbers: range) -> dict[str, Any]:
        partial = path.with_name(f".{path.name}{files.PARTIAL}")
        num_skipped = len(self.skipped)
        try:
            with _told(path, len(self.shards)):
                written = write_shard(partial, self.plan.folder, self._counted(numbers), self._skip)
                index, checksum = verify_shard(partial, written)
                os.replace(partial, path)
                facts = {"packing": self.digest, "sha256": checksum, "skipped": self.skipped[num_skipped:]}
                write_index(path, index, facts)
        finally:
            partial.unlink(missing_ok=True)
        return facts

    def _counted(self, numbers: range) -> Iterator[int]:
        for number in numbers:
            yield number
            self.advance(1)

    def _skip(self, reason: str) -> None:
        self.skipped.append(reason)
        total = len(self.plan.folder)
        if len(self.skipped) > MAX_BAD * total:
            raise ValueError(
                f"{len(self.skipped)} of the {total} images in {self.plan.folder.root} cannot be used, more "
                f"than {MAX_BAD:.0%}:\n" + "\n".join(f"  {reason}" for reason in self.skipped) + "\n"
                "Replace or remove them, and pack into a new folder."
            )


@contextmanager
def _held(out: Path) -> Iterator[None]:
    out.mkdir(parents=True, exist_ok=True)
    with open(out / LOCK_FILE, "a") as file:
        # The kernel drops the lock with the process, so a killed packing does not hold it for good.
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(
                error.errno, f"Another process packs into {out}: wait for it, stop it, or give another folder"
            ) from error
        yield


def _claim(out: Path, packing: dict[str, Any]) -> None:
    """Check that what lies here was packed from the same images in the same way, or is nothing."""
    files.remove_partial(out)
    path = out / MANIFEST_FILE
    if path.exists():
        try:
            there = read_json(path)["packing"]
            differing = [name for name, value in packing.items() if there[name] != value]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is damaged ({error!r}): delete {out}, or give another folder."
            ) from error
        if differing:
            # The checksum changes with any of the others.
            named = [f"{name} ({packing[name]} now, {there[name]} there)" for name in differing[:-1]]
            raise ValueError(
                f"{out} holds shards of another packing, which differs in "
                f"{', '.join(named) or 'names or sizes of the images'}: delete it, or give another folder."
            )
    elif others := sorted(path.name for path in out.iterdir() if path.name != LOCK_FILE):
        raise ValueError(
            f"{out} holds {listing(others)} but no {MANIFEST_FILE}, so these are no shards of ours: "
            "give an empty or new folder."
        )
    files.write_json(path, {"format": FORMAT, "finished": False, "packing": packing})


@contextmanager
def _told(path: Path, num_finished: int | None = None) -> Iterator[None]:
    """Say of a full disk what is kept and how it goes on."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or isinstance(error, _DiskFull):
            raise
        kept = (
            "Finished shards are kept"
            if num_finished is None
            else f"{num_finished} shards before it are kept"
        )
        raise _DiskFull(
            error.errno,
            f"{os.strerror(error.errno)} while writing {path}. {kept}: free some space and give the same "
            "command again, which goes on from there",
        ) from error


class _DiskFull(OSError):
    """Told once, by the file that it happened to."""


@contextmanager
def _bar(total: int, *, shown: bool) -> Iterator[Any]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal)) as bar:
        task = bar.add_task("packing", total=total)
        yield lambda num_images: bar.update(task, advance=num_images)
