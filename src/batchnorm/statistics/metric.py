"""Whether new statistics serve better than old ones, by a number of the user's own."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from batchnorm.statistics.choose import restored, unwrapped
from batchnorm.statistics.passes import same_random_numbers

Metric = Callable[[nn.Module], Any]


@dataclass(frozen=True)
class MetricChange:
    """A metric on the old statistics and on the new ones.

    Attributes:
        old: With the statistics that the model came with.
        new: With those that were measured.
        higher_is_better: True of an accuracy, false of a loss.
    """

    old: float
    new: float
    higher_is_better: bool

    @property
    def gain(self) -> float:
        """How much better the new statistics are, in the metric's units; negative where they are worse."""
        return self.new - self.old if self.higher_is_better else self.old - self.new

    @property
    def is_worse(self) -> bool:
        """Whether the new statistics are worse. NaN is worse than any number, and no worse than NaN."""
        if math.isnan(self.new) or math.isnan(self.old):
            return math.isnan(self.new) and not math.isnan(self.old)
        return self.new < self.old if self.higher_is_better else self.new > self.old

    def __str__(self) -> str:
        sense = "higher" if self.higher_is_better else "lower"
        verdict = "worse" if self.is_worse else "the same" if self.new == self.old else "better"
        return f"metric: {self.old:.6g} before, {self.new:.6g} after, {verdict} ({sense} is better)"


def measured(metric: Metric, model: nn.Module, group: dist.ProcessGroup | None) -> float:
    """``metric`` of the network in ``model``, in evaluation mode, and nothing changed by it.

    torch's random state is replayed, so that data which are drawn with it are the same each time.
    With ``group``, the mean over its ranks: the same number on each of them.

    Raises:
        TypeError: The metric is not a single number.
        RuntimeError: It failed on another rank.
    """
    network = unwrapped(model)
    value, error = math.nan, None
    try:
        with torch.no_grad(), restored(model), same_random_numbers(network):
            value = _number(metric(network))
    except Exception as caught:
        if group is None:
            raise
        error = caught  # raised once the other ranks, which wait for our number, know of it
    if group is None:
        return value
    device = next(network.buffers()).device
    summed = torch.tensor([float(error is not None), value], dtype=torch.float64, device=device)
    dist.all_reduce(summed, group=group)
    num_failed, total = summed.tolist()
    if error is not None:
        raise error
    if num_failed:
        raise RuntimeError(
            f"the metric failed on {int(num_failed)} other rank(s), whose own messages say why"
        )
    return total / dist.get_world_size(group)


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            "metric(model) must return one number, such as an accuracy or a mean loss; got "
            f"{_described(value)}. Reduce it, or pick the number that shall decide"
        ) from error


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return "None" if value is None else type(value).__name__
