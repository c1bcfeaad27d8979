"""What a `Recorder` has seen of each layer, as arrays; on disk as JSON or npz."""

import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchnorm.diagnostics.stream import Window
from batchnorm.files import write_bytes
from batchnorm.reading import read_arrays, read_json

Array = NDArray[np.float64]


@dataclass(frozen=True)
class LayerHistory:
    """One layer over T records, P percentiles and the U units that were kept.

    What was not recorded is nan: gradients of a pass without backward, weights of a layer without.

    Attributes:
        step: Training step (or count of forward passes) of each record, shape (T,).
        units: Which units were kept, shape (U,).
        levels: The percentiles' levels, 0 to 100, shape (P,).
        mean: Mean of each kept unit, shape (T, U).
        var: Biased variance of each kept unit, shape (T, U).
        percentiles: Of each kept unit, shape (T, P, U).
        pooled: Percentiles over all units of the layer together, shape (T, P); of at most 65,536 / U
            samples of each unit, so that their ranks' error is that of so many (`sampling_error`).
        sampling_error: Bound on the error of the ranks of ``percentiles``, as a share of all
            samples, for each of them with probability 99 %; 0 where all samples were used. See
            `batchnorm.diagnostics.sketch.sampling_error`. Shape (T,).
        drift: Movement since the record before, in deviations, averaged over percentiles and
            *all* units; 0 for the first. See `batchnorm.diagnostics.summary.drift`. Shape (T,).
        noise: The part of ``drift`` that the finite batch explains: about what it would be if the
            network stood still. nan for a batch of one example. Shape (T,).
        num_nonfinite: Values that were nan or infinite, shape (T,).
        gradient_rms: Root of the mean square of the loss's gradient with respect to the watched
            activation, over all its values (those of every backward pass, if several follow); as the
            backward pass has it, so with the factor of a loss scaler. Shape (T,).
        weight_rms: Of the module's own ``weight`` (γ of a batch normalization), shape (T,).
        bias_rms: Of its own ``bias`` (β), shape (T,).
        weight_gradient_rms: Of the weight's gradient as backward passes had accumulated it when the
            optimizer stepped: on this rank before ranks are averaged, and before it is unscaled or
            clipped. Shape (T,).
        update: How far the first write to the weight after the record moved it (the optimizer's
            step): norm of the change over norm of the weight, shape (T,).
        running_mean_gap: How far the running mean was from the batch's, in deviations, averaged
            over channels. See `batchnorm.diagnostics.running_gap.Running.gaps`. Shape (T,).
        running_std_gap: The same of the running deviation, in natural logarithms (0.69 is a factor
            of two), shape (T,).
        window_first: Step of the first record of each of V windows, shape (V,). One window covers
            the run, unless `watch` was told otherwise.
        window_last: Step of the last record in it, shape (V,).
        window_count: Samples of each unit in it, shape (V,).
        window_percentiles: Of each kept unit over all these records, shape (V, P, U).
        window_pooled: The same over the kept units together, shape (V, P).
        window_error: Bound on the error of their ranks among the samples taken, as a share, for
            each of them with probability 99 %. See `Sketch`. Shape (V,).
    """

    step: Array
    units: Array
    levels: Array
    mean: Array
    var: Array
    percentiles: Array
    pooled: Array
    sampling_error: Array
    drift: Array
    noise: Array
    num_nonfinite: Array
    gradient_rms: Array
    weight_rms: Array
    bias_rms: Array
    weight_gradient_rms: Array
    update: Array
    running_mean_gap: Array
    running_std_gap: Array
    window_first: Array
    window_last: Array
    window_count: Array
    window_percentiles: Array
    window_pooled: Array
    window_error: Array

    @classmethod
    def of(
        cls,
        records: Sequence[Mapping[str, Any]],
        windows: Sequence[Window],
        *,
        levels: Sequence[float],
        units: NDArray[Any],
    ) -> "LayerHistory":
        """The history of one layer from its records; what a record lacks becomes nan."""
        found: dict[str, Any] = {"levels": levels, "units": units}
        for name, dims in _DIMS.items():
            if dims[0] == "T":
                found[name] = [record.get(name) for record in records]
            elif dims[0] == "V":
                found[name] = [getattr(window, name.removeprefix("window_")) for window in windows]
        return _shaped(found)

    @property
    def total_drift(self) -> float:
        """Length of the whole path: the sum of ``drift`` over all records, in deviations."""
        return float(self.drift.sum())


