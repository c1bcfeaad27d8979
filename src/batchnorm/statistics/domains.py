"""One set of weights, and what its normalizations hold in each of several domains, by name."""

import difflib
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm import files
from batchnorm.reading import parse_json, parse_safetensors, read_limited, safetensors_metadata
from batchnorm.statistics.choose import unwrapped
from batchnorm.statistics.state import State, put_state, state_of

_FORMAT = 1
_HEADER = "domains"
_MOST_BYTES = 1 << 30


class Domains:
    """Statistics, γ and β of a network's batch normalizations in several domains, selected by name.

    A domain is all that the normalizations hold. The other weights are shared, and so few numbers are a
    domain's own that hundreds are kept beside one network. `store` takes what the network has now: after
    `adapt`, say, or a training of γ and β there.

    Args:
        model: With batch normalizations of `torch.nn` or ours, in any wrapper; only `select` changes it.

    Raises:
        ValueError: It has none.

    Source: Chang et al. (2019), Domain-Specific Batch Normalization.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = unwrapped(model)
        self._states: dict[str, State] = {}
        if not self._layers():
            raise ValueError(
                f"{type(self._model).__name__} has no batch normalization (torch.nn.BatchNorm*, or a "
                "subclass): nothing in it belongs to a domain"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Of the domains, in the order in which they were stored."""
        return tuple(self._states)

    def store(self, name: str, *, replace: bool = False) -> None:
        """Keep what the network's normalizations hold now as the domain of this name.

        Args:
            name: Any text but none.
            replace: Take the place of a domain of that name.

        Raises:
            TypeError: The name is no text.
            ValueError: It is empty, or taken and ``replace`` is false.
        """
        if not isinstance(name, str):
            raise TypeError(f"a domain's name must be text, got {type(name).__name__}")
        if not name:
            raise ValueError("a domain needs a name, got an empty one")
        if name in self._states and not replace:
            raise ValueError(f"there is a domain {name!r} already: give replace=True, or another name")
        self._states[name] = state_of(self._layers())

    def select(self, name: str) -> None:
        """Give the network's normalizations, in place, what they hold in a domain.

        Nothing else is touched: modes, hooks, optimizers and other weights stay.

        Raises:
            ValueError: There is no such domain, or the network's normalizations are no longer those that were
                stored.
        """
        state = self._states[self._known(name)]
        layers = self._layers()
        _check_fits(state, layers, f"domain {name!r}")
        put_state(layers, state)

    @contextmanager
    def selected(self, name: str) -> Iterator[nn.Module]:
        """Inside the block the network is in a domain; afterwards where it was before, to the bit.

        Yields:
            The network.

        Raises:
            ValueError: As `select`.
        """
        layers = self._layers()
        before = state_of(layers)
        self.select(name)
        try:
            yield self._model
        finally:
            put_state(layers, before)

    def remove(self, name: str) -> None:
        """Forget a domain.

        Raises:
            ValueError: There is no such domain.
        """
        del self._states[self._known(name)]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all domains to a safetensors file, whole or not at all; `load` reads it.

        Raises:
            OSError: The disk refused; what stood at ``path`` is still there.
        """
        tensors = {
            f"{place}.{layer}.{tensor}": value.cpu().contiguous()
            for place, state in enumerate(self._states.values())
            for layer, of in state.items()
            for tensor, value in of.items()
        }
        header = {"format": _FORMAT, "weights": self._weights(), "names": list(self._states)}
        # One entry, as safetensors writes several in random order.
        files.write_bytes(Path(path), safetensors.torch.save(tensors, {_HEADER: json.dumps(header)}))

    @classmethod
    def load(cls, model: nn.Module, path: str | os.PathLike[str]) -> "Domains":
        """Read what `save` wrote for a network with these weights; the network stays as it is.

        Args:
            model: With the weights that the domains were stored beside.
            path: The file; nothing in it is ever executed.

        Raises:
            ValueError: The file is damaged or another, or belongs to other weights.
            OSError: It cannot be read.
        """
        domains = cls(model)
        content = read_limited(Path(path), _MOST_BYTES)
        try:
            tensors = parse_safetensors(content)
            text = safetensors_metadata(content).get(_HEADER)
            if text is None:
                raise ValueError(f"its metadata have no entry {_HEADER!r}: Domains.save did not write it")
            names, weights = _header(parse_json(text))
            if weights != domains._weights():
                raise ValueError(
                    f"its domains belong to weights {weights[:12]}…, and {type(domains._model).__name__} has "
                    f"{domains._weights()[:12]}… (SHA-256 of all parameters but γ and β): load that "
                    "checkpoint, in the dtype that it had"
                )
            states: list[State] = [{} for _ in names]
            for key, value in tensors.items():
                place, _, rest = key.partition(".")
                layer, _, tensor = rest.rpartition(".")
                if not place.isdecimal() or int(place) >= len(names):
                    raise ValueError(f"its tensor {key!r} belongs to no domain")
                if not value.isfinite().all() or (tensor == "running_var" and (value < 0).any()):
                    raise ValueError(f"its tensor {key!r} is not finite, or a negative variance")
                states[int(place)].setdefault(layer, {})[tensor] = value
            for name, state in zip(names, states, strict=True):
                _check_fits(state, domains._layers(), f"domain {name!r}")
                domains._states[name] = state
        except ValueError as error:
            raise ValueError(f"{path} has no domains that can be used: {error}") from error
        return domains

    def _layers(self) -> dict[str, _BatchNorm]:
        return {name: m for name, m in self._model.named_modules() if isinstance(m, _BatchNorm)}

    def _known(self, name: str) -> str:
        if name in self._states:
            return name
        near = difflib.get_close_matches(str(name), self._states, n=1)
        meant = f" Did you mean {near[0]!r}?" if near else ""
        known = ", ".join(map(repr, self._states)) or "none yet: store one"
        raise ValueError(f"there is no domain {name!r}; known are {known}.{meant}")

    def _weights(self) -> str:
        """SHA-256 of what the domains share."""
        own = {id(p) for layer in self._layers().values() for p in layer.parameters(recurse=False)}
        digest = hashlib.sha256()
        for name, parameter in self._model.named_parameters():
            if id(parameter) not in own:
                digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
                raw = parameter.detach().cpu().contiguous().flatten().view(torch.uint8)
                digest.update(raw.numpy().tobytes())
        return digest.hexdigest()

    def __repr__(self) -> str:
        return f"Domains({', '.join(map(repr, self._states))})"


def _header(found: Any) -> tuple[list[str], str]:
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        came = found.get("format") if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"it has format {came!r}, and this version reads {_FORMAT}")
    names, weights = found.get("names"), found.get("weights")
    if not isinstance(names, list) or not isinstance(weights, str):
        raise ValueError("its header has no names, or no weights")
    if not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
        raise ValueError("its names are not all text, or not all different")
    return names, weights


def _check_fits(state: State, layers: dict[str, _BatchNorm], what: str) -> None:
    if differ := sorted(state.keys() ^ layers.keys()):
        where = "the network" if differ[0] in layers else what
        raise ValueError(
            f"{what} does not fit: batch normalization {differ[0]!r} is in {where} alone. Convert or edit "
            "the network before its domains are stored"
        )
    for path, layer in layers.items():
        has = state_of({path: layer})[path]
        if has.keys() != state[path].keys():
            raise ValueError(
                f"{what} does not fit: layer {path!r} has {sorted(has)}, not {sorted(state[path])}"
            )
        for name, value in state[path].items():
            _check_tensor(value, has[name], f"{what} does not fit: {path}.{name}")


def _check_tensor(value: Tensor, like: Tensor, what: str) -> None:
    if value.shape != like.shape or value.is_floating_point() != like.is_floating_point():
        raise ValueError(
            f"{what} has {value.dtype} of shape {tuple(value.shape)} where the layer has {like.dtype} of "
            f"shape {tuple(like.shape)}"
        )
