"""A network as it is evaluated: with the population's statistics."""

import copy
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.statistics import recalibrate


def with_population_statistics(
    model: nn.Module,
    batches: Callable[[], Iterable[Tensor]] | Sequence[Tensor],
    *,
    method: str = "exact",
) -> nn.Module:
    """A copy in evaluation mode whose BN layers hold the statistics of the training set.

    Training goes on with the original, which is not touched.

    Args:
        model: The network.
        batches: Inputs from the training set, or what gives them anew each time it is called.
        method: As in `batchnorm.recalibrate`.

    Source: Ioffe & Szegedy (2015), Algorithm 2, lines 8 to 10; exact moments in place of averages.
    """
    twin = copy.deepcopy(model).eval()
    if any(isinstance(module, _BatchNorm) for module in twin.modules()):
        recalibrate(twin, list(batches() if callable(batches) else batches), method=method)
    return twin