_DIMS = {"units": "U", "levels": "P", "mean": "TU", "var": "TU", "percentiles": "TPU", "pooled": "TP"}
_DIMS |= {"window_percentiles": "VPU", "window_pooled": "VP"}
_DIMS |= {f.name: "V" if "window" in f.name else "T" for f in fields(LayerHistory) if f.name not in _DIMS}
"""Dimensions of each field."""


def _shaped(found: Mapping[str, Any]) -> LayerHistory:
    """Arrays of the right shapes, whatever held them: JSON tells no shape of what is empty.

    Raises:
        ValueError: A shape does not fit, or a field is missing.
        TypeError: There is a field too many.
    """
    arrays = {name: np.asarray(values, dtype=np.float64) for name, values in found.items()}
    if missing := _DIMS.keys() - arrays.keys():
        raise ValueError(f"no {', '.join(sorted(missing))}")
    sizes = {"T": "step", "P": "levels", "U": "units", "V": "window_last"}
    size = {dim: len(np.atleast_1d(arrays[name])) for dim, name in sizes.items()}
    for name, dims in _DIMS.items():
        arrays[name] = arrays[name].reshape(tuple(size[dim] for dim in dims))
    return LayerHistory(**arrays)


def table(histories: Mapping[str, LayerHistory]) -> str:
    """The last record of every layer and its drift, as text; "-" for what was not recorded."""
    rows = [list(_COLUMNS)]
    for name, layer in histories.items():
        if len(layer.step):
            rows.append([name or "(model)", *(column(layer) for column in list(_COLUMNS.values())[1:])])
        else:
            rows.append([name or "(model)", "0", *["-"] * (len(_COLUMNS) - 2)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _last(values: Array) -> str:
    known = values[~np.isnan(values)]
    return f"{known[-1]:.3g}" if len(known) else "-"


def _mean(values: Array) -> str:
    known = values[~np.isnan(values)]
    return f"{known.mean():.3f}" if len(known) else "-"


_COLUMNS: dict[str, Callable[[LayerHistory], str]] = {
    "layer": lambda layer: "",
    "records": lambda layer: str(len(layer.step)),
    "last step": lambda layer: str(int(layer.step[-1])),
    "mean": lambda layer: f"{layer.mean[-1].mean():.3g}",
    "std": lambda layer: f"{np.sqrt(layer.var[-1]).mean():.3g}",
    "percentiles": lambda layer: " ".join(f"{value:.3g}" for value in layer.pooled[-1]),
    "drift/record": lambda layer: _mean(layer.drift[1:]) if len(layer.drift) > 1 else "0.000",
    "noise": lambda layer: _mean(layer.noise),
    "total drift": lambda layer: f"{layer.total_drift:.3g}",
    "gradient": lambda layer: _last(layer.gradient_rms),
    "weight": lambda layer: _last(layer.weight_rms),
    "update": lambda layer: _last(layer.update),
    "running gap": lambda layer: _last(layer.running_mean_gap),
    "non-finite": lambda layer: str(int(np.nansum(layer.num_nonfinite))),
}
"""What `table` says of a layer that has records."""


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
    if path.suffix not in (".json", ".npz"):
        raise ValueError(f"a history ends in .json or .npz, got {path.name!r}")
    layers: dict[str, dict[str, Any]] = {}
    try:
        if path.suffix == ".json":
            layers = read_json(path)
        else:
            for key, values in read_arrays(path).items():
                name, _, field = key.rpartition("/")
                layers.setdefault(name, {})[field] = values
        return {name: _shaped(layer) for name, layer in layers.items()}
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} does not hold histories of layers: {error}") from error


def _plain(values: Array) -> Any:
    plain = values.astype(object)
    plain[~np.isfinite(values)] = None
    return plain.tolist()
