"""One pass of the data through a model, with the moments of what its normalization layers receive."""

import inspect
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm import distributed
from batchnorm.layers import Normalization
from batchnorm.moments import Moments
from batchnorm.statistics import feeding
from batchnorm.statistics.feeding import Forward, feed, length, shown
from batchnorm.statistics.own import collected
from batchnorm.statistics.spread import Spread

# Batches whose spread is computed at once: one by one costs small layers as much as the rest of a pass.
_TOGETHER = 64


class _StopHere(BaseException):  # not an Exception: a model's own `except Exception` lets it through
    """Ends a forward pass at a layer whose statistics are not known yet."""


@dataclass
class Pass:
    """What one pass found, over all ranks.

    Attributes:
        moments: Of the inputs of every watched layer that was reached, in float64, flat.
        averages: With ``average=True``, for every such layer the moments over its calls of the
            vector (batch mean, unbiased batch variance, …), flat; each call counts once.
        spreads: With ``spread=True``, how the batches of every such layer differ; all its calls
            within a batch are one batch of samples.
        num_calls: Calls of each reached layer.
        num_batches: Batches that were run.
        exhausted: Whether no rank is known to have more batches.
    """

    moments: dict[str, Moments] = field(default_factory=dict)
    averages: dict[str, Moments] = field(default_factory=dict)
    spreads: dict[str, Spread] = field(default_factory=dict)
    num_calls: dict[str, int] = field(default_factory=dict)
    num_batches: int = 0
    exhausted: bool = True


