"""A diagnosis as one HTML page: findings, a map of the network, and what each layer receives."""

import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from batchnorm.doctor.diagnosis import LEVELS, Diagnosis, Finding
from batchnorm.doctor.observe import BINS
from batchnorm.files import write_bytes
from batchnorm.report import embedded

_MOST_CHANNELS = 512


def write_page(diagnosis: Diagnosis, path: str | os.PathLike[str], title: str) -> Path:
    """Write the page, whole or not at all; it asks for nothing from outside.

    Args:
        diagnosis: What to show.
        path: Where to; an older file is replaced.
        title: Of the page.

    Raises:
        OSError: The file cannot be written.
    """
    environment = Environment(
        loader=PackageLoader("batchnorm.doctor"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("doctor.html.jinja").render(
        title=title,
        diagnosis=diagnosis,
        stops=_stops(diagnosis),
        layers=embedded(_layers(diagnosis)),
        edges=embedded(BINS.numpy()),
        version=version("batchnorm"),
    )
    write_bytes(Path(path), html.encode())
    return Path(path)


def _stops(diagnosis: Diagnosis) -> list[dict[str, Any]]:
    """The boxes of the map: all modules on the data's way, and what a finding names beside them."""
    of_layer: dict[str, list[tuple[int, Finding]]] = {}
    for number, finding in enumerate(diagnosis.findings, 1):
        for name in finding.layers:
            of_layer.setdefault(name, []).append((number, finding))
    normalizations = {layer.name for layer in diagnosis.layers}
    known = [(stop.name, stop.kind, stop.shape) for stop in diagnosis.route]
    met = {name for name, _, _ in known}
    known += [(name, "", ()) for name in of_layer if name not in met]
    boxes = []
    for name, kind, shape in known:
        about = of_layer.get(name, [])
        levels = [finding.level for _, finding in about]
        boxes.append(
            {
                "name": name,
                "kind": kind,
                "shape": "×".join(map(str, shape[1:])),
                "norm": name in normalizations,
                "level": min(levels, key=LEVELS.index) if levels else "",
                "numbers": [number for number, _ in about],
            }
        )
    return boxes


def _layers(diagnosis: Diagnosis) -> Mapping[str, Any]:
    """What the page draws of each normalization; of very wide ones, evenly spread channels."""
    drawn = {}
    for layer in diagnosis.layers:
        step = -(-layer.channels // _MOST_CHANNELS)
        mean, var = (np.array(values)[::step] for values in (layer.mean, layer.var))
        std = np.sqrt(np.maximum(var, 1e-30))
        stored = np.array(layer.running_mean)[::step], np.array(layer.running_var)[::step]
        has_stored = len(layer.running_mean) > 0
        with np.errstate(invalid="ignore", divide="ignore"):
            drawn[layer.name] = {
                "kind": layer.kind,
                "channels": layer.channels,
                "histogram": layer.histogram,
                "mean_off": layer.mean_off,
                "std_off": layer.std_off,
                "noise": layer.noise,
                "shift": (stored[0] - mean) / std if has_stored else [],
                "ratio": np.log2(np.sqrt(np.maximum(stored[1], 0)) / std) if has_stored else [],
            }
    return drawn
