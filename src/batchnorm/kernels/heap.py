"""Memory of freed tensors kept for the next ones, so that a training step meets no fresh pages.

The C library hands large freed blocks back to the system and asks for them again a moment later;
the system then clears every page anew, which takes longer than normalizing it. PyTorch's caching
allocator spares GPUs this; on the CPU nothing does.
"""

import ctypes
import os
from functools import cache

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # glibc's malloc.h

_OTHERS_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")


_is_kept = False


def is_kept() -> bool:
    """Whether `keep_freed_memory` is in force, so that a new tensor's pages are seldom fresh."""
    return _is_kept


@cache
def keep_freed_memory() -> str:
    """Let this process keep the memory of freed tensors for new ones, instead of returning it.

    For the whole process and until its end, by glibc's ``mallopt``: blocks of any size come from
    one heap, which does not shrink. Resident memory then stays at its peak. A choice that the
    user has made in the environment (``MALLOC_TRIM_THRESHOLD_`` and the like, or another
    allocator in ``LD_PRELOAD``) is left as it is.

    Returns:
        Empty if freed memory is kept now; else why not.
    """
    for name in _OTHERS_SETTINGS:
        if name in os.environ:
            return f"the environment sets {name}"
    if "malloc" in os.environ.get("LD_PRELOAD", ""):
        return "LD_PRELOAD names another allocator"
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018, is it glibc?
        accepted = library.mallopt(_MMAP_MAX, 0) and library.mallopt(_TRIM_THRESHOLD, -1)
    except (OSError, AttributeError, TypeError):
        return "the C library is not glibc"
    global _is_kept
    _is_kept = bool(accepted)
    return "" if accepted else "glibc refused"