def call_moments(layer: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Moments:
    """Float64 moments, flat, of what ``layer`` would normalize when called with these arguments.

    Raises:
        ValueError: The layer does not take such an input.
    """
    given = inspect.signature(layer.forward).bind(*args, **kwargs).arguments
    x = next(iter(given.values()))
    layer._check_input_dim(x)
    if isinstance(layer, Normalization):
        moments = layer.moments(x, given.get("mask"))
    else:
        moments = Moments.of(x.detach(), dtype=torch.float64)
    num_channels = layer.num_features
    if moments.mean.numel() != num_channels:
        raise ValueError(f"expected {num_channels} channels, got input of shape {tuple(x.shape)}")
    return moments.flat()


class Passes:
    """Goes through the data as often as asked, the same data each time.

    Every pass starts from the state that torch's random generators had before it and leaves that
    state behind: a loader that shuffles or augments with them repeats itself, and the caller's own
    random stream goes on as if nothing had happened.

    Args:
        model: The model to run; training flags are the caller's business.
        layers: The layers of interest, by path.
        batches: The data, re-iterable if more than one pass is wanted.
        forward: How to call the model with a batch; `feed` when ``None``.
        group: Process group whose ranks share the data, or ``None`` for this process alone.
        progress: Draw a progress bar with rich.
        again: Keep what a one-shot iterator gives, as more than one pass is wanted.

    Attributes:
        limit: Use only so many of the first batches (of each rank); all of them when ``None``.
        num_done: Passes so far.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, _BatchNorm],
        batches: Iterable[Any],
        *,
        forward: Forward | None,
        group: dist.ProcessGroup | None,
        progress: bool,
        again: bool,
    ) -> None:
        self.model, self.layers, self.batches = model, layers, batches
        self.forward: Forward = forward or feed
        self.group, self.progress = group, progress
        self.limit: int | None = None
        self.num_done = 0
        self._kept: list[Any] | None = [] if again and isinstance(batches, Iterator) else None

    def run(
        self,
        watch: Iterable[str],
        *,
        stop: bool = False,
        average: bool = False,
        spread: bool = False,
        own: bool = False,
    ) -> Pass:
        """Run every batch and pool the moments of the inputs of the layers in ``watch``.

        Args:
            watch: Paths of the layers to watch.
            stop: End each batch at the first watched layer that it reaches.
            average: Fill `Pass.averages` too.
            spread: Fill `Pass.spreads` too.
            own: Of layers in training mode take the moments that they normalize with, in the precision
                of their own kernels, instead of computing them once more in float64.

        Raises:
            ValueError: A batch gives a layer values that are not finite or of a shape that it does
                not take, a layer in training mode gets fewer than two samples a channel, or there
                are no batches at all.
            TypeError: The model cannot be called with a batch.
            RuntimeError: Another rank failed.
        """
        self.num_done += 1
        found, error = Pass(), None
        try:
            batches = self._first()
            with same_random_numbers(self.model), eagerly(), distributed.alone():
                options = {"stop": stop, "average": average, "spread": spread, "own": own}
                self._run_here(found, batches, list(watch), **options)
        except Exception as caught:
            if self.group is None:
                raise
            error = caught  # raised once the other ranks, which wait for our moments, know of it
        if self.group is not None:
            found = self._share(found, error, average=average, spread=spread)
        if not found.num_batches:
            again = " (any more: this pass over it, a later one, found nothing)" if self.num_done > 1 else ""
            raise ValueError(f"batches is empty{again}: population statistics need at least one batch")
        return found

    def _first(self) -> Iterable[Any]:
        """The batches to use, up to the limit; a one-shot iterator is drawn from here, outside the replay."""
        batches = self.batches
        if self._kept is not None:
            missing = None if self.limit is None else max(self.limit - len(self._kept), 0)
            self._kept.extend(islice(iter(batches), missing))
            batches = self._kept
        # An iterator of a loader is made, and draws from torch's random state, only inside the replay.
        return batches if self.limit is None else _First(batches, self.limit)

    def _run_here(
        self,
        found: Pass,
        batches: Iterable[Any],
        watch: list[str],
        *,
        stop: bool,
        average: bool,
        spread: bool,
        own: bool,
    ) -> None:
        of_batch: dict[str, Moments] = {}
        waiting: dict[str, list[Moments]] = {}

        def enter(name: str, layer: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            place = f"batch {found.num_batches}, layer {name or '(model)'!r}"
            try:
                moments = call_moments(layer, args, kwargs)
            except (ValueError, TypeError) as error:
                raise type(error)(f"{place}: {error}") from None
            record(name, moments, place)

        def take(name: str, moments: Moments) -> None:
            # Inside the layer, which says itself where it is when it fails.
            record(name, moments, f"batch {found.num_batches}")

        def record(name: str, moments: Moments, place: str) -> None:
            _check(moments, place, in_training=self.layers[name].training)
            found.num_calls[name] = found.num_calls.get(name, 0) + 1
            _pool(found.moments, name, moments)
            if spread:
                _pool(of_batch, name, moments)
            if average:
                both = torch.cat([t.flatten() for t in moments.estimates()])
                _pool(found.averages, name, Moments(both, torch.zeros_like(both), 1))
            if stop:
                raise _StopHere

        with ExitStack() as stack:
            told = stack.enter_context(collected(self.layers, take)) if own else set()
            for name in watch:
                if name in told:
                    continue

                def hook(module: Any, args: Any, kwargs: Any, name: str = name) -> None:
                    enter(name, module, args, kwargs)

                # Registered last, so that it sees what the user's own hooks made of the input.
                handle = self.layers[name].register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
            total = length(batches)
            if self.progress:
                title = f"recalibrate, pass {self.num_done}"
                batches = stack.enter_context(shown(batches, total, title))
            for batch in batches:
                with suppress(_StopHere):
                    feeding.run(self.forward, self.model, batch, found.num_batches)
                found.num_batches += 1
                for name, moments in of_batch.items():
                    waiting.setdefault(name, []).append(moments)
                    if len(waiting[name]) == _TOGETHER:
                        _spread(found.spreads, name, waiting.pop(name))
                of_batch.clear()
        for name, several in waiting.items():
            _spread(found.spreads, name, several)
        if self.limit is not None and found.num_batches == self.limit:
            found.exhausted = self._kept is None and length(self.batches) == self.limit

    def _share(self, mine: Pass, error: Exception | None, *, average: bool, spread: bool) -> Pass:
        """The same pass over the data of all ranks; raises on every rank if one of them failed."""
        names = list(self.layers)
        device = next(iter(self.layers.values())).running_mean.device
        flags = [int(error is not None), int(not mine.exhausted), mine.num_batches]
        summed = torch.tensor([*flags, *(mine.num_calls.get(name, 0) for name in names)], device=device)
        dist.all_reduce(summed, group=self.group)
        num_failed, num_with_more, num_batches, *num_calls = summed.tolist()
        if error is not None:
            raise error
        if num_failed:
            raise RuntimeError(
                f"recalibration failed on {num_failed} other rank(s), whose own messages say why; "
                "nothing is changed on this rank"
            )
        whole = Pass(num_batches=num_batches, exhausted=not num_with_more)
        for name, calls in zip(names, num_calls, strict=True):
            if calls:
                whole.num_calls[name] = calls
                size = self.layers[name].running_mean.numel()
                none = _none_of(self.layers[name], device)
                whole.moments[name] = (mine.moments.get(name) or none).all_reduce(self.group)
                if average:
                    none = _nothing(sum(t.numel() for t in none.statistics), device)
                    whole.averages[name] = (mine.averages.get(name) or none).all_reduce(self.group)
                if spread:
                    here = mine.spreads.get(name) or Spread.of([_nothing(size, device)])
                    whole.spreads[name] = here.all_reduce(self.group)
        return whole


class _First:
    """The first few of some batches, as often as they are gone through."""

    def __init__(self, batches: Iterable[Any], num: int) -> None:
        self.batches, self.num = batches, num

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.batches), self.num)

    def __len__(self) -> int:
        return min(len(self.batches), self.num)


def _none_of(layer: _BatchNorm, device: torch.device) -> Moments:
    """Moments of no samples of a layer, in float64."""
    if isinstance(layer, Normalization):
        return layer.no_moments().map(lambda t: t.to(device, torch.float64))
    return _nothing(layer.running_mean.numel(), device)


def _nothing(size: int, device: torch.device) -> Moments:
    zeros = torch.zeros(size, dtype=torch.float64, device=device)
    return Moments(zeros, zeros, 0)


def _pool(pooled: dict[str, Moments], name: str, moments: Moments) -> None:
    pooled[name] = pooled[name].merge(moments) if name in pooled else moments


def _spread(spreads: dict[str, Spread], name: str, batches: list[Moments]) -> None:
    several = Spread.of(batches)
    spreads[name] = spreads[name].merge(several) if name in spreads else several


def _check(moments: Moments, place: str, *, in_training: bool) -> None:
    finite = moments.mean.isfinite() & moments.var.isfinite()
    if not finite.all():
        worst = int((~finite).nonzero()[0])
        raise ValueError(
            f"{place}: the input of channel {worst} is not finite (or its variance overflows float64). "
            "Leave such batches out, or find what makes them; nothing was changed"
        )
    if in_training and moments.count < 2:
        raise ValueError(
            f"{place}: {int(moments.count)} sample(s) a channel, and this method normalizes every batch by "
            "itself, which needs at least two. Drop that batch (drop_last=True), use larger ones, or what "
            'takes any: method="exact" of recalibrate, method="blended" of adapt'
        )


def same_random_numbers(model: nn.Module) -> AbstractContextManager[None]:
    """Leave torch's random state, on the CPU and the model's devices, as it is on entering."""
    devices = {t.device for t in (*model.parameters(), *model.buffers())}
    accelerators = [d for d in devices if d.type not in ("cpu", "meta")]
    if not accelerators:
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(
        devices=[d.index or 0 for d in accelerators], device_type=accelerators[0].type
    )


def eagerly() -> AbstractContextManager[Any]:
    """Compiled modules run eagerly: code compiled earlier does not call hooks."""
    if "torch._dynamo" in sys.modules:
        return torch.compiler.set_stance("force_eager")
    return nullcontext()
