"""The kinds of normalization that `convert` knows, by name, and the options of each."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from batchnorm.surgery.kind import Kind
from batchnorm.surgery.kind_plain import plain
from batchnorm.surgery.kind_torch import torchs
from batchnorm.surgery.kind_variation import accumulated, evalnorm, ghost, renorm, synced, whitened

KINDS: Mapping[str, Callable[..., Kind]] = {
    "plain": plain,
    "torch": torchs,
    "synced": synced,
    "ghost": ghost,
    "accumulated": accumulated,
    "evalnorm": evalnorm,
    "whitened": whitened,
    "renorm": renorm,
}
"""By the name that ``to=`` takes: what makes the kind, of keyword arguments that are its options."""


def kind_named(name: str, options: Mapping[str, Any]) -> Kind:
    """The kind of a name, with its options.

    Args:
        name: What ``to=`` was given.
        options: By name; ``None`` is as good as not given.

    Raises:
        ValueError: There is no such kind, it has no such option, lacks one, or an option makes no sense.
    """
    if name not in KINDS:
        known = ", ".join(map(repr, KINDS))
        raise ValueError(f"to={name!r} is no kind of normalization; there are {known}")
    owners: dict[str, list[str]] = {}
    for kind, make in KINDS.items():
        for option in _options(make):
            owners.setdefault(option, []).append(f"to={kind!r}")
    given = {o: value for o, value in options.items() if value is not None or o not in owners}
    own = _options(KINDS[name])
    takes = " and ".join(own) or "no options"
    for option in given:
        if option not in own:
            whose = f", which is of {' and '.join(owners[option])}" if option in owners else ""
            raise ValueError(f"to={name!r} takes {takes}, got {option}{whose}")
    for option, is_needed in own.items():
        if is_needed and option not in given:
            raise ValueError(f"to={name!r} takes {takes}: give {option}=…")
    return KINDS[name](**given)


def _options(make: Callable[..., Kind]) -> dict[str, bool]:
    """Names of a kind's options, and whether each is needed."""
    parameters = inspect.signature(make).parameters.values()
    return {p.name: p.default is inspect.Parameter.empty for p in parameters}
