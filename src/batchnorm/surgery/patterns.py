"""``only=`` and ``except_=``: glob patterns on paths."""

from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatchcase

Patterns = str | Iterable[str] | None


def as_list(patterns: Patterns) -> list[str]:
    """One pattern, several, or none, as a list."""
    return [] if patterns is None else [patterns] if isinstance(patterns, str) else list(patterns)


def check(patterns: Sequence[str], names: Collection[str], among: str) -> None:
    """Refuse patterns that match nothing: a slip of the pen would otherwise do nothing, silently.

    Args:
        patterns: To be checked.
        names: What there is to match.
        among: What the names are, for the message.

    Raises:
        ValueError: A pattern matches none of the names.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            there = ", ".join(sorted(filter(None, names))) or "none"
            raise ValueError(f"pattern {pattern!r} matches no {among}; there are: {there}")


def excluded(names: Collection[str], only: Sequence[str], except_: Sequence[str]) -> str:
    """Why something known by any of ``names`` is not wanted; empty if it is."""
    if only and not any(fnmatchcase(name, pattern) for name in names for pattern in only):
        return "excluded: no pattern of only= matches"
    by = next((pattern for pattern in except_ if any(fnmatchcase(name, pattern) for name in names)), None)
    return f"excluded by except_={by!r}" if by is not None else ""
