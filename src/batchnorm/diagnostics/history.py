"""What a `Recorder` has seen of each layer, as arrays; on disk as JSON or npz."""

import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchnorm.files import write_bytes
from batchnorm.reading import read_arrays, read_json

Array = NDArray[np.float64]


@dataclass(frozen=True)
class LayerHistory:
    """One layer over T records, P percentiles and the U units that were kept.

    Attributes:
        step: Training step (or count of forward passes) of each record, shape (T,).
        units: Which units were kept, shape (U,).
        levels: The percentiles' levels, 0 to 100, shape (P,).
        mean: Mean of each kept unit, shape (T, U).
        var: Biased variance of each kept unit, shape (T, U).
        percentiles: Of each kept unit, shape (T, P, U).
        pooled: Percentiles over all units of the layer together, shape (T, P).
        drift: Movement since the record before, in deviations, averaged over percentiles and
            *all* units; 0 for the first. See `batchnorm.diagnostics.summary.drift`. Shape (T,).
        noise: The part of ``drift`` that the finite batch explains: about what it would be if the
            network stood still. Shape (T,).
        num_nonfinite: Values that were nan or infinite, shape (T,).
    """

    step: Array
    units: Array
    levels: Array
    mean: Array
    var: Array
    percentiles: Array
    pooled: Array
    drift: Array
    noise: Array
    num_nonfinite: Array

    @property
    def total_drift(self) -> float:
        """Length of the whole path: the sum of ``drift`` over all records, in deviations."""
        return float(self.drift.sum())


def table(histories: Mapping[str, LayerHistory]) -> str:
    """The last record of every layer and its drift, as text."""
    header = [
        "layer",
        "records",
        "last step",
        "mean",
        "std",
        "percentiles",
        "drift/record",
        "noise",
        "total drift",
    ]
    header.append("non-finite")
    rows = [header]
    for name, layer in histories.items():
        if not len(layer.step):
            rows.append([name or "(model)", "0", *["-"] * (len(header) - 2)])
            continue
        moved = layer.drift[1:].mean() if len(layer.drift) > 1 else 0.0
        rows.append(
            [
                name or "(model)",
                str(len(layer.step)),
                str(int(layer.step[-1])),
                f"{layer.mean[-1].mean():.3g}",
                f"{np.sqrt(layer.var[-1]).mean():.3g}",
                " ".join(f"{value:.3g}" for value in layer.pooled[-1]),
                f"{moved:.3f}",
                f"{layer.noise.mean():.3f}",
                f"{layer.total_drift:.3g}",
                str(int(layer.num_nonfinite.sum())),
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def save_histories(histories: Mapping[str, LayerHistory], path: str | os.PathLike[str]) -> Path:
    """Write ``histories`` to a ``.json`` or ``.npz`` file, whole or not at all.

    In JSON, values that are not finite become ``null``; in npz every array is
    ``"<layer>/<field>"``. Neither holds pickled objects.

    Raises:
        ValueError: The name ends in neither ``.json`` nor ``.npz``.
        OSError: The file cannot be written; an older one is left as it was.
    """
    path = Path(path)
    if path.suffix not in (".json", ".npz"):
        raise ValueError(f"a history is saved as .json or .npz, got {path.name!r}")
    arrays = {
        name: {f.name: getattr(layer, f.name) for f in fields(layer)} for name, layer in histories.items()
    }
    if path.suffix == ".json":
        plain = {name: {key: _plain(a) for key, a in layer.items()} for name, layer in arrays.items()}
        write_bytes(path, json.dumps(plain, allow_nan=False).encode())
    else:
        whole = io.BytesIO()
        flat = {f"{name}/{key}": a for name, layer in arrays.items() for key, a in layer.items()}
        np.savez_compressed(whole, **flat)
        write_bytes(path, whole.getvalue())
    return path


def load_histories(path: str | os.PathLike[str]) -> dict[str, LayerHistory]:
    """What `Recorder.save` wrote, by layer.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is neither ``.json`` nor ``.npz``, or not a history.
    """
    path = Path(path)
    layers: dict[str, dict[str, Any]] = {}
    try:
        if path.suffix == ".json":
            layers = read_json(path)
        elif path.suffix == ".npz":
            for key, values in read_arrays(path).items():
                name, _, field = key.rpartition("/")
                layers.setdefault(name, {})[field] = values
        else:
            raise ValueError(f"a history ends in .json or .npz, got {path.name!r}")
        return {
            name: LayerHistory(**{key: np.asarray(values, dtype=np.float64) for key, values in layer.items()})
            for name, layer in layers.items()
        }
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} does not hold histories of layers: {error}") from error


def _plain(values: Array) -> Any:
    plain = values.astype(object)
    plain[~np.isfinite(values)] = None
    return plain.tolist()
