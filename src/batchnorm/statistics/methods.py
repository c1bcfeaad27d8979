"""Population statistics by each of the methods, from passes over the data."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.moments import Moments
from batchnorm.statistics.choose import store
from batchnorm.statistics.passes import Pass, Passes
from batchnorm.statistics.recalibration_report import distance

METHODS = ("exact", "pooled", "paper")


@dataclass(frozen=True)
class Found:
    """What a method found.

    Attributes:
        statistics: Of every layer that was reached, as `Moments.estimates` has them, float64, flat.
        last: The pass over all the data that it ended with.
        residual: For "exact": how far ``last`` is from the statistics that it ran on, in deviations.
    """

    statistics: dict[str, tuple[Tensor, ...]]
    last: Pass
    residual: float | None


def find(passes: Passes, method: str, tolerance: float) -> Found:
    """Population statistics by ``method``; inside `restored`, as layers are changed on the way.

    Raises:
        ValueError: A layer got fewer than two samples a channel in all the data, or no layer any.
    """
    if method == "exact":
        population, last, residual = settle(passes, tolerance)
        found = Found({name: m.estimates() for name, m in population.items()}, last, residual)
    else:
        last = train_through(passes, average=method == "paper")
        statistics = {name: m.estimates() for name, m in last.moments.items()}
        for name, average in last.averages.items():
            sizes = [t.numel() for t in statistics[name]]
            statistics[name] = average.mean.split(sizes)
        found = Found(statistics, last, None)
    check_counts(passes.layers, last)
    return found


def train_through(passes: Passes, *, average: bool = False, own: bool = False) -> Pass:
    """One pass in which every batch is normalized by itself; ``own`` as in `Passes.run`."""
    for layer in passes.layers.values():
        layer.training = True
    return passes.run(passes.layers, average=average, spread=True, own=own)


def check_counts(layers: Iterable[str], last: Pass) -> None:
    """Raise ``ValueError`` where samples are too few for a variance, or no layer was reached."""
    if not last.moments:
        raise ValueError(
            f"no batch reached any of the layers {', '.join(map(repr, layers))} in evaluation mode: "
            "give batches, or forward=callable(model, batch), that run them"
        )
    for name, moments in last.moments.items():
        if moments.count < 2:
            raise ValueError(
                f"layer {name!r}: {int(moments.count)} sample(s) a channel in all the data; the variance of "
                "a population needs at least two. Give more data"
            )


def standard_errors(layers: dict[str, _BatchNorm], last: Pass) -> dict[str, tuple[float, float]]:
    """Of every layer's mean and deviation, in deviations, largest over channels."""
    errors = {}
    for name, spread in last.spreads.items():
        of_mean, of_deviation = spread.standard_errors(last.moments[name], layers[name].eps)
        errors[name] = (of_mean.max().item(), of_deviation.max().item())
    return errors


def settle(
    passes: Passes, tolerance: float, put: Callable[[str, Moments], None] | None = None
) -> tuple[dict[str, Moments], Pass, float]:
    """Settle the layers in the order in which data reach them.

    Args:
        passes: Over the data.
        tolerance: As in `recalibrate`.
        put: Called with the path of a layer and the moments of what it receives: stores the statistics
            that layers after it shall see it with. By default, those of one batch of all the data.

    Returns:
        Moments of what each layer receives, the last pass, and the residual, in deviations.
    """
    # The biased variance, for only while we are at it: one batch of all the data would be
    # normalized by that. What is stored in the end is unbiased.
    put = put or (lambda name, moments: store(passes.layers[name], *moments.statistics))
    layers = passes.layers
    known: dict[str, Moments] = {}
    while len(known) < len(layers):
        found = passes.run([name for name in layers if name not in known], stop=True)
        if not found.moments:
            break  # nothing reaches the others
        for name, moments in found.moments.items():
            put(name, moments)
        known |= found.moments
    last = passes.run(known, spread=True)
    residual = best = _residual(layers, known, last)
    result = known
    # Exact, unless a layer was called again after it had been settled. Then all the layers move on
    # together, for as long as it helps: a change may grow before it has gone through every layer.
    once_each = all(calls == last.num_batches for calls in last.num_calls.values())
    patience = 0 if once_each else len(known) + 1
    while best > tolerance and patience:
        known = {name: last.moments.get(name, moments) for name, moments in known.items()}
        for name, moments in known.items():
            put(name, moments)
        last = passes.run(known, spread=True)
        residual = _residual(layers, known, last)
        patience -= 1
        if residual < best:
            best, result, patience = residual, known, len(known) + 1
    return {name: result[name] for name in layers if name in last.moments}, last, best


def _residual(layers: dict[str, _BatchNorm], known: dict[str, Moments], last: Pass) -> float:
    far = (distance(known[name], moments, layers[name].eps) for name, moments in last.moments.items())
    return max(far, default=0.0)
