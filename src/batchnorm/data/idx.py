"""The idx format: a small header, then one array in row-major order, most significant byte first."""

import gzip
import math
import os
import zlib
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np

DTYPES: dict[int, np.dtype] = {
    0x08: np.dtype("u1"),
    0x09: np.dtype("i1"),
    0x0B: np.dtype(">i2"),
    0x0C: np.dtype(">i4"),
    0x0D: np.dtype(">f4"),
    0x0E: np.dtype(">f8"),
}
"""Element type by the third byte of the file."""

MAX_NDIM = 8
MAX_BYTES = 1 << 30
"""Of the data; the largest of these sets has half of it."""
MAX_RATIO = 1032
"""That deflate can reach: a gzip file cannot hold more."""


def read_idx(path: str | Path) -> np.ndarray:
    """Read one idx file, plain or gzip (told apart by content, not by name).

    Args:
        path: The file.

    Returns:
        A new array with the shape and element type of the header, in native byte order.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: The header is not one of idx, or promises a size that no data set of ours has,
            or the data are shorter or longer than it promises, or the gzip stream is damaged.

    Source: the file format section of the MNIST database's page (LeCun, Cortes & Burges).
    """
    path = Path(path)
    with open(path, "rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if not zipped:
            return _parse(file, path, size)
        try:
            with gzip.open(file) as stream:
                return _parse(stream, path, size * MAX_RATIO)
        except (OSError, EOFError, zlib.error) as error:
            _refuse(path, "an intact gzip stream", f"a damaged one ({error})", cause=error)


def _parse(stream: BinaryIO | gzip.GzipFile, path: Path, can_hold: int) -> np.ndarray:
    magic = stream.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0":
        _refuse(path, "an idx file, which begins with two zero bytes", f"{magic!r}")
    code, ndim = magic[2], magic[3]
    if code not in DTYPES:
        known = ", ".join(f"0x{known:02x}" for known in DTYPES)
        _refuse(path, f"an element type among {known} in byte 3", f"0x{code:02x}")
    if not 1 <= ndim <= MAX_NDIM:
        _refuse(path, f"1 to {MAX_NDIM} dimensions in byte 4", f"{ndim}")
    header = stream.read(4 * ndim)
    if len(header) < 4 * ndim:
        _refuse(path, f"{4 * ndim} bytes of sizes after the first four", f"{len(header)}")
    shape = tuple(int(size) for size in np.frombuffer(header, ">u4"))
    dtype = DTYPES[code]
    num_bytes = math.prod(shape) * dtype.itemsize
    # Checked before reading: a damaged header must not make us ask for terabytes.
    if num_bytes > MAX_BYTES:
        _refuse(path, f"at most {MAX_BYTES} bytes of data", f"a header of shape {shape}, {num_bytes} bytes")
    if num_bytes > can_hold:
        _refuse(
            path,
            f"{num_bytes} bytes of data for shape {shape}",
            f"a file that holds at most {can_hold} bytes",
        )
    data = stream.read(num_bytes)
    if len(data) < num_bytes:
        _refuse(path, f"{num_bytes} bytes of data for shape {shape}", f"{len(data)}, so it was cut off")
    # Reading on to the end also makes gzip compare its own checksum.
    if stream.read(1):
        _refuse(path, f"the end of the file after {num_bytes} bytes of data for shape {shape}", "more bytes")
    return np.frombuffer(data, dtype).reshape(shape).astype(dtype.newbyteorder("="))


def _refuse(path: Path, expected: str, came: str, cause: Exception | None = None) -> NoReturn:
    raise ValueError(
        f"{path}: expected {expected}, found {came}. "
        "Delete the file and fetch it again (or let batchnorm download it)."
    ) from cause
