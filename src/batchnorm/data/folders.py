"""Image sets on disk: what training asks of them, folders of images, and the way to open either kind."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol

import numpy as np

from batchnorm.data.names import IMAGE_SUFFIXES, Names, listing
from batchnorm.data.shards import is_shard_pattern, open_shards

PER_SHARD = 1000
"""Images of a shard, unless told otherwise."""


class ImageSet(Protocol):
    """A map from the numbers 0 … len - 1 to encoded images; can be pickled, and opens files when it reads."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Name of each label."""

    @property
    def labels(self) -> np.ndarray:
        """int64, one for each image."""

    @property
    def shards(self) -> np.ndarray:
        """int64, the number at which each shard begins, and at the end the number of images."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Where the image lies, for people."""

    def read(self, index: int) -> bytes:
        """The encoded image."""


@dataclass(frozen=True)
class ImageFiles:
    """Images on disk, divided into training and validation, with the same classes."""

    name: str
    """What they were opened by."""
    train: ImageSet
    val: ImageSet

    @property
    def classes(self) -> tuple[str, ...]:
        """Name of each label."""
        return self.train.classes


def open_images(source: str | Path, *, val: str | Path | None = None) -> ImageFiles:
    """Find the images of a folder or of shards; none is decoded yet.

    Args:
        source: A folder with ``train/CLASS/IMAGE`` and ``val/CLASS/IMAGE``, or one that ``batchnorm
            shards`` wrote, or the training shards as ``…/train-{000000..000146}.tar``. Names of classes
            come from the folders, or from the ``classes.json`` beside the shards.
        val: The validation shards. Without it their name is that of the training shards with ``val`` for
            ``train``, and as many are taken as there are.

    Returns:
        Both image sets.

    Raises:
        FileNotFoundError: The folder, its ``train/`` or ``val/``, or a shard is missing.
        ValueError: A class in ``val/`` that ``train/`` has not, a class without images, or shards that are
            damaged or lack a label; the message says which.
    """
    if is_shard_pattern(source):
        return ImageFiles(str(source), *open_shards(source, val))
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is not a folder. Give a folder with train/ and val/, or shards such as "
            "shards/train-{000000..000146}.tar."
        )
    if not (folder / "train").is_dir() and any(folder.glob("train-*.tar")):
        return ImageFiles(str(source), *open_shards(folder, val))
    if val is not None:
        raise ValueError(
            f"val names validation shards, but {folder} is a folder of images with its own val/."
        )
    return ImageFiles(str(source), *open_folder(folder))


def open_folder(
    folder: Path, *, seed: int = 0, per_shard: int = PER_SHARD
) -> tuple["ImageFolder", "ImageFolder"]:
    """The training and the validation images of a folder; arguments and errors as for `ImageFolder`."""
    for part in ("train", "val"):
        if not (folder / part).is_dir():
            _refuse_layout(folder, part)
    train = ImageFolder(folder / "train", seed=seed, per_shard=per_shard)
    return train, ImageFolder(folder / "val", train.classes, seed=seed, per_shard=per_shard)


class ImageFolder:
    """The images below ``root/CLASS/``, numbered in an order that mixes the classes.

    The order and the virtual shards are those that ``batchnorm shards`` packs with the same ``seed`` and
    ``per_shard``: training from the folder and from its shards sees the same images at the same step.
    Files that do not end as an image does, and hidden ones, are left out.

    Args:
        root: Holds one folder for each class; images may lie deeper in it.
        classes: Name of each label; ``None`` takes the names of the folders, sorted.
        seed: Of the order.
        per_shard: Images of a virtual shard.

    Raises:
        FileNotFoundError: ``root`` is not there.
        ValueError: No class, a class without images, or one that is not among ``classes``.
    """

    def __init__(
        self,
        root: str | Path,
        classes: Sequence[str] | None = None,
        *,
        seed: int = 0,
        per_shard: int = PER_SHARD,
    ) -> None:
        if per_shard < 1:
            raise ValueError(f"per_shard must be at least 1 image, got {per_shard}.")
        self.root = Path(root)
        found = _class_folders(self.root)
        self.classes = tuple(found) if classes is None else tuple(classes)
        _check_known(self.root, found, self.classes)
        paths, labels, empty = [], [], []
        for name in found:
            images = _images_below(self.root, name)
            if not images:
                empty.append(name)
            paths += images
            labels += [self.classes.index(name)] * len(images)
        if empty:
            _refuse_empty(self.root, empty)
        order = packing_order(len(paths), seed)
        self._paths = Names(paths[number] for number in order)
        self.labels = np.array(labels, dtype=np.int64)[order]
        self.shards = np.append(np.arange(0, len(paths), per_shard), len(paths))

    def __len__(self) -> int:
        return len(self.labels)

    def relative(self, index: int) -> str:
        """The image's path below `root`."""
        return self._paths[index]

    def name(self, index: int) -> str:
        """The image's path."""
        return os.path.join(self.root, self._paths[index])

    def read(self, index: int) -> bytes:
        """The file's content."""
        with open(self.name(index), "rb", buffering=0) as file:
            return file.read()


def packing_order(num_images: int, seed: int) -> np.ndarray:
    """The order in which images sorted by class and name are numbered: a permutation, int64."""
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}.")
    return np.random.default_rng(seed).permutation(num_images)


def _class_folders(root: Path) -> list[str]:
    with os.scandir(root) as entries:
        found = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    if not found:
        raise ValueError(
            f"{root} has no class folders: images are expected as {root / 'CLASS' / 'NAME.jpg'}."
        )
    return found


def _images_below(root: Path, class_name: str) -> list[str]:
    def stop(error: OSError) -> NoReturn:
        raise error

    images = []
    for folder, inner, names in os.walk(root / class_name, onerror=stop):
        inner[:] = [name for name in inner if not name.startswith(".")]
        below = os.path.relpath(folder, root)
        images += [
            os.path.join(below, name)
            for name in names
            if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")
        ]
    return sorted(images)


def _check_known(root: Path, found: list[str], classes: tuple[str, ...]) -> None:
    known = set(classes)
    if unknown := [name for name in found if name not in known]:
        raise ValueError(
            f"{root} has {listing(unknown)}, which is no class of the training images "
            f"({len(classes)}: {listing(classes)}). Correct the name, remove the folder, or give the class "
            "training images."
        )


def _refuse_empty(root: Path, empty: list[str]) -> NoReturn:
    others = sorted(path.name for path in (root / empty[0]).iterdir())
    instead = f"{root / empty[0]} holds {listing(others)}" if others else f"{root / empty[0]} is empty"
    raise ValueError(
        f"{root}: no image in {listing(empty)} ({instead}). Images end in "
        f"{', '.join(sorted(IMAGE_SUFFIXES))}: put some there, or remove the folder."
    )


def _refuse_layout(folder: Path, missing: str) -> NoReturn:
    found = sorted(path.name for path in folder.iterdir())
    raise FileNotFoundError(
        f"{folder} has no {missing}/ (it holds {listing(found) or 'nothing'}). Images are expected as "
        f"{folder}/train/CLASS/NAME.jpg and {folder}/val/CLASS/NAME.jpg, shards as {folder}/train-000000.tar."
    )
