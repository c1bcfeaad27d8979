"""The kinds of our layers, and their classes: one entry for each kind."""

from collections.abc import Mapping
from typing import Any

from batchnorm.layers.accumulated import ACCUMULATED, Accumulated
from batchnorm.layers.base import Normalization
from batchnorm.layers.evalnorm import EVALNORM, EvalNorm
from batchnorm.layers.ghost import GHOSTS, Ghost
from batchnorm.layers.renorm import RENORMS, Renorm
from batchnorm.layers.synced import SYNCED, Synced
from batchnorm.layers.variation import Variation, plain_again, vary
from batchnorm.layers.whitened import WHITENED, Whitened

VARIATIONS: dict[type[Variation], Mapping[type[Normalization], type[Variation]]] = {
    Synced: SYNCED,
    Ghost: GHOSTS,
    Accumulated: ACCUMULATED,
    EvalNorm: EVALNORM,
    Whitened: WHITENED,
    Renorm: RENORMS,
}
"""For each kind that is not plain, its class for each of the plain ones that it knows."""

_PLAIN = {cls: plain for classes in VARIATIONS.values() for plain, cls in classes.items()}


def is_known(cls: type) -> bool:
    """Whether a class is one of those in `VARIATIONS` itself, not a subclass."""
    return cls in _PLAIN


def can_become(layer: Normalization, kind: type[Variation]) -> bool:
    """Whether a kind has a class for a layer of ours, of any kind."""
    return _PLAIN.get(type(layer), type(layer)) in VARIATIONS[kind]


def become(layer: Normalization, kind: type[Variation], **settings: Any) -> Variation:
    """Turn a plain layer of ours into one of a kind, in place; `become_plain` undoes it.

    Args:
        layer: Exactly one of the plain classes.
        kind: One in `VARIATIONS`.
        settings: All that the kind has.

    Raises:
        ValueError: The settings make no sense.
    """
    return vary(layer, VARIATIONS[kind][type(layer)], **settings)


def become_plain(layer: Variation) -> Normalization:
    """Turn a layer of a kind into the plain one, in place.

    Args:
        layer: Exactly one of the classes in `VARIATIONS`.
    """
    return plain_again(layer, _PLAIN[type(layer)])
