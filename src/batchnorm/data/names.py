"""Names of image files: which they are, millions of them in little memory, a few of them in a message."""

import os
from collections.abc import Iterable, Sequence

import numpy as np

IMAGE_SUFFIXES = frozenset(
    (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
"""What the name of an image ends in, in small letters."""

NUM_NAMED = 5


class Names:
    """An immutable list of strings, eight bytes each beyond their letters.

    A list of strings would be copied, page by page, into every worker process: each reading of an
    object counts a reference, and so writes to the page that the object lies on.

    Args:
        names: Any strings, file names that are no valid Unicode included.
    """

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._letters = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"name {index} of {len(self)}")
        return os.fsdecode(self._letters[self._ends[index] : self._ends[index + 1]])


def listing(names: Sequence[str]) -> str:
    """The first names, and the number of the others."""
    shown = ", ".join(names[:NUM_NAMED])
    return f"{shown} and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else shown
