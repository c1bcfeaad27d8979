"""Files that are written whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a path beside ``path`` to write to, and rename it to ``path`` once that has succeeded.

    Raises:
        OSError: The folder is missing or cannot be written, or the disk is full; the message names
            ``path``, and a file that was there before is left as it was.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield unfinished
        unfinished.replace(path)
    except OSError as error:
        raise type(error)(error.errno, f"cannot write the report ({error.strerror})", str(path)) from error
    finally:
        unfinished.unlink(missing_ok=True)
