"""Writing files so that a reader, or a later run, sees the old content or the new and nothing between."""

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PARTIAL = ".partial"
"""Ending of what is not finished yet; such names begin with a dot, and may be deleted when no run is on."""


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file beside its place, force it to the disk, then rename it over what was there.

    Args:
        path: Where the file goes; its folder exists.
        data: The whole content.

    Raises:
        OSError: The disk refused; what stood at `path` is still there. A full disk is said so.
    """
    partial = _partial(path)
    with explained(path):
        try:
            _write_synced(partial, data)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        sync_folder(path.parent)


def check_free(path: Path, *, force: bool) -> None:
    """Before long work: whether a file can get this name at its end.

    Raises:
        FileExistsError: Something is there, and `force` is false.
        OSError: `path` is a folder, or its folder is missing or cannot be written to.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "this is a folder; name a file in it", str(path))
    if path.exists() and not force:
        raise FileExistsError(errno.EEXIST, "exists and is kept; force (--force) replaces it", str(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such folder; make it first", str(path.parent))
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "this folder cannot be written to", str(path.parent))


@contextmanager
def beside(path: Path, data: bytes, *, force: bool) -> Iterator[Path]:
    """Write a file beside its place for the caller to try; it gets its name when the block ends well.

    Args:
        path: Where the file goes; its folder exists.
        data: The whole content.
        force: Replace what is there by then.

    Yields:
        Where it lies meanwhile.

    Raises:
        FileExistsError: Something has come there, and `force` is false.
        OSError: The disk refused. As when the block raises, what stood at `path` is still there.
    """
    # The process id keeps two writers of one file out of each other's way.
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with explained(path):
            _write_synced(partial, data)
        yield partial
        with explained(path):
            check_free(path, force=force)
            os.replace(partial, path)
            sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` of a JSON document, indented for people; NaN is refused as JSON has none."""
    write_bytes(path, to_json(value))


def to_json(value: Any) -> bytes:
    """A JSON document with a final newline; floats round-trip exactly."""
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Write a whole folder at once: beside its place, forced to the disk, then renamed.

    Args:
        path: Where the folder goes. One that stands there is replaced.
        files: Content by file name.

    Raises:
        OSError: The disk refused; what stood at `path` is still there.
    """
    partial, old = _partial(path), path.with_name(f".{path.name}.old{PARTIAL}")
    with explained(path):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            for name, data in files.items():
                _write_synced(partial / name, data)
            sync_folder(partial)
            # A rename cannot replace a folder that holds files, so the old one steps aside first.
            if path.exists():
                shutil.rmtree(old, ignore_errors=True)
                path.rename(old)
            partial.rename(path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        sync_folder(path.parent)
        shutil.rmtree(old, ignore_errors=True)


def append_line(path: Path, line: str) -> None:
    """Append one line in a single write, so that a process that dies leaves at most one line cut short."""
    with explained(path), open(path, "ab", buffering=0) as file:
        file.write(line.encode() + b"\n")


def sync_file(path: Path) -> None:
    """Force an existing file's content to the disk."""
    with explained(path), open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Force a folder's list of names to the disk: a rename is not durable before that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_folder(path: Path) -> None:
    """Delete a folder; a reader, or a run killed meanwhile, never finds half of it under its name."""
    old = path.with_name(f".{path.name}.old{PARTIAL}")
    shutil.rmtree(old, ignore_errors=True)
    path.rename(old)
    shutil.rmtree(old)


def remove_partial(folder: Path) -> None:
    """Delete what a killed process left unfinished in `folder`."""
    for path in folder.glob(f".*{PARTIAL}"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}{PARTIAL}")


def _write_synced(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Say of a full disk what was being written and what to do; other errors pass unchanged."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            # With the name that the caller knows, not that of the unfinished file beside it.
            raise type(error)(error.errno, f"cannot write ({error.strerror})", str(path)) from error
        raise OSError(
            error.errno,
            f"{os.strerror(error.errno)} while writing {path}. Nothing written earlier is lost: "
            "free some space and give the same command again to go on from the newest checkpoint",
        ) from error
