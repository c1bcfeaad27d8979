"""Layers that give the example at hand its share of the statistics at inference, as training did."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from batchnorm.functional.plain import check_arguments
from batchnorm.kernels.activations import TABLE
from batchnorm.kernels.reference import before_activation, visible
from batchnorm.layers.base import Normalization
from batchnorm.layers.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d, BatchNormPerActivation
from batchnorm.layers.variation import Variation


def check_settings(*, example_weight: float) -> None:
    """Raise ``ValueError`` unless it is a number from 0 to 1."""
    is_number = isinstance(example_weight, int | float) and not isinstance(example_weight, bool)
    if not is_number or not 0 <= example_weight <= 1:
        raise ValueError(f"example_weight must be a number from 0 to 1, got {example_weight!r}")


def weight_of(batch_size: int | None, example_weight: float | None) -> float:
    """Weight of an example among ``batch_size``, or the one that is given.

    Raises:
        ValueError: Both or neither are given, or one makes no sense.
    """
    if (batch_size is None) == (example_weight is None):
        raise ValueError(
            "give batch_size, the examples of a training batch, or example_weight, from 0 to 1: one of them"
        )
    if batch_size is None:
        check_settings(example_weight=example_weight)
        return float(example_weight)
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")
    return 1 / batch_size


def blended(
    own_mean: Tensor, own_var: Tensor, own_count: Tensor | int, mean: Tensor, var: Tensor, weight: float
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance to be expected of a training batch that holds an example.

    With w = ``weight`` = 1 / B and the running variance R, as it is averaged over batches of size B,
    without the factor that made it unbiased: (1 − w) · mean + w · own mean, and
    (1 − w) · (1 − w / S) · R + w · own variance + w · (1 − w) · (own mean − mean)².

    Args:
        own_mean: Of each example over its S samples, shape (N, C).
        own_var: Biased, shape (N, C).
        own_count: S, or shape (N, 1); an example without samples weighs nothing.
        mean: Running mean, shape (C,).
        var: Running variance, unbiased, shape (C,).
        weight: Of the example.
    """
    count = torch.as_tensor(own_count, device=mean.device).to(mean.dtype)
    w = weight * (count > 0)
    gap = own_mean - mean
    shrunk = (1 - w) * (1 - w / count.clamp(min=1))
    return mean + w * gap, shrunk * var + w * own_var + w * (1 - w) * gap.square()


class EvalNorm(Variation):
    """What example weighing adds to the plain layers; their training stays as it is, to the bit.

    In evaluation, or when frozen, each example is normalized by what the moments of a training batch
    with it would be expected to be: its own ones with weight ``example_weight``, 1 / B for batches of
    B examples, and the running ones (see `blended`). One example's output does not depend on the
    others given with it. Weight 0 is the plain layer.

    An example's own moments are over its locations; a mask leaves out those that do not count. Where
    a channel has one value, as in (N, C), its own variance is zero, and what its distance from the
    running mean adds remains.

    The weight is in the state dict (``example_weight``, float64, shape ()); that of a plain layer
    can be loaded, and leaves it.

    Args:
        args: As of the plain layer.
        batch_size: Examples that a batch had in training.
        example_weight: In its place, the weight of an example.
        kwargs: As of the plain layer.

    Raises:
        ValueError: As of the plain layer; both or neither of ``batch_size`` and ``example_weight``.

    Source: Summers & Dinneen (2020), arXiv 1906.03548, section 3.1; Singh & Shrivastava (2019),
    arXiv 1904.06031, for fitting weights. The term of the training batch's size is ours: see the card.
    """

    settings = ("example_weight",)
    differs: ClassVar = {"evaluation": "an example has its weight among the statistics"}
    check_settings = staticmethod(check_settings)
    ended = "; examples have no weight among the statistics"

    example_weight: float

    def __init__(
        self, *args: Any, batch_size: int | None = None, example_weight: float | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._vary(example_weight=weight_of(batch_size, example_weight))

    @property
    def mixes(self) -> str:
        """Why the layer is no fixed map in evaluation; empty without a weight."""
        if not self.example_weight:
            return ""
        return "in evaluation its map depends on the example (example_weight is not 0)"

    def _is_plain(self, x: Tensor, by_running: bool) -> bool:
        return not (by_running and self.example_weight) and Normalization._is_plain(self, x, by_running)

    def _by_running(
        self, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, **options: Any
    ) -> Tensor:
        if not self.example_weight:
            return super()._by_running(x, mean, var, weight, bias, **options)
        eps, activation, residual = options["eps"], options["activation"], options["residual"]
        mask, channel_dim = options["mask"], options["channel_dim"]
        name = check_arguments(x, weight, bias, eps, activation, residual, mask, channel_dim)
        if channel_dim == -1:
            # Channels second, as views.
            x, residual = x.movedim(-1, 1), None if residual is None else residual.movedim(-1, 1)
        wide = torch.promote_types(x.dtype, torch.float32)
        shown = visible(x.to(wide), mask)
        stats = (mean.to(wide), var.to(wide))
        batch_mean, batch_var = blended(*example_moments(shown, mask), *stats, self.example_weight)
        places = [*batch_mean.shape, *[1] * (x.dim() - 2)]
        x_hat = (shown - batch_mean.view(places)) * (batch_var + eps).rsqrt().view(places)
        z = before_activation(x_hat, weight, bias, residual)
        y = visible(TABLE[name].value(z), mask).to(x.dtype)
        return y.movedim(1, -1) if channel_dim == -1 else y

    # The weight is saved as a tensor; a plain number is what the layer works with.

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}example_weight"] = torch.tensor(self.example_weight, dtype=torch.float64)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        weight = state_dict.pop(f"{prefix}example_weight", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if weight is not None:
            check_settings(example_weight=weight.item())
            self.example_weight = weight.item()


def example_moments(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | int]:
    """Mean and biased variance of every example's channels, shape (N, C), and of how many samples.

    Args:
        x: Shape (N, C, *spatial), zeros where the mask is false.
        mask: Boolean, shape (N, *spatial); then the count has shape (N, 1).
    """
    places = list(range(2, x.dim()))
    if mask is None:
        if not places:
            return x, torch.zeros_like(x), 1
        count = math.prod(x.shape[2:])
        first = x.sum(places, keepdim=True) / max(count, 1)
        return first.flatten(1), (x - first).square().sum(places) / max(count, 1), count
    counts = mask.flatten(1).sum(1, keepdim=True) if places else mask.unsqueeze(1).long()
    divisor = counts.clamp(min=1).to(x.dtype)
    mean = (x.sum(places) if places else x) / divisor
    off = visible(x - mean.view([*mean.shape, *[1] * len(places)]), mask)
    return mean, (off.square().sum(places) if places else off.square()) / divisor, counts


class EvalNorm1d(EvalNorm, BatchNorm1d):
    """`BatchNorm1d` with a weight for the example at hand."""


class EvalNorm2d(EvalNorm, BatchNorm2d):
    """`BatchNorm2d` with a weight for the example at hand."""


class EvalNorm3d(EvalNorm, BatchNorm3d):
    """`BatchNorm3d` with a weight for the example at hand."""


class EvalNormPerActivation(EvalNorm, BatchNormPerActivation):
    """`BatchNormPerActivation` with a weight for the example at hand."""


EVALNORM: dict[type[Normalization], type[EvalNorm]] = {
    BatchNorm1d: EvalNorm1d,
    BatchNorm2d: EvalNorm2d,
    BatchNorm3d: EvalNorm3d,
    BatchNormPerActivation: EvalNormPerActivation,
}
"""The class with a weight for each of the plain ones."""
