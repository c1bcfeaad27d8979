"""Hooks that summarize activations as they pass, and keep the summaries."""

import inspect
import os
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from batchnorm.diagnostics.history import LayerHistory, save_histories, table
from batchnorm.diagnostics.summary import Samples, Summary, drift, summarize
from batchnorm.layers import BatchNormPerActivation, Normalization

_FEATURES_LAST = (nn.Linear, nn.Bilinear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.MultiheadAttention)


class Recorder:
    """Collects what `watch` was asked for; made by `watch`.

    Attributes:
        layers: Paths of the watched modules.
        num_steps: Forward passes counted so far.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str],
        *,
        every: int,
        percentiles: Sequence[float],
        on: str,
        during: str,
        max_samples: int,
        keep_units: int | None,
        channel_dim: int | None,
    ) -> None:
        self.layers = tuple(layers)
        self.num_steps = 0
        self._every, self._levels, self._on, self._during = every, tuple(percentiles), on, during
        self._max_samples, self._keep_units, self._channel_dim = max_samples, keep_units, channel_dim
        self._last: dict[str, Summary] = {}
        self._records: dict[str, list[dict[str, Any]]] = {name: [] for name in layers}
        self._units: dict[str, np.ndarray[Any, Any]] = {}
        self._open: dict[str, Samples] | None = None
        self._watched = [(name, weakref.ref(model.get_submodule(name))) for name in layers if name]
        self._handles = [
            model.register_forward_pre_hook(_only_for(model, self._begin)),
            model.register_forward_hook(_only_for(model, self._end), with_kwargs=True),
        ]
        # Hooks of the layers themselves are there in recorded steps only: others shall cost nothing.
        self._inner: list[RemovableHandle] = []

    def _begin(self, root: nn.Module, args: Any) -> None:
        self._drop()  # what a forward pass that raised had left behind
        if self._during != "both" and root.training != (self._during == "training"):
            return
        if self.num_steps % self._every == 0:
            self._open = {}
            for name, reference in self._watched:
                if (module := reference()) is not None:
                    hook = _only_for(module, partial(self._see, name))
                    self._inner.append(module.register_forward_hook(hook, with_kwargs=True))
        self.num_steps += 1

    def _drop(self) -> None:
        self._open = None
        for handle in self._inner:
            handle.remove()
        self._inner.clear()

    @torch.no_grad()
    def _see(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._open is None:
            return
        x, mask = _activation(module, name, self._on, args, kwargs, output)
        channel_dim = self._channel_dim
        if isinstance(module, BatchNormPerActivation) and channel_dim is None:
            x, channel_dim, mask = x.flatten(1), 1, None if mask is None else mask.flatten()
        if channel_dim is None:
            channel_dim = -1 if isinstance(module, _FEATURES_LAST) else getattr(module, "channel_dim", 1)
        if x.dim() < 2:
            x = x.reshape(-1, 1)
        samples = Samples.of(x, channel_dim=channel_dim, mask=mask, max_samples=self._max_samples, seed=0)
        self._open[name] = self._open[name].merge(samples) if name in self._open else samples

    def _end(self, root: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._open is None:
            return
        if "" in self.layers:
            self._see("", root, args, kwargs, output)
        seen = self._open
        self._drop()
        for name, samples in seen.items():
            summary = summarize(samples, self._levels)
            last = self._last.get(name)
            if name not in self._units:
                num_units = len(summary.mean)
                kept = num_units if self._keep_units is None else min(self._keep_units, num_units)
                self._units[name] = np.arange(kept) * num_units // max(kept, 1)
            units = self._units[name]
            self._records[name].append(
                {
                    "step": self.num_steps - 1,
                    "mean": summary.mean[units],
                    "var": summary.var[units],
                    "percentiles": summary.percentiles[:, units],
                    "pooled": summary.pooled,
                    "drift": 0.0 if last is None else drift(last, summary),
                    "noise": summary.noise,
                    "num_nonfinite": summary.num_nonfinite,
                }
            )
            self._last[name] = summary

    @property
    def history(self) -> dict[str, LayerHistory]:
        """What has been recorded so far, by layer; layers never called have no records."""
        return {name: self._history(name) for name in self.layers}

    def _history(self, name: str) -> LayerHistory:
        units = self._units.get(name, np.arange(0))
        num_levels, records = len(self._levels), self._records[name]

        def stacked(key: str, *shape: int) -> np.ndarray[Any, Any]:
            return np.array([record[key] for record in records], dtype=np.float64).reshape(
                len(records), *shape
            )

        return LayerHistory(
            step=stacked("step"),
            units=units.astype(np.float64),
            levels=np.array(self._levels, dtype=np.float64),
            mean=stacked("mean", len(units)),
            var=stacked("var", len(units)),
            percentiles=stacked("percentiles", num_levels, len(units)),
            pooled=stacked("pooled", num_levels),
            drift=stacked("drift"),
            noise=stacked("noise"),
            num_nonfinite=stacked("num_nonfinite"),
        )

    def table(self) -> str:
        """The last record of every layer and how far it has drifted, as text.

        ``drift/record`` is to be read beside ``noise``, which the finite batch alone produces.
        """
        return table(self.history)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the history to a ``.json`` or ``.npz`` file, whole or not at all.

        Read it again with `load_histories`.

        Raises:
            ValueError: The name ends in neither.
            OSError: The file cannot be written.
        """
        return save_histories(self.history, path)

    def close(self) -> None:
        """Remove the hooks; the history stays. Closing twice does nothing more."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._drop()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _only_for(module: nn.Module, method: Callable[..., None]) -> Callable[..., None]:
    """A hook that calls ``method`` for ``module`` itself, not for a copy that took the hook along."""
    mine = weakref.ref(module)

    # A plain function: copying a model copies a bound method's object too, that is the recorder.
    def hook(called: nn.Module, *args: Any) -> None:
        if called is mine():
            method(called, *args)

    return hook


def _activation(
    module: nn.Module, name: str, on: str, args: Any, kwargs: Any, output: Any
) -> tuple[Tensor, Tensor | None]:
    """The watched tensor, detached, and the mask of one of our layers."""
    given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    x = next(iter(given.values()), None) if on == "input" else output
    if isinstance(x, tuple | list) and x:
        x = x[0]
    if not isinstance(x, Tensor) or not x.is_floating_point():
        came = f"a tensor of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(
            f"module {name!r} has {came} as its {on}, and only floating-point tensors (or a tuple that "
            "starts with one) can be watched: leave it out of layers="
        )
    mask = given.get("mask") if isinstance(module, Normalization) else None
    return x.detach(), mask
