"""Watch chosen activations while a network trains, from any training loop."""

import difflib
import fnmatch
import os
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.diagnostics.recorder import Options, Recorder
from batchnorm.diagnostics.scalars import Scalars

_CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def watch(
    model: nn.Module,
    layers: str | Iterable[str] | None = None,
    *,
    every: int = 100,
    percentiles: Sequence[float] = (15, 50, 85),
    on: str = "output",
    during: str = "training",
    max_samples: int = 1024,
    keep_units: int | None = 128,
    channel_dim: int | None = None,
    gradients: bool = True,
    window: int | None = None,
    seed: int = 0,
    tensorboard: str | os.PathLike[str] | Any = None,
) -> Recorder:
    """Record moments, percentiles, drift, gradients and updates at every so many forward passes.

    Works by hooks: the training loop stays as it is, and with or without them it computes the
    same bits. One call of ``model`` is one step; only calls in training mode count. Of every
    recorded step nothing but a few numbers a unit is kept, on the CPU.

    Args:
        model: The network, as the training loop calls it, not compiled.
        layers: Paths of modules, or patterns such as ``"blocks.*.bn1"``. By default what the
            nonlinearities receive: all batch normalizations, or, in a model without any, all
            linear layers and convolutions.
        every: Steps from one record to the next; the first step is recorded.
        percentiles: Levels, 0 to 100. The paper's figure 1 shows 15, 50 and 85.
        on: "output" or "input" of those modules. The output of a fused layer is taken after its
            activation.
        during: "training", "evaluation" or "both": forward passes in which mode count and are
            recorded. Evaluating one fixed batch now and then shows drift without sampling noise.
        max_samples: Samples a unit from which the percentiles are taken, evenly spread over
            examples and locations, for each call of a module. Moments use all samples. What that
            costs in ranks is `LayerHistory.sampling_error`.
        keep_units: Units of each layer whose own curves are kept, evenly spread; ``None`` keeps
            all. Drift and pooled percentiles always come from all units.
        channel_dim: Which dimension holds the units, 1 or -1. By default -1 for linear layers and
            the like and for our layers that say so, else 1.
        gradients: Whether to follow gradients, weights and updates as well. See `LayerHistory` for
            these and for the running statistics of batch normalizations.
        window: Records of each window over which percentiles are taken; ``None`` for one window
            that covers the run. Their error is `LayerHistory.window_error`.
        seed: Of the places that are sampled and of the sketches' coins; PyTorch's generators are
            left alone.
        tensorboard: A folder, or a ``SummaryWriter``, for the same numbers as curves.

    Returns:
        A `Recorder`, to be closed when enough has been seen (it is also a context manager).

    Raises:
        ValueError: A pattern matches no module (close names are listed), an argument is out of
            its range, the model is compiled, or there is nothing to watch. While recording: a tensor
            on the meta device, a number of units that changes, or a mask beside ``channel_dim``.
        TypeError: ``tensorboard`` is neither. While recording: what a module gives or gets is not a
            floating-point tensor.
        ImportError: ``tensorboard`` is a folder and TensorBoard is not installed.

    At the defaults it added 3 to 4.5 % to the processor's time of training steps of a millisecond, and
    less to longer ones: ``batchnorm bench watch``, ``benchmarks/results/watch-*.json``.
    """
    if every < 1 or max_samples < 2:
        raise ValueError(
            f"every must be at least 1 and max_samples at least 2, got {every} and {max_samples}"
        )
    if keep_units is not None and keep_units < 1:
        raise ValueError(f"keep_units must be at least 1, or None for all, got {keep_units}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 record, or None for the whole run, got {window}")
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    if not percentiles or not all(0 <= level <= 100 for level in percentiles):
        raise ValueError(f"percentiles must be levels from 0 to 100, got {tuple(percentiles)}")
    if on not in ("output", "input"):
        raise ValueError(f'on must be "output" or "input", got {on!r}')
    if during not in ("training", "evaluation", "both"):
        raise ValueError(f'during must be "training", "evaluation" or "both", got {during!r}')
    if channel_dim not in (None, 1, -1):
        raise ValueError(f"channel_dim must be 1, -1 or None, got {channel_dim}")
    compiled = [name for name, m in model.named_modules() if hasattr(m, "_orig_mod") or m._compiled_call_impl]
    if compiled:
        raise ValueError(
            f"{compiled[0] or type(model).__name__!r} is compiled, and compiled code may skip hooks: watch "
            "the model before it is compiled, or run it uncompiled while you watch"
        )
    chosen = choose_layers(model, layers)
    options = Options(
        every=every,
        percentiles=tuple(percentiles),
        on=on,
        during=during,
        max_samples=max_samples,
        keep_units=keep_units,
        channel_dim=channel_dim,
        gradients=gradients,
        window=window,
        seed=seed,
    )
    return Recorder(model, chosen, options, None if tensorboard is None else Scalars(tensorboard))


def choose_layers(model: nn.Module, layers: str | Iterable[str] | None) -> list[str]:
    """Paths of the modules that ``layers`` (see `watch`) means, in the model's order.

    Raises:
        ValueError: A pattern matches nothing, or there is nothing to watch by default or by ``layers``.
    """
    modules = dict(model.named_modules())
    if layers is None:
        for kinds in ((_BatchNorm,), (nn.Linear, *_CONVOLUTIONS)):
            found = [name for name, module in modules.items() if isinstance(module, kinds)]
            if found:
                return found
        raise ValueError(
            f"{type(model).__name__} has no batch normalization, linear layer or convolution to watch by "
            "default: name the modules with layers="
        )
    patterns = [layers] if isinstance(layers, str) else list(layers)
    if not patterns:
        raise ValueError("layers names no module: leave it out for those that are watched by default")
    chosen: set[str] = set()
    for pattern in patterns:
        matches = fnmatch.filter(modules, pattern)
        if not matches:
            close = difflib.get_close_matches(pattern, [n for n in modules if n], n=3, cutoff=0.4)
            hint = f"; close: {', '.join(map(repr, close))}" if close else ""
            raise ValueError(
                f"no module of {type(model).__name__} matches {pattern!r}{hint}. "
                "model.named_modules() lists all paths; * stands for any part of one"
            )
        chosen.update(matches)
    return [name for name in modules if name in chosen]
