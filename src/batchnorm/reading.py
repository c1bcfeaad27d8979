"""Reading files that may lie about their size: what they hold is bounded before it is taken into memory."""

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.lib import format as npy
from safetensors import SafetensorError
from torch import Tensor

MAX_JSON_BYTES = 1 << 26
"""Of a JSON document, unless its reader knows better: 64 MiB."""

PIECE_BYTES = 1 << 20

MAX_ARRAYS_BYTES = 1 << 31
"""Of all arrays of an .npz file together, as they are in memory: 2 GiB."""

MAX_HEADER_BYTES = 1 << 16
"""Of one array in an .npz file."""

_HEADERS: dict[tuple[int, int], Callable[..., Any]] = {
    (1, 0): npy.read_array_header_1_0,
    (2, 0): npy.read_array_header_2_0,
}


def read_limited(path: Path, limit: int) -> bytes:
    """A whole file.

    Raises:
        ValueError: It has more bytes than `limit`.
        OSError: It cannot be read.
    """
    parts, size = [], 0
    with open(path, "rb") as file:
        # Piece by piece: asked for the limit, Python would take that much memory for a file of any size.
        while part := file.read(PIECE_BYTES):
            parts.append(part)
            if (size := size + len(part)) > limit:
                raise ValueError(f"{path} has more than {limit:,} bytes, which no such file of ours has")
    return b"".join(parts)


def parse_json(content: bytes | str) -> Any:
    """A JSON document.

    Raises:
        ValueError: It is none, or is nested deeper than Python can follow.
    """
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> Any:
    """A JSON document from a file; errors as `read_limited` and `parse_json`."""
    return parse_json(read_limited(path, limit))


def read_arrays(path: Path, limit: int = MAX_ARRAYS_BYTES) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, by name; nothing is unpickled.

    What the archive and each header promise is compared before memory is given to it.

    Raises:
        ValueError: It is no such file, is damaged, holds objects, or would need more than `limit` bytes.
        OSError: It cannot be read.
    """
    found = {}
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
                if (total := sum(entry.file_size for entry in entries)) > limit:
                    raise ValueError(f"its arrays would take {total:,} bytes, and {limit:,} are allowed")
                for entry in entries:
                    with archive.open(entry) as stream:
                        # No more than is promised is ever unpacked.
                        content = stream.read(entry.file_size)
                    found[entry.filename.removesuffix(".npy")] = _array(content)
        except Exception as error:  # zipfile raises whatever its insides do
            raise ValueError(f"{path} cannot be used: {error or type(error).__name__}") from error
    return found


def _array(content: bytes) -> np.ndarray:
    stream = io.BytesIO(content)
    version = npy.read_magic(stream)
    if version not in _HEADERS:
        raise ValueError(f"it is of version {version} of numpy's format, which plain numbers do not need")
    shape, _, dtype = _HEADERS[version](stream, max_header_size=MAX_HEADER_BYTES)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are not unpickled")
    promised = int(np.prod([int(n) for n in shape], dtype=object)) * dtype.itemsize
    if promised != len(content) - stream.tell():
        raise ValueError(f"a header promises {promised:,} bytes, {len(content) - stream.tell():,} are there")
    stream.seek(0)
    return npy.read_array(stream, allow_pickle=False)


def parse_safetensors(content: bytes) -> dict[str, Tensor]:
    """Tensors by name.

    Raises:
        ValueError: Damaged, or the header does not fit the data.
    """
    try:
        return safetensors.torch.load(content)
    except (SafetensorError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        # The library's Rust half refuses; its Python half trips over what that half lets through.
        raise ValueError(f"its safetensors header cannot be used: {error}") from error


def safetensors_metadata(content: bytes) -> dict[str, str]:
    """The text entries of a safetensors file that `parse_safetensors` has taken."""
    size = int.from_bytes(content[:8], "little")
    header = parse_json(content[8 : 8 + size])
    found = header.get("__metadata__") if isinstance(header, dict) else None
    return {k: v for k, v in (found or {}).items() if isinstance(k, str) and isinstance(v, str)}


def read_torch(path: Path) -> Any:
    """What a ``.pt`` file holds, through PyTorch's unpickler of tensors and plain containers alone.

    Raises:
        ValueError: It asks for anything else, is damaged, or is an archive that expands.
        OSError: It cannot be read.
    """
    with open(path, "rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        if file.read(4) == b"PK\3\4":
            _refuse_expanding(path, file, size)
        file.seek(0)
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a file that is no checkpoint makes of the unpickler
            raise ValueError(f"{path} cannot be loaded safely (weights_only=True): {error}") from error


def _refuse_expanding(path: Path, file: Any, size: int) -> None:
    """torch.save never compresses: an archive that does, or whose parts overlap, was made to expand."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except Exception as error:  # zipfile raises whatever its insides do
        raise ValueError(f"{path} is a damaged archive: {error}") from error
    packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if packed or (total := sum(entry.file_size for entry in entries)) > size:
        what = f"{packed[0]} is compressed" if packed else f"{size:,} bytes expand to {total:,}"
        raise ValueError(
            f"{path} is refused: {what}, which torch.save never writes. If you trust it, load it yourself "
            "and save model.state_dict() anew"
        )
