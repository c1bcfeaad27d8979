"""Image data by name: where the files are looked for, and what their content must be."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from batchnorm.data.cifar import CLASSES as CIFAR10_CLASSES
from batchnorm.data.cifar import read_cifar10
from batchnorm.data.fetch import fetch, md5_of
from batchnorm.data.idx import read_idx
from batchnorm.data.usps import FILE as USPS_FILE
from batchnorm.data.usps import FRAMED, framed, read_usps

ENVIRONMENT_VARIABLE = "BATCHNORM_DATA"
"""Folder that is searched when no `data_dir` is given. Read when a source is loaded, never on import."""


@dataclass(frozen=True)
class ImageData:
    """Images and labels in memory, already divided into training and test."""

    name: str
    """The source's name."""
    train_images: np.ndarray
    """uint8, shape (N, H, W), 0 is black and 255 white; in colour (N, 3, H, W), red, green and blue."""
    train_labels: np.ndarray
    """int64, shape (N,), from 0 to `len(classes) - 1`."""
    test_images: np.ndarray
    """uint8, shape (M, H, W) or (M, 3, H, W)."""
    test_labels: np.ndarray
    """int64, shape (M,)."""
    classes: tuple[str, ...]
    """Name of each label."""

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            images, labels = getattr(self, f"{part}_images"), getattr(self, f"{part}_labels")
            colours = images.shape[1] if images.ndim == 4 else 3
            if images.dtype != np.uint8 or images.ndim not in (3, 4) or colours != 3 or images.size == 0:
                raise ValueError(
                    f"{self.name}: {part} images must be uint8 of shape (N, H, W) or (N, 3, H, W) and not "
                    f"empty, got {images.dtype} of shape {images.shape}."
                )
            if labels.dtype != np.int64 or labels.shape != images.shape[:1]:
                raise ValueError(
                    f"{self.name}: {part} labels must be int64, one for each of {len(images)} images, "
                    f"got {labels.dtype} of shape {labels.shape}."
                )
            if labels.min() < 0 or labels.max() >= len(self.classes):
                raise ValueError(
                    f"{self.name}: {part} labels must lie in 0..{len(self.classes) - 1}, "
                    f"got {labels.min()}..{labels.max()}."
                )
        if self.train_images.shape[1:] != self.test_images.shape[1:]:
            raise ValueError(
                f"{self.name}: training images are {self.train_images.shape[1:]} pixels and "
                f"test images {self.test_images.shape[1:]}; both must be the same."
            )

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Of one image: (H, W) in grey, (3, H, W) in colour."""
        return self.train_images.shape[1:]


@dataclass(frozen=True)
class IdxSource:
    """A data set published as four gzip idx files."""

    classes: tuple[str, ...]
    mirrors: tuple[str, ...]
    md5: Mapping[str, str]
    """File name (with .gz) to checksum of the compressed file."""


TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"

DIGIT_NAMES = tuple(str(digit) for digit in range(10))

IDX_SOURCES = {
    "mnist": IdxSource(
        classes=DIGIT_NAMES,
        mirrors=(
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
        ),
        md5={
            TRAIN_IMAGES: "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            TRAIN_LABELS: "d53e105ee54ea40749a09fcbcd1e9432",
            TEST_IMAGES: "9fb629c4189551a2d022fa330f9573f3",
            TEST_LABELS: "ec29112dd5afa0611ce80d1b7f02629c",
        },
    ),
    "fashion-mnist": IdxSource(
        classes=(
            "T-shirt/top",
            "trouser",
            "pullover",
            "dress",
            "coat",
            "sandal",
            "shirt",
            "sneaker",
            "bag",
            "ankle boot",
        ),
        mirrors=(
            "https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
            # The publisher's own address is a bucket website, and those speak plain http only.
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        ),
        md5={
            TRAIN_IMAGES: "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            TRAIN_LABELS: "25c81989df183df01b3e8a0aad5dffbe",
            TEST_IMAGES: "bef4ecab320f06d8554ea6380940ec79",
            TEST_LABELS: "bb300cfdad3c16e7a12a480ee83cd310",
        },
    ),
}

SOURCES = ("digits", *IDX_SOURCES, "usps", "cifar10")
"""Names that `load` knows."""


def load(
    source: str,
    data_dir: str | Path | None = None,
    *,
    size: int | None = None,
    download: bool = True,
    progress: bool = True,
) -> ImageData:
    """Load a data set by name, downloading it when it is nowhere on this machine.

    Files are looked for in `data_dir`, else in the folder that the environment variable
    `BATCHNORM_DATA` names, else in this user's cache: first in its subfolder of the source's name,
    then in the folder itself, gzip or plain. What is missing is downloaded into the subfolder.
    A gzip file must have the published checksum; a plain file is taken as it is.

    Args:
        source: One of `SOURCES`.
        data_dir: Folder to search; need not exist for `digits`, which comes with scikit-learn.
        size: Side of the images in pixels. Only `digits` are rescaled (8 as scanned, 28 by default
            as the network of the paper's section 4.1 expects), and `usps` (16 by default, as scanned;
            28 puts them into MNIST's frame: 20×20 in the middle).
        download: Whether missing files may be fetched from the network.
        progress: Draw a progress bar while downloading.

    Returns:
        The data, wholly in memory.

    Raises:
        ValueError: Unknown source, a size that the source does not come in, or a damaged file.
        FileNotFoundError: A file is missing and `download` is false, or `data_dir` is no folder.
        ConnectionError: A file is missing and cannot be downloaded.
        ImportError: A package of the `train` extra is needed and missing.
    """
    if source == "digits":
        return _load_digits(28 if size is None else size)
    if source not in SOURCES:
        raise ValueError(f"Unknown data source {source!r}; known are {', '.join(SOURCES)}.")
    of = {"cifar10": _load_cifar10, "usps": _load_usps}.get(source, _load_idx)
    data = of(source, _folder(data_dir), download=download, progress=progress)
    if source == "usps" and size == FRAMED:
        parts = {part: framed(getattr(data, part)) for part in ("train_images", "test_images")}
        data = replace(data, **parts)
    if size not in (None, data.image_shape[-1]):
        raise ValueError(f"{source} images come in {data.image_shape[-1]} pixels only, not in {size}.")
    return data


def _folder(data_dir: str | Path | None) -> Path:
    named = data_dir or os.environ.get(ENVIRONMENT_VARIABLE)
    if named:
        folder = Path(named).expanduser()
        if not folder.is_dir():
            said = "data_dir" if data_dir else ENVIRONMENT_VARIABLE
            raise FileNotFoundError(
                f"{said} is {folder}, which is not a folder. Make it, or correct the name."
            )
        return folder
    try:
        import pooch
    except ImportError as error:
        raise ImportError(
            'The download cache needs pooch: pip install "batchnorm[train]" (or give data_dir).'
        ) from error
    return Path(pooch.os_cache("batchnorm"))


def _load_cifar10(name: str, folder: Path, *, download: bool, progress: bool) -> ImageData:
    folders = [folder / name, folder]
    arrays = read_cifar10(folders, folder / name, download=download, progress=progress)
    return ImageData(name, *arrays, classes=CIFAR10_CLASSES)


def _load_usps(name: str, folder: Path, *, download: bool, progress: bool) -> ImageData:
    path = _find(USPS_FILE, [folder / name, folder])
    if path is None:
        raise FileNotFoundError(
            f"{name}: {USPS_FILE} is neither in {folder / name} nor in {folder}, and nobody publishes it in "
            "this form. Make it by np.savez: x_train (7291, 16, 16) and x_test (2007, 16, 16), uint8 from 0, "
            "paper, to 255, ink; y_train and y_test from 0 to 9."
        )
    return ImageData(name, *read_usps(path), classes=DIGIT_NAMES)


def _load_idx(name: str, folder: Path, *, download: bool, progress: bool) -> ImageData:
    source = IDX_SOURCES[name]
    arrays = {}
    for file_name, md5 in source.md5.items():
        path = _find(file_name, [folder / name, folder])
        if path is None:
            if not download:
                raise FileNotFoundError(
                    f"{name}: {file_name} (or the same without .gz) is neither in {folder / name} nor in "
                    f"{folder}. Put it there or allow downloading; it is published at {source.mirrors[0]}."
                )
            path = fetch(file_name, source.mirrors, md5, folder / name, progress=progress)
        elif path.suffix == ".gz" and (found := md5_of(path)) != md5:
            raise ValueError(
                f"{path}: md5 {found}, but {name} is published with {md5}: the file is damaged or belongs to "
                "another data set. Delete it to have it downloaded again; if it is meant to differ, unpack "
                "it (plain idx files are read as they are)."
            )
        arrays[file_name] = read_idx(path)
    return ImageData(
        name=name,
        train_images=arrays[TRAIN_IMAGES],
        train_labels=arrays[TRAIN_LABELS].astype(np.int64),
        test_images=arrays[TEST_IMAGES],
        test_labels=arrays[TEST_LABELS].astype(np.int64),
        classes=source.classes,
    )


def _find(file_name: str, folders: list[Path]) -> Path | None:
    candidates = [
        folder / spelling for folder in folders for spelling in (file_name, file_name.removesuffix(".gz"))
    ]
    return next((path for path in candidates if path.is_file()), None)


def _load_digits(size: int, *, test_share: float = 0.2, seed: int = 0) -> ImageData:
    """scikit-learn's 1797 digits of 8×8 pixels with 17 levels of grey, bilinearly rescaled.

    Each class gives the same share to the test set, picked by a fixed seed: 1438 to train, 359 to test.
    """
    if size < 1:
        raise ValueError(f"digits: size must be at least 1 pixel, got {size}.")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('The digits come with scikit-learn: pip install "batchnorm[train]"') from error
    import torch

    scans, labels = load_digits(return_X_y=True)
    levels = torch.from_numpy(scans.reshape(-1, 1, 8, 8)) * (255 / 16)
    scaled = torch.nn.functional.interpolate(levels, (size, size), mode="bilinear", align_corners=False)
    images = scaled[:, 0].round().to(torch.uint8).numpy()
    labels = labels.astype(np.int64)

    random = np.random.default_rng(seed)
    in_test = np.zeros(len(labels), dtype=bool)
    for digit in range(10):
        members = random.permutation(np.flatnonzero(labels == digit))
        in_test[members[: round(test_share * len(members))]] = True
    return ImageData(
        "digits", images[~in_test], labels[~in_test], images[in_test], labels[in_test], DIGIT_NAMES
    )
