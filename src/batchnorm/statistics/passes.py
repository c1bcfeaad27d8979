"""One pass of the data through a model, with the moments of what its normalization layers receive."""

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.layers import Normalization
from batchnorm.moments import Moments

Forward = Callable[[nn.Module, Any], object]


class _StopHere(BaseException):  # not an Exception: a model's own `except Exception` lets it through
    """Ends a forward pass at a layer whose statistics are not known yet."""


@dataclass
class Pass:
    """What one pass found, over all ranks.

    Attributes:
        moments: Of the inputs of every watched layer that was reached, in float64, flat.
        averages: With ``average=True``, for every such layer the moments over its calls of the
            vector (batch mean, unbiased batch variance), shape (2 C,); each call counts once.
        num_calls: Calls of each reached layer.
        num_batches: Batches that were run.
    """

    moments: dict[str, Moments] = field(default_factory=dict)
    averages: dict[str, Moments] = field(default_factory=dict)
    num_calls: dict[str, int] = field(default_factory=dict)
    num_batches: int = 0


def feed(model: nn.Module, batch: Any) -> object:
    """Call ``model`` with a tensor, with the first item of a tuple or list, or with a dict's keywords.

    Raises:
        TypeError: ``batch`` is something else, or an empty tuple or list.
    """
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list) and batch:
        return model(batch[0])
    came = "an empty " + type(batch).__name__ if isinstance(batch, tuple | list) else type(batch).__name__
    raise TypeError(
        "a batch must be a tensor, a tuple or list whose first item is the model's input, or a dict of "
        f"keyword arguments; got {came}. Pass forward=callable(model, batch) to call the model your own way"
    )


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
    return Moments(moments.mean.flatten(), moments.var.flatten(), moments.count)


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
    ) -> None:
        self.model, self.layers, self.batches = model, layers, batches
        self.forward: Forward = forward or feed
        self.group, self.progress = group, progress
        self.num_done = 0

    def run(self, watch: Iterable[str], *, stop: bool = False, average: bool = False) -> Pass:
        """Run every batch and pool the moments of the inputs of the layers in ``watch``.

        Args:
            watch: Paths of the layers to watch.
            stop: End each batch at the first watched layer that it reaches.
            average: Fill `Pass.averages` too.

        Raises:
            ValueError: A batch gives a layer values that are not finite or of a shape that it does
                not take, a layer in training mode gets fewer than two samples a channel, or there
                are no batches at all.
            RuntimeError: Another rank failed.
        """
        self.num_done += 1
        found, error = Pass(), None
        try:
            with _same_random_numbers(self.model), _eagerly():
                self._run_here(found, list(watch), stop=stop, average=average)
        except Exception as caught:
            if self.group is None:
                raise
            error = caught  # raised once the other ranks, which wait for our moments, know of it
        if self.group is not None:
            found = self._share(found, error, average=average)
        if not found.num_batches:
            again = " (any more: this pass over it, a later one, found nothing)" if self.num_done > 1 else ""
            raise ValueError(f"batches is empty{again}: population statistics need at least one batch")
        return found

    def _run_here(self, found: Pass, watch: list[str], *, stop: bool, average: bool) -> None:
        def enter(name: str, layer: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            place = f"batch {found.num_batches}, layer {name or '(model)'!r}"
            try:
                moments = call_moments(layer, args, kwargs)
            except (ValueError, TypeError) as error:
                raise type(error)(f"{place}: {error}") from None
            _check(moments, place, in_training=layer.training)
            found.num_calls[name] = found.num_calls.get(name, 0) + 1
            _pool(found.moments, name, moments)
            if average:
                both = torch.cat([moments.mean, moments.unbiased()])
                _pool(found.averages, name, Moments(both, torch.zeros_like(both), 1))
            if stop:
                raise _StopHere

        with ExitStack() as stack:
            for name in watch:

                def hook(module: Any, args: Any, kwargs: Any, name: str = name) -> None:
                    enter(name, module, args, kwargs)

                # Registered last, so that it sees what the user's own hooks made of the input.
                handle = self.layers[name].register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
            for batch in stack.enter_context(_shown(self.batches, self.num_done, self.progress)):
                try:
                    self.forward(self.model, batch)
                except _StopHere:
                    pass
                except RuntimeError as error:
                    raise _explained(error, self.model, batch, found.num_batches) from error
                found.num_batches += 1

    def _share(self, mine: Pass, error: Exception | None, *, average: bool) -> Pass:
        """The same pass over the data of all ranks; raises on every rank if one of them failed."""
        names = list(self.layers)
        device = next(iter(self.layers.values())).running_mean.device
        counts = [int(error is not None), mine.num_batches, *(mine.num_calls.get(name, 0) for name in names)]
        summed = torch.tensor(counts, device=device)
        dist.all_reduce(summed, group=self.group)
        num_failed, num_batches, *num_calls = summed.tolist()
        if error is not None:
            raise error
        if num_failed:
            raise RuntimeError(
                f"recalibration failed on {num_failed} other rank(s), whose own messages say why; "
                "nothing is changed on this rank"
            )
        whole = Pass(num_batches=num_batches)
        for name, calls in zip(names, num_calls, strict=True):
            if calls:
                whole.num_calls[name] = calls
                size = self.layers[name].running_mean.numel()
                whole.moments[name] = self._over_ranks(mine.moments.get(name), size, device)
                if average:
                    whole.averages[name] = self._over_ranks(mine.averages.get(name), 2 * size, device)
        return whole

    def _over_ranks(self, moments: Moments | None, size: int, device: torch.device) -> Moments:
        nothing = torch.zeros(size, dtype=torch.float64, device=device)
        return (moments or Moments(nothing, nothing, 0)).all_reduce(self.group)


def _pool(pooled: dict[str, Moments], name: str, moments: Moments) -> None:
    pooled[name] = pooled[name].merge(moments) if name in pooled else moments


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
            "itself, which needs at least two. Drop that batch (drop_last=True), use larger ones, or "
            'method="exact", which takes batches of any size'
        )


