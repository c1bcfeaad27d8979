"""Hooks that summarize activations as they pass, and keep the summaries."""

import copy
import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from batchnorm.diagnostics.history import LayerHistory, save_histories, table
from batchnorm.diagnostics.running_gap import Running
from batchnorm.diagnostics.scalars import Scalars
from batchnorm.diagnostics.scales import Scales
from batchnorm.diagnostics.sketch import Sketch, sampling_error
from batchnorm.diagnostics.stream import Stream
from batchnorm.diagnostics.summary import Samples, Summary, drift, summarize
from batchnorm.diagnostics.watched import Given, check, given_to, gives_standardized, with_units
from batchnorm.layers.running import is_recomputation
from batchnorm.moments import Moments


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `watch` was asked for; see there."""

    every: int
    percentiles: tuple[float, ...]
    on: str
    during: str
    max_samples: int
    keep_units: int | None
    channel_dim: int | None
    gradients: bool
    window: int | None
    seed: int


@dataclass
class _Step:
    """A recorded forward pass under way: what it has shown so far, by layer."""

    samples: dict[str, Samples] = field(default_factory=dict)
    scales: dict[str, Scales] = field(default_factory=dict)
    running: dict[str, Running] = field(default_factory=dict)
    standardized: set[str] = field(default_factory=set)


class Recorder:
    """Collects what `watch` was asked for; made by `watch`.

    Attributes:
        layers: Paths of the watched modules.
        num_steps: Forward passes counted so far.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[str], options: Options, scalars: Scalars | None = None
    ) -> None:
        self.layers = tuple(layers)
        self.num_steps = 0
        self._options, self._scalars = options, scalars
        self._last: dict[str, Summary] = {}
        self._records: dict[str, list[dict[str, Any]]] = {name: [] for name in layers}
        self._units: dict[str, np.ndarray[Any, Any]] = {}
        self._streams: dict[str, Stream] = {}
        self._open: _Step | None = None
        # Records of one step whose gradients and update are not known yet.
        self._unsettled: list[tuple[str, dict[str, Any], Scales]] = []
        self._watched = [(name, weakref.ref(model.get_submodule(name))) for name in layers if name]
        self._handles = [model.register_forward_pre_hook(_OnlyFor(model, self._begin), with_kwargs=True)]
        # All other hooks are there in recorded steps only: the rest shall cost nothing.
        self._inner: list[RemovableHandle] = []

    def _begin(self, root: nn.Module, args: Any, kwargs: Any) -> None:
        if is_recomputation():
            return  # by checkpointing of the whole model; the first run was the step
        if self._open is not None:
            self._drop()  # what a forward pass that was interrupted had left behind
        during, every = self._options.during, self._options.every
        counts = during == "both" or root.training == (during == "training")
        records = counts and self.num_steps % every == 0
        if self._unsettled:
            self._settle(at_once=records)
        self.num_steps += counts
        if not records:
            return
        self._open = _Step()
        self._inner += [
            root.register_forward_hook(_OnlyFor(root, self._end), with_kwargs=True),
            # After the other: where the forward raises, this one alone is called.
            root.register_forward_hook(_OnlyFor(root, self._abandon), always_call=True),
        ]
        if "" in self.layers:
            self._enter("", root, args, kwargs)
        for name, reference in self._watched:
            if (module := reference()) is None:
                continue
            # Inputs before the module runs, which may overwrite them or move its statistics by them.
            enter = _OnlyFor(module, partial(self._enter, name))
            self._inner.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            if self._options.on == "output":
                leave = _OnlyFor(module, partial(self._leave, name))
                self._inner.append(module.register_forward_hook(leave, with_kwargs=True))

    def _abandon(self, root: nn.Module, args: Any, output: Any) -> None:
        self._drop()

    def _drop(self) -> None:
        if self._open is not None:
            for scales in self._open.scales.values():
                scales.close()
        self._open = None
        for handle in self._inner:
            handle.remove()
        self._inner.clear()

    def _enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        step, on_input = self._open, self._options.on == "input"
        has_statistics = isinstance(module, _BatchNorm) and module.running_mean is not None
        if step is None or not (on_input or has_statistics):
            return
        if (given := given_to(module, args, kwargs)) is None:
            return
        x, mask = check(given.x, name, "input"), given.mask
        if on_input:
            samples = self._see(name, module, x, mask)
        if has_statistics:
            if on_input and self._options.channel_dim is None:
                batch = samples.moments
            else:  # whatever was chosen as units, statistics are of the layer's channels
                x, mask, dim = with_units(name, module, x, mask, None)
                batch = Moments.of(x, channel_dim=dim, mask=mask)
            running = Running.of(module, batch)
            step.running[name] = step.running[name].merge(running) if name in step.running else running

    def _leave(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._open is None:
            return
        given = given_to(module, args, kwargs) or Given(None)
        self._see(name, module, check(output, name, "output"), given.mask)
        if gives_standardized(module, given):
            self._open.standardized.add(name)

    def _see(self, name: str, module: nn.Module, x: Tensor, mask: Tensor | None) -> Samples:
        step, options = self._open, self._options
        assert step is not None
        if options.gradients:
            if name not in step.scales:
                step.scales[name] = Scales()
                step.scales[name].follow_parameters(module)
            step.scales[name].follow_activation(x)
        x, mask, dim = with_units(name, module, x, mask, options.channel_dim)
        with torch.no_grad():
            seen = Samples.of(
                x, channel_dim=dim, mask=mask, max_samples=options.max_samples, seed=options.seed
            )
            merged = name in step.samples
            step.samples[name] = step.samples[name].merge(seen, options.seed) if merged else seen
        return seen

    def _end(self, root: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._open is None:
            return
        if "" in self.layers and self._options.on == "output":
            self._leave("", root, args, kwargs, output)
        step = self._open
        for name, samples in step.samples.items():
            record = self._record(name, samples, standardized=name in step.standardized)
            if name in step.running:
                record["running_mean_gap"], record["running_std_gap"] = step.running[name].gaps()
            self._records[name].append(record)
            self._unsettled.append((name, record, step.scales.pop(name, None) or Scales()))
        self._drop()

    def _record(self, name: str, samples: Samples, *, standardized: bool) -> dict[str, Any]:
        options = self._options
        summary = summarize(samples, options.percentiles, standardized=standardized)
        last, num_units, step = self._last.get(name), len(summary.mean), self.num_steps - 1
        if last is not None and len(last.mean) != num_units:
            raise ValueError(
                f"module {name!r} has {num_units} units at step {step} and had {len(last.mean)} before: name "
                "the dimension that stays the same with channel_dim=, or leave it out of layers="
            )
        if name not in self._units:
            kept = num_units if options.keep_units is None else min(options.keep_units, num_units)
            self._units[name] = np.arange(kept) * num_units // max(kept, 1)
            self._streams[name] = Stream(kept, options.percentiles, window=options.window, seed=options.seed)
        units = self._units[name]
        self._streams[name].add(step, samples.rows[:, units])
        self._last[name] = summary
        return {
            "step": step,
            "mean": summary.mean[units],
            "var": summary.var[units],
            "percentiles": summary.percentiles[:, units],
            "pooled": summary.pooled,
            "sampling_error": sampling_error(len(samples.rows), samples.num_seen),
            "drift": 0.0 if last is None else drift(last, summary),
            "noise": summary.noise,
            "num_nonfinite": summary.num_nonfinite,
        }

    def _settle(self, *, at_once: bool, close: bool = True) -> None:
        """Complete the records of a step, as soon as the optimizer has moved a weight or ``at_once``.

        Without ``close`` what may still come is waited for.
        """
        pending = self._unsettled
        stepped = any(scales.has_moved for _, _, scales in pending)
        waits = any(scales.has_weight for _, _, scales in pending) and not stepped
        if waits and not at_once:
            return
        for name, record, scales in pending:
            record.update(scales.found(stepped=stepped))
            if close:
                scales.close()
                if self._scalars is not None:
                    self._scalars.write(name, self._options.percentiles, record)
        if close:
            self._unsettled = []

    @property
    def history(self) -> dict[str, LayerHistory]:
        """What has been recorded so far, by layer; layers never called have no records."""
        self._settle(at_once=True, close=False)
        none = np.arange(0)
        return {
            name: LayerHistory.of(
                self._records[name],
                self._streams[name].windows() if name in self._streams else [],
                levels=self._options.percentiles,
                units=self._units.get(name, none),
            )
            for name in self.layers
        }

    def sketch(self, layer: str) -> Sketch:
        """A copy of the sketch of all samples that one layer's percentiles were ever taken of.

        It answers for any level, and merges with those of other ranks or runs (`Sketch.merge`),
        which were watched with another ``seed``. Its units are `LayerHistory.units`.

        Raises:
            ValueError: The layer is not watched, or nothing of it has been recorded yet.
        """
        if layer not in self._streams:
            if layer in self.layers:
                raise ValueError(f"nothing of layer {layer!r} has been recorded yet")
            raise ValueError(
                f"layer {layer!r} is not watched; watched are {', '.join(map(repr, self.layers))}"
            )
        return copy.deepcopy(self._streams[layer].run)

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
        self._settle(at_once=True)
        if self._scalars is not None:
            self._scalars.close()
            self._scalars = None

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _OnlyFor:
    """A hook that calls ``method`` for ``module`` itself; a copy of it, pickled or not, does nothing."""

    def __init__(self, module: nn.Module | None = None, method: Callable[..., None] | None = None) -> None:
        self._module, self._method = None if module is None else weakref.ref(module), method

    def __call__(self, called: nn.Module, *args: Any) -> None:
        if self._module is not None and self._method is not None and called is self._module():
            self._method(called, *args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _OnlyFor, ()
