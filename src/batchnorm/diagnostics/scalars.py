"""Records as curves in TensorBoard."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from batchnorm import files

_SINGLE = (
    "drift",
    "noise",
    "num_nonfinite",
    "gradient_rms",
    "weight_rms",
    "bias_rms",
    "weight_gradient_rms",
    "update",
    "running_mean_gap",
    "running_std_gap",
)


class Scalars:
    """Writes ``LAYER/mean``, ``LAYER/std``, ``LAYER/p50``, ``LAYER/drift`` and so on.

    Args:
        target: A folder, or a ``SummaryWriter`` (anything with ``add_scalar`` and ``flush``), which is
            left open for its owner.

    Raises:
        ImportError: A folder is given and TensorBoard is not installed.
        TypeError: It is neither.
        OSError: The folder cannot be made.
    """

    def __init__(self, target: Any) -> None:
        self._is_ours = isinstance(target, str | os.PathLike)
        self._place = Path(target if self._is_ours else getattr(target, "log_dir", "TensorBoard's folder"))
        if self._is_ours:
            try:
                # Imported here: it takes long, and is no dependency of the library.
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError(
                    'TensorBoard is missing: pip install "batchnorm[train]", or watch without tensorboard='
                ) from error
            with files.explained(self._place):
                target = SummaryWriter(str(target))
        elif not (hasattr(target, "add_scalar") and hasattr(target, "flush")):
            raise TypeError(
                f"tensorboard must be a folder or a SummaryWriter, got {type(target).__name__}: {target!r}"
            )
        self._writer = target

    def write(self, layer: str, levels: Sequence[float], record: Mapping[str, Any]) -> None:
        """One record of one layer: means over the kept units, percentiles over all."""
        named = {
            "mean": record["mean"].mean(),
            "std": np.sqrt(record["var"]).mean(),
            **{f"p{level:g}": value for level, value in zip(levels, record["pooled"], strict=True)},
            **{name: record[name] for name in _SINGLE if record.get(name) is not None},
        }
        with files.explained(self._place):
            for name, value in named.items():
                self._writer.add_scalar(f"{layer or 'model'}/{name}", float(value), record["step"])

    def close(self) -> None:
        """Make sure that everything is written; close what was opened here."""
        with files.explained(self._place):
            if self._is_ours:
                self._writer.close()
            else:
                self._writer.flush()
