"""CIFAR-10 as its publisher has it: pickles of Python 2, read without trusting them."""

import io
import math
import os
import pickle
import pickletools
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from batchnorm.data.fetch import fetch, md5_of
from batchnorm.reading import read_limited

ARCHIVE, ARCHIVE_MD5 = "cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"
MIRRORS = ("https://www.cs.toronto.edu/~kriz/",)
FOLDER = "cifar-10-batches-py"
TRAIN_FILES = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
}
TEST_FILES = {"test_batch": "40351d587109b95175f43aff81a1287e"}
MAX_FILE_BYTES = 40_000_000
MAX_NDIM = 8
CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)


def read_cifar10(
    folders: list[Path], download_to: Path, *, download: bool = True, progress: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training images and labels, test images and labels.

    Args:
        folders: Searched for `cifar-10-batches-py`, or for its files themselves.
        download_to: Where the archive is fetched and unpacked if none has them.
        download: Whether it may be.
        progress: Draw a progress bar while downloading.

    Returns:
        uint8 images of shape (50000, 3, 32, 32), int64 labels, and likewise 10,000 to test.

    Raises:
        FileNotFoundError: A file is missing and `download` is false.
        ValueError: A file is damaged, or is not the published one.
        ConnectionError: The archive cannot be downloaded.

    Source: Krizhevsky (2009), Learning Multiple Layers of Features from Tiny Images.
    """
    wanted = TRAIN_FILES | TEST_FILES
    places = [place for folder in folders for place in (folder / FOLDER, folder)]
    found = next((place for place in places if all((place / name).is_file() for name in wanted)), None)
    if found is None:
        if not download:
            raise FileNotFoundError(
                f"cifar10: no folder {FOLDER} with {', '.join(wanted)} in {folders[-1]}. Put it there or "
                f"allow downloading; it is published at {MIRRORS[0]}{ARCHIVE}."
            )
        found = _download(download_to, progress=progress)
    parts = [_read(found / name, md5) for name, md5 in wanted.items()]
    train, test = parts[: len(TRAIN_FILES)], parts[len(TRAIN_FILES) :]
    return (
        np.concatenate([images for images, _ in train]),
        np.concatenate([labels for _, labels in train]),
        np.concatenate([images for images, _ in test]),
        np.concatenate([labels for _, labels in test]),
    )


def _download(folder: Path, *, progress: bool) -> Path:
    archive = fetch(ARCHIVE, MIRRORS, ARCHIVE_MD5, folder, progress=progress)
    target = folder / FOLDER
    target.mkdir(exist_ok=True)
    with tarfile.open(archive) as tar:
        for name in TRAIN_FILES | TEST_FILES:
            member = tar.extractfile(f"{FOLDER}/{name}") if _is_plain(tar, f"{FOLDER}/{name}") else None
            if member is None:
                raise ValueError(
                    f"{archive}: {FOLDER}/{name} is not a file. Delete the archive and try again."
                )
            partial = target / f".{name}.{os.getpid()}.partial"
            try:
                partial.write_bytes(member.read(MAX_FILE_BYTES))
                os.replace(partial, target / name)
            finally:
                partial.unlink(missing_ok=True)
    archive.unlink()
    return target


def _read(path: Path, md5: str) -> tuple[np.ndarray, np.ndarray]:
    if (found := md5_of(path)) != md5:
        raise ValueError(
            f"{path}: md5 {found}, but CIFAR-10 is published with {md5}: the file is damaged. "
            "Delete the folder to have it downloaded again."
        )
    content = unpickle(read_limited(path, MAX_FILE_BYTES))
    images, labels = np.asarray(content[b"data"]), np.array(content[b"labels"], dtype=np.int64)
    return images.reshape(-1, 3, 32, 32), labels


def _is_plain(tar: tarfile.TarFile, name: str) -> bool:
    try:
        return tar.getmember(name).isreg()
    except KeyError:
        return False


def unpickle(data: bytes) -> Any:
    """Containers, numbers, bytes and numpy arrays from a pickle; nothing in it can run.

    Raises:
        ValueError: Damaged, or it asks for anything else.
    """
    try:
        _check_operations(data)
        return _Unpickler(io.BytesIO(data), encoding="bytes").load()
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"not a whole pickle ({type(error).__name__}: {error})") from error


def _check_operations(data: bytes) -> None:
    """A few bytes can ask the unpickler for a memo of gigabytes; a true pickle numbers what it holds."""
    try:
        operations = list(pickletools.genops(data))
    except Exception as error:
        raise ValueError(f"not a whole pickle ({type(error).__name__}: {error})") from error
    for operation, argument, _ in operations:
        if "PUT" in operation.name and argument is not None and int(argument) > len(data):
            raise ValueError(f"the pickle numbers an object {argument}, and has {len(data)} bytes")


class _Unpickler(pickle.Unpickler):
    """Knows three names; every other one, such as a function to call, is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray"):
            match name:
                case "_reconstruct":
                    return _empty_array
                case "ndarray":
                    return np.ndarray
                case "dtype":
                    return _Type
        raise ValueError(f"the pickle asks for {module}.{name}, and only numpy arrays are allowed")


class _Type:
    """A numpy dtype as a pickle describes it: numbers of the plain kinds only.

    numpy's own would take fields and offsets from the pickle, and believe them.
    """

    def __init__(self, code: Any, *_: Any) -> None:
        text = code.decode("ascii") if isinstance(code, bytes) else str(code)
        if not re.fullmatch(r"[<>=|]?[biuf][1248]", text):
            raise ValueError(f"the pickle has an array of dtype {text!r}, and only plain numbers are allowed")
        self.dtype = np.dtype(text)

    def __setstate__(self, state: Any) -> None:
        plain = isinstance(state, tuple) and len(state) >= 5 and state[2:5] == (None, None, None)
        order = state[1].decode("ascii") if plain and isinstance(state[1], bytes) else plain and state[1]
        if order not in ("<", ">", "=", "|"):
            raise ValueError("the pickle has an array whose dtype is not one of plain numbers")
        self.dtype = self.dtype.newbyteorder(order)


class _Array(np.ndarray):
    """An array whose shape, type and bytes are held against each other before numpy sees them."""

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, by_columns, content = state
        if not isinstance(kind, _Type) or not isinstance(content, bytes) or not isinstance(shape, tuple):
            raise ValueError("the pickle has an array of something else than numbers")
        if not all(type(n) is int and n >= 0 for n in shape) or len(shape) > MAX_NDIM:
            raise ValueError(f"the pickle has an array of shape {shape!r}")
        if math.prod(shape) * kind.dtype.itemsize != len(content):
            raise ValueError(f"the pickle has {len(content)} bytes for an array of shape {shape}")
        super().__setstate__((1, shape, kind.dtype, bool(by_columns), content))


def _empty_array(kind: Any, shape: tuple[int, ...], code: bytes) -> np.ndarray:
    if kind is not np.ndarray or shape != (0,):
        raise ValueError(f"the pickle builds {kind!r} of shape {shape!r} where an array is expected")
    return np.ndarray.__new__(_Array, (0,), np.dtype("b"))
