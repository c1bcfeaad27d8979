"""A network's statistics: as it is evaluated with, and those that each rank has of its own while training."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.moments import Moments
from batchnorm.statistics import recalibrate
from batchnorm.train.ranks import Ranks


def with_population_statistics(
    model: nn.Module,
    batches: Callable[[], Iterable[Tensor]] | Sequence[Tensor],
    *,
    method: str = "exact",
    group: dist.ProcessGroup | None = None,
) -> nn.Module:
    """A copy in evaluation mode whose BN layers hold the statistics of the training set.

    Training goes on with the original, which is not touched.

    Args:
        model: The network.
        batches: Inputs from the training set, or what gives them anew each time it is called.
        method: As in `batchnorm.recalibrate`.
        group: Ranks that have a part of the batches each; all get the statistics of the whole.

    Source: Ioffe & Szegedy (2015), Algorithm 2, lines 8 to 10; exact moments in place of averages.
    """
    twin = copy.deepcopy(model).eval()
    if any(isinstance(module, _BatchNorm) for module in twin.modules()):
        inputs = list(batches() if callable(batches) else batches)
        recalibrate(twin, inputs, method=method, group=group)
    return twin


class LocalStatistics:
    """Running statistics that are each rank's own while training, and one for all in a checkpoint.

    A checkpoint has the pooled ones in the model's place, and those of every rank beside it: the same
    number of ranks goes on with its own, so that a stopped run moves them as one that was not.

    Args:
        model: That is trained.
        ranks: That train it.
    """

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        self.model, self.ranks = model, ranks
        self._layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, _BatchNorm) and module.running_mean is not None
        }

    def collect(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Statistics over all ranks, by their names in the model, and those of each by name and rank."""
        if self.ranks.num == 1 or not self._layers:
            return {}, {}
        mine = torch.cat(
            [
                buffer.detach().cpu().double().flatten()
                for layer in self._layers.values()
                for buffer in (layer.running_mean, layer.running_var)
            ]
        )
        every = torch.zeros(self.ranks.num, len(mine), dtype=torch.float64)
        every[self.ranks.rank] = mine
        every = self.ranks.sum(every)
        pooled: dict[str, Tensor] = {}
        of_ranks: dict[str, Tensor] = {}
        place = 0
        for name, layer in self._layers.items():
            size, shape = layer.running_mean.numel(), layer.running_mean.shape
            means, variances = (every[:, start : start + size] for start in (place, place + size))
            place += 2 * size
            # Ranks have equal parts of each step, so that they weigh the same.
            whole = Moments(means[0], variances[0], 1)
            for mean, variance in zip(means[1:], variances[1:], strict=True):
                whole = whole.merge(Moments(mean, variance, 1))
            for part, values, each in (
                ("running_mean", whole.mean, means),
                ("running_var", whole.var, variances),
            ):
                key = f"{name}.{part}" if name else part
                like = getattr(layer, part)
                pooled[key] = values.reshape(shape).to(like.dtype)
                of_ranks[_key(key, self.ranks.num)] = each.reshape(-1, *shape).to(like.dtype)
        return pooled, of_ranks

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up this rank's own again, if there are those of so many ranks."""
        for name, layer in self._layers.items():
            for part in ("running_mean", "running_var"):
                key = _key(f"{name}.{part}" if name else part, self.ranks.num)
                if key in tensors:
                    with torch.no_grad():
                        getattr(layer, part).copy_(tensors[key][self.ranks.rank])


def _key(name: str, num_ranks: int) -> str:
    return f"ranks.{num_ranks}.{name}"
