"""What the normalization layers of a model receive while data pass through it in a chosen mode."""

import statistics
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.doctor.data import Loss, loss_of, run_batch, size_of, tensors_of
from batchnorm.layers import BatchNormPerActivation, Normalization
from batchnorm.moments import Moments
from batchnorm.statistics.feeding import Forward
from batchnorm.statistics.passes import call_moments

AS_IT_IS = "as it is"
BINS = torch.linspace(-5, 5, 42, dtype=torch.float64)
"""Edges of the histograms, in deviations of the running statistics."""


class _Leave(BaseException):
    """Ends a batch that cannot be normalized by itself; not an Exception, which a model might catch."""


@dataclass
class Seen:
    """The inputs of one layer.

    Attributes:
        calls: Moments over all batches of the first, second, … call within a forward pass, float64.
        batch_means: Of each batch that was left whole, over all calls, shape (C,).
        sizes: Examples of each of these.
        example_means: Moments over examples of their own channel means.
        histogram: Counts between `BINS`, the outer ones with all that is beyond; of the first batches.
        dtype: Of the input.
    """

    calls: list[Moments] = field(default_factory=list)
    batch_means: list[Tensor] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    example_means: Moments | None = None
    histogram: Tensor | None = None
    dtype: torch.dtype = torch.float32

    @property
    def moments(self) -> Moments:
        """Over all batches and calls."""
        return Moments.merged(self.calls)

    @property
    def usual_size(self) -> int:
        """The commonest batch size."""
        return statistics.mode(self.sizes)

    def noise(self, eps: float) -> float:
        """Deviation of a batch's mean, in deviations of the samples, root mean square over channels.

        From the scatter of the examples' own means, for the samples of one image are not independent.
        """
        if self.example_means is None or not self.sizes:
            return float("nan")
        whole = self.moments
        of_mean = self.example_means.unbiased() / self.usual_size
        return float((of_mean / (whole.var + eps)).mean().sqrt())

    def unevenness(self) -> float:
        """Variance between the means of batches over what examples drawn at random would give; about 1."""
        usual = [m for m, n in zip(self.batch_means, self.sizes, strict=True) if n == self.usual_size]
        if self.example_means is None or len(usual) < 8:
            return float("nan")
        between, within = torch.stack(usual).var(0), self.example_means.unbiased() / self.usual_size
        counts = within > 1e-12 * (self.moments.var + self.moments.mean.square())
        return float((between[counts] / within[counts]).mean()) if counts.any() else float("nan")


