"""An alarm for batches whose statistics are far from a network's stored ones."""

import math
import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm import distributed
from batchnorm.statistics.choose import restored, unwrapped
from batchnorm.statistics.feeding import Forward, feed, num_examples, run
from batchnorm.statistics.passes import eagerly, same_random_numbers
from batchnorm.statistics.per_example import Listener

_DRAWS = 2000
"""Batches that are drawn from the source's examples for each size, or more where false alarms are rare."""

_FLOOR = 0.01
"""Of a channel's spread between examples, in deviations: one that never moved is not divided by nothing."""

_LARGEST_SHARE = 8
"""A batch may be one part in so many of the source's examples: enough of them are different then."""


@dataclass(frozen=True)
class DriftCheck:
    """How far one batch is from the stored statistics.

    Attributes:
        alarm: Whether ``score`` is above ``threshold``, or no number.
        score: Largest over layers of the layer's distance.
        threshold: What batches of the source with as many examples stay below, but for the false alarms.
        layers: By path, each layer's distance: the mean over channels of the squared distances of the
            batch's mean and mean square from the source's, in units of what they are in usual batches.
        shifts: By path, the largest move of a channel's mean from the stored one, in deviations.
        num_examples: In the batch.
    """

    alarm: bool
    score: float
    threshold: float
    layers: dict[str, float]
    shifts: dict[str, float]
    num_examples: int

    @property
    def farthest(self) -> str:
        """Path of the layer with the largest distance."""
        return max(self.layers, key=lambda name: _or_infinite(self.layers[name]))

    def __str__(self) -> str:
        verdict = "ALARM" if self.alarm else "no alarm"
        name = self.farthest
        return (
            f"{verdict}: distance {self.score:.3g} of {self.num_examples} examples, threshold "
            f"{self.threshold:.3g}; farthest at layer {name!r}, where a mean is {self.shifts[name]:.3g} "
            "deviations from the stored one"
        )


class DriftAlarm:
    """Tells batches of the domain that a network's statistics come from and batches of another one.

    For every layer, the mean and the mean square that a batch has in each channel are compared with the
    source's, in units of how much they differ between source batches of as many examples; the layer that is
    farthest decides. Half of the source's examples, every other one, say where it is and how wide; from the
    others batches are drawn at random, of any size that is wanted, and the threshold is what all but a given
    share of these stay below. So as many fresh batches of the source raise an alarm.

    Args:
        model: With stored statistics, in any wrapper; it is left as it is.
        batches: Examples of the source that it was not trained on, in batches of any size, as in
            `adapt`. The alarm keeps two numbers an example and channel.
        false_alarm_rate: Share of source batches that raise an alarm.
        forward: As in `adapt`.

    Attributes:
        num_examples: Of the source.
        false_alarm_rate: As given.

    Raises:
        ValueError: Fewer than ``4 / false_alarm_rate`` examples, or than 16; values that are not finite; no
            normalization with stored statistics; a rate that is no share.
        TypeError: A batch that does not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        *,
        false_alarm_rate: float = 0.01,
        forward: Forward | None = None,
    ) -> None:
        if not 0 < false_alarm_rate < 1:
            raise ValueError(f"false_alarm_rate must be between 0 and 1, got {false_alarm_rate}")
        self.false_alarm_rate = false_alarm_rate
        self._model, self._network = model, unwrapped(model)
        self._forward: Forward = forward or feed
        self._listener = Listener(_with_statistics(self._network))
        rows = [self._rows(batch, index) for index, batch in enumerate(batches)]
        num = sum(map(len, rows))
        fewest = max(16, math.ceil(4 / false_alarm_rate))
        if num < fewest:
            raise ValueError(
                f"an alarm with a false alarm rate of {false_alarm_rate:g} needs at least {fewest} examples "
                f"of the source, got {num}"
            )
        source = torch.cat(rows)
        if not source.isfinite().all():
            raise ValueError("examples of the source make a layer receive values that are not finite")
        self.num_examples = num
        # Distances from what they were measured by themselves would be too small for a threshold.
        measured, self._drawn = source[::2], source[1::2].clone()
        self._mean, self._var, self._num_measured = (
            measured.mean(0),
            measured.var(0) + _FLOOR**2,
            len(measured),
        )
        self._usual: dict[int, tuple[Tensor, float]] = {}

    @property
    def largest_batch(self) -> int:
        """Examples that a batch to be checked may have."""
        return self.num_examples // _LARGEST_SHARE

    def check(self, batch: Any) -> DriftCheck:
        """Run the network on a batch, in evaluation mode, and say how far it is; nothing is changed.

        The first batch of each size takes longer: its threshold has to be found.

        Raises:
            ValueError: No examples, or more than `largest_batch`; or the stored statistics have changed.
            TypeError: It does not fit the model.
        """
        if not 1 <= (size := num_examples(batch)) <= self.largest_batch:
            raise self._wrong_size(size)
        return self._judge(self._rows(batch, 0))

    def attach(self, on_check: Callable[[DriftCheck], None] | None = None, *, every: int = 1) -> "Attached":
        """Check batches as they go through the network, in evaluation mode.

        Larger batches than `largest_batch`, and empty ones, are not checked, with a warning for the first.

        Args:
            on_check: Told of each check, also of those without an alarm. By default an alarm is a warning.
            every: Check each so many batches; what a check costs is a pass over what the layers receive.

        Returns:
            A handle that ends it; also a context manager. Attach before `torch.compile`: code that is
            compiled already calls no hooks, and the next batch says so.
        """
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        return Attached(self, on_check or _warn, every)

    def threshold(self, num_examples: int) -> float:
        """The score above which a batch of so many examples raises the alarm.

        Raises:
            ValueError: None, or more than `largest_batch`.
        """
        if not 1 <= num_examples <= self.largest_batch:
            raise self._wrong_size(num_examples)
        return self._of_source(num_examples)[1]

    def _wrong_size(self, size: int) -> ValueError:
        return ValueError(
            f"a batch to be checked has 1 to {self.largest_batch} examples, an {_LARGEST_SHARE}th of the "
            f"{self.num_examples} that the alarm was calibrated on; got {size}. Calibrate on more, or split "
            "it"
        )

    def _rows(self, batch: Any, index: int) -> Tensor:
        with torch.no_grad(), restored(self._model), same_random_numbers(self._network):
            with eagerly(), distributed.alone(), self._listener.listening():
                run(self._forward, self._network, batch, index)
        return self._heard(num_examples(batch))

    def _heard(self, size: int) -> Tensor:
        return torch.cat([rows.cpu() for rows in self._listener.rows(size).values()], 1)

    def _judge(self, rows: Tensor) -> DriftCheck:
        if (name := self._listener.changed()) is not None:
            raise ValueError(
                f"layer {name!r}: the stored statistics have changed since the alarm was calibrated (by "
                "adapt, training or another domain): make a new alarm on examples that they are meant for"
            )
        size = len(rows)
        usual, threshold = self._of_source(size)
        mean = rows.mean(0)
        distances = (self._distances(mean[None], size)[0] / usual).tolist()
        means = [part.split(part.numel() // 2)[0] for part in mean.split(self._widths())]
        score = max(map(_or_infinite, distances))
        return DriftCheck(
            alarm=score > threshold,
            score=score,
            threshold=threshold,
            layers=dict(zip(self._listener.layers, distances, strict=True)),
            shifts={n: m.abs().max().item() for n, m in zip(self._listener.layers, means, strict=True)},
            num_examples=size,
        )

    def _of_source(self, size: int) -> tuple[Tensor, float]:
        """Each layer's median distance among source batches of a size, and the threshold of the score."""
        if size not in self._usual:
            random = torch.Generator().manual_seed(size)
            num_at_once = len(self._drawn) // size
            found: list[Tensor] = []
            while len(found) * num_at_once < max(_DRAWS, 20 / self.false_alarm_rate):
                order = torch.randperm(len(self._drawn), generator=random)[: num_at_once * size]
                means = self._drawn[order].unflatten(0, (num_at_once, size)).mean(1)
                found.append(self._distances(means, size))
            distances = torch.cat(found)
            num = len(distances)
            usual = distances.median(0).values.clamp(min=torch.finfo(distances.dtype).tiny)
            scores = (distances / usual).max(1).values.sort().values
            # The rank that one more such batch is above in no more than the given share of cases.
            rank = min(math.ceil((num + 1) * (1 - self.false_alarm_rate)), num)
            self._usual[size] = usual, scores[rank - 1].item()
        return self._usual[size]

    def _widths(self) -> list[int]:
        return [2 * channels for channels in self._listener.sizes.values()]

    def _distances(self, means: Tensor, size: int) -> Tensor:
        """Of batches' means, shape (B, V), from the source's: shape (B, layers), about 1 in its domain."""
        squares = (means - self._mean).square() / (self._var * (1 / size + 1 / self._num_measured))
        return torch.stack([part.mean(1) for part in squares.split(self._widths(), 1)], 1)