def _explained(error: RuntimeError, model: nn.Module, batch: Any, index: int) -> RuntimeError:
    """``error``, or one that names both devices where the batch is not on the model's."""
    items = (
        batch.values()
        if isinstance(batch, Mapping)
        else batch
        if isinstance(batch, tuple | list)
        else [batch]
    )
    of_batch = {str(item.device) for item in items if isinstance(item, Tensor)}
    of_model = {str(t.device) for t in (*model.parameters(), *model.buffers())}
    if of_batch <= of_model:
        return error
    return RuntimeError(
        f"batch {index} is on {', '.join(sorted(of_batch))} and the model on {', '.join(sorted(of_model))}; "
        f"move one of them (batches are used where they are). torch said: {error}"
    )


def _same_random_numbers(model: nn.Module) -> AbstractContextManager[None]:
    devices = {t.device for t in (*model.parameters(), *model.buffers())}
    accelerators = [d for d in devices if d.type not in ("cpu", "meta")]
    if not accelerators:
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(
        devices=[d.index or 0 for d in accelerators], device_type=accelerators[0].type
    )


def _eagerly() -> AbstractContextManager[Any]:
    """Compiled modules run eagerly: code compiled earlier does not call hooks."""
    if "torch._dynamo" in sys.modules:
        return torch.compiler.set_stance("force_eager")
    return nullcontext()


@contextmanager
def _shown(batches: Iterable[Any], num_pass: int, progress: bool) -> Iterator[Iterable[Any]]:
    """``batches``, with a progress bar around them if asked for."""
    if not progress:
        yield batches
        return
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError as error:
        raise ImportError('progress=True draws with rich: pip install "batchnorm[train]"') from error
    with Progress(console=Console(stderr=True)) as bar:
        total = len(batches) if isinstance(batches, Sized) else None
        yield bar.track(batches, total=total, description=f"recalibrate, pass {num_pass}")