@dataclass
class Observation:
    """One pass of the data in one mode.

    Attributes:
        seen: Layers that were reached, by path, in the order in which data reach them.
        outputs: Of each batch that went through, its float tensors.
        losses: Mean loss of each, where there is one.
        sizes: Examples in each (1 where unknown).
        single: (batch, layer) where a layer had one value a channel to normalize by.
        not_finite: (batch, layer) where an input was not finite.
    """

    seen: dict[str, Seen] = field(default_factory=dict)
    outputs: list[list[Tensor]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    single: list[tuple[int, str]] = field(default_factory=list)
    not_finite: list[tuple[int, str]] = field(default_factory=list)

    @property
    def loss(self) -> float | None:
        """Mean over examples, or None without losses."""
        if not self.losses or len(self.losses) < len(self.sizes):
            return None
        weighed = sum(loss * size for loss, size in zip(self.losses, self.sizes, strict=True))
        return weighed / sum(self.sizes)


def norms_of(model: nn.Module) -> dict[str, _BatchNorm]:
    """All batch normalizations, by path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def is_frozen(layer: _BatchNorm) -> bool:
    """Whether the layer keeps to its running statistics in training mode."""
    return isinstance(layer, Normalization) and layer.frozen


@torch.no_grad()
def observe(
    model: nn.Module,
    batches: Sequence[Any],
    mode: str,
    *,
    forward: Forward | None = None,
    loss: Loss | None = None,
    resting: Collection[str] = (),
) -> Observation:
    """Run the batches in a mode; running statistics and training flags are afterwards as before.

    Args:
        model: Any; called as it is.
        batches: What to run.
        mode: "inference"; "batch", in which only the normalizations are in training mode; "training"; or
            "as it is".
        forward: As in `batchnorm.recalibrate`.
        loss: As in `batchnorm.doctor.data.loss_of`.
        resting: Normalizations that stay in evaluation mode.
    """
    found, layers = Observation(), norms_of(model)
    with held(model), ExitStack() as hooks, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if mode != AS_IT_IS:
            set_mode(model, mode, resting)
        watcher = _Watcher(found, layers, by_batch=mode in ("batch", "training"))
        for name, layer in layers.items():
            hooks.callback(watcher.on(name, layer).remove)
        for index, batch in enumerate(batches):
            watcher.begin(index, size_of(batch))
            try:
                output = run_batch(model, batch, index, forward)
            except _Leave:
                watcher.drop()
                continue
            watcher.keep()
            found.outputs.append([t.detach() for t in tensors_of(output)])
            found.sizes.append(size_of(batch) or 1)
            of_batch = loss_of(output, batch, loss)
            if of_batch is not None:
                found.losses.append(of_batch)
    return found


class _Watcher:
    """Hooks before the layers; what a batch shows is kept only if the whole batch goes through."""

    def __init__(self, found: Observation, layers: dict[str, _BatchNorm], *, by_batch: bool) -> None:
        self.found, self.layers, self.by_batch = found, layers, by_batch

    def on(self, name: str, layer: _BatchNorm) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            self._enter(name, layer, args, kwargs)

        return layer.register_forward_pre_hook(hook, with_kwargs=True)

    def begin(self, index: int, size: int | None) -> None:
        self.index, self.size = index, size
        self.pending: dict[str, list[tuple[Moments, Tensor, torch.dtype]]] = {}

    def drop(self) -> None:
        self.pending = {}

    def _enter(self, name: str, layer: _BatchNorm, args: Any, kwargs: Any) -> None:
        moments = call_moments(layer, args, kwargs)
        x = args[0] if args else next(iter(kwargs.values()))
        if not (moments.mean.isfinite() & moments.var.isfinite()).all():
            self.found.not_finite.append((self.index, name))
            if self.by_batch:
                raise _Leave
        elif self.by_batch and layer.training and not is_frozen(layer) and int(moments.count) < 2:
            self.found.single.append((self.index, name))
            raise _Leave
        self.pending.setdefault(name, []).append((moments, x.detach(), x.dtype))

    def keep(self) -> None:
        for name, calls in self.pending.items():
            seen = self.found.seen.setdefault(name, Seen())
            for position, (moments, _, dtype) in enumerate(calls):
                if position < len(seen.calls):
                    seen.calls[position] = seen.calls[position].merge(moments)
                else:
                    seen.calls.append(moments)
                seen.dtype = dtype
            seen.batch_means.append(Moments.merged(m for m, _, _ in calls).mean)
            layer = self.layers[name]
            examples = [by_example(layer, x) for _, x, _ in calls]
            of_batch = Moments.of(torch.stack(examples).mean(0) if _alike(examples) else examples[0])
            seen.sizes.append(len(examples[0]))
            whole = seen.example_means
            seen.example_means = of_batch if whole is None else whole.merge(of_batch)
            if len(seen.batch_means) <= 4:
                counts = _histogram(layer, calls[0][1])
                if counts is not None:
                    seen.histogram = counts if seen.histogram is None else seen.histogram + counts
        self.pending = {}


def _alike(tensors: Sequence[Tensor]) -> bool:
    return len({t.shape for t in tensors}) == 1


def by_example(layer: _BatchNorm, x: Tensor) -> Tensor:
    """Means of each example's channels, float64, shape (N, C)."""
    return _samples(layer, x).mean(1)


def _samples(layer: _BatchNorm, x: Tensor) -> Tensor:
    """An input as (N, L, C) in float64; each activation is a channel where the layer has it so."""
    x = x.double()
    if isinstance(layer, BatchNormPerActivation):
        return x.flatten(1).unsqueeze(1)
    if getattr(layer, "channel_dim", 1) == -1:
        return x.reshape(len(x), -1, x.shape[-1])
    return x.flatten(2).transpose(1, 2) if x.dim() > 2 else x.unsqueeze(1)


def _histogram(layer: _BatchNorm, x: Tensor) -> Tensor | None:
    if layer.running_mean is None:
        return None
    scale = (layer.running_var.double() + layer.eps).rsqrt().flatten()
    values = ((_samples(layer, x) - layer.running_mean.double().flatten()) * scale).flatten()
    values = values[:: max(1, len(values) // 20_000)]
    values = values[values.isfinite()].clamp(-4.999, 4.999).cpu()
    return torch.histc(values, bins=len(BINS) - 1, min=float(BINS[0]), max=float(BINS[-1]))


def set_mode(model: nn.Module, mode: str, resting: Collection[str] = ()) -> None:
    """Training flags as the mode wants them, one by one: an overridden ``train`` has no say."""
    for name, module in model.named_modules():
        wanted = mode == "training" or (mode == "batch" and isinstance(module, _BatchNorm))
        module.training = wanted and name not in resting


@contextmanager
def held(model: nn.Module) -> Iterator[None]:
    """Training flags, buffers of normalizations and gradients come out as they went in."""
    flags = [(module, module.training) for module in model.modules()]
    saved = [(b, b.clone()) for layer in norms_of(model).values() for b in layer.buffers(recurse=False)]
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag
        with torch.no_grad():
            for buffer, value in saved:
                buffer.copy_(value)