class Attached:
    """Checks what goes through a network, until it is removed.

    Attributes:
        last: The latest check; ``None`` before the first.
        num_checks: Batches that were checked.
        num_alarms: Of these, how many raised an alarm.
    """

    def __init__(self, alarm: DriftAlarm, on_check: Callable[[DriftCheck], None], every: int) -> None:
        self._alarm, self._on_check, self._every = alarm, on_check, every
        self._num_batches = 0
        self._warned = self._listens = False
        self._inner = ExitStack()
        self.last: DriftCheck | None = None
        self.num_checks = self.num_alarms = 0
        network = alarm._network
        self._handles = [
            network.register_forward_pre_hook(self._enter, with_kwargs=True),
            network.register_forward_hook(self._leave, with_kwargs=True, always_call=True),
        ]

    def remove(self) -> None:
        """End it; the model's hooks are those of before."""
        for handle in self._handles:
            handle.remove()
        self._end()

    def _end(self) -> bool:
        """Stop reading the layers; whether they were read."""
        listened, self._listens = self._listens, False
        self._inner.close()
        return listened

    def __enter__(self) -> "Attached":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _enter(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._end()
        if network.training:
            return
        self._num_batches += 1
        if (self._num_batches - 1) % self._every:
            return
        size = num_examples(args or kwargs)
        if 1 <= size <= self._alarm.largest_batch:
            self._alarm._listener.begin(self._inner)
            self._listens = True
        elif not self._warned:
            self._warned = True
            warnings.warn(f"not checked: {self._alarm._wrong_size(size)}", stacklevel=3)

    def _leave(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not self._end() or output is None:  # none: it failed
            return
        self.last = self._alarm._judge(self._alarm._heard(num_examples(args or kwargs)))
        self.num_checks += 1
        self.num_alarms += self.last.alarm
        self._on_check(self.last)


def _with_statistics(network: nn.Module) -> dict[str, _BatchNorm]:
    layers = {
        name: m
        for name, m in network.named_modules()
        if isinstance(m, _BatchNorm) and m.running_mean is not None and m.running_var is not None
    }
    if not layers:
        raise ValueError(
            f"{type(network).__name__} has no batch normalization with stored statistics: there is nothing "
            "that a batch could be far from"
        )
    return layers


def _or_infinite(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _warn(check: DriftCheck) -> None:
    if check.alarm:
        warnings.warn(str(check), stacklevel=2)
