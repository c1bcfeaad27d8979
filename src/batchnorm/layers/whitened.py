"""Layers that whiten groups of channels: what the paper calls full whitening, made practical."""

from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from batchnorm.comoments import Comoments, diagonal
from batchnorm.functional.plain import check_arguments, check_size
from batchnorm.kernels import whitening
from batchnorm.layers.base import Normalization
from batchnorm.layers.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.layers.running import commit
from batchnorm.layers.variation import Variation
from batchnorm.moments import Moments


def check_settings(*, group_channels: int, iterations: int) -> None:
    """Raise ``ValueError`` unless both are positive whole numbers."""
    for name, value in (("group_channels", group_channels), ("iterations", iterations)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


class Whitened(Variation):
    """What iterative whitening adds to the plain layers.

    ``y = γ · (Σ + eps)^(−1/2) (x − mean) + β``, where Σ holds the covariances of the channels of a
    group, of this batch in training and running ones in evaluation or when frozen. The root is taken
    by Newton's iteration, with gradients through it and through Σ. Groups are consecutive channels;
    the last one has what is left. Groups of one channel are plain Batch Normalization.

    The running covariances are a buffer beside the plain layer's, ``running_cov`` of shape
    (C, ``group_channels``), unbiased, as `batchnorm.comoments.Comoments` has its rows: they merge as
    variances do, and a root would not. ``running_var`` is their diagonal. A state dict of a plain
    layer can be loaded: its channels are taken for uncorrelated.

    Args:
        args: As of the plain layer.
        group_channels: Channels that are whitened together. A batch has to hold many more samples
            than that. All of the layer's at most.
        iterations: Of Newton's method. Few are a regularization: a direction with a share s of its
            group's variance is whitened after about log(1 / √s) / log(1.5) of them.
        kwargs: As of the plain layer.

    Raises:
        ValueError: As of the plain layer; a setting is not a positive whole number; training under
            `torch.func` transforms with running statistics.

    Source: Huang et al. (2019), arXiv 1904.03441, Algorithm 1; Ioffe & Szegedy (2015), section 3,
    for whitening all of a layer.
    """

    settings = ("group_channels", "iterations")
    differs: ClassVar = {
        "training": "channels of a group are whitened together",
        "evaluation": "channels of a group are whitened together",
    }
    check_settings = staticmethod(check_settings)
    own_buffers = ("running_cov",)
    ended = "; running covariances between channels are gone"

    running_cov: Tensor
    group_channels: int
    iterations: int

    def __init__(self, *args: Any, group_channels: int = 16, iterations: int = 5, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._vary(group_channels=group_channels, iterations=iterations)

    def _vary(self, **settings: Any) -> Self:
        super()._vary(**settings)
        self.register_buffer("running_cov", self._uncorrelated())
        return self

    @property
    def _group(self) -> int:
        return min(self.group_channels, self.num_features)

    def _uncorrelated(self) -> Tensor | None:
        return None if self.running_var is None else diagonal(self.running_var, self._group)

    def reset_running_stats(self) -> None:
        """Forget all statistics: mean 0, variance 1, no covariances."""
        super().reset_running_stats()
        if self._buffers.get("running_cov") is not None:  # not yet there while the layer is made
            self.running_cov.copy_(self._uncorrelated())

    def _by_batch(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, **options: Any
    ) -> tuple[Tensor, Moments]:
        name = self._checked(x, weight, bias, **options)
        check_size(x, self.channel_dim)
        settings = {"group": self._group, "iterations": self.iterations, "channel_dim": self.channel_dim}
        extra = (options["residual"], options["mask"])
        y, moments = whitening.forward(x, weight, bias, *extra, self.eps, name, **settings)
        return y, moments.map(Tensor.detach)

    def _by_running(
        self, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, **options: Any
    ) -> Tensor:
        name = self._checked(x, weight, bias, **options)
        settings = {"iterations": self.iterations, "channel_dim": self.channel_dim}
        extra = (options["residual"], options["mask"])
        return whitening.apply(x, mean, self.running_cov, weight, bias, *extra, self.eps, name, **settings)

    @property
    def mixes(self) -> str:
        """Why the layer is no map of every channel by itself."""
        return "it whitens: in evaluation it mixes the channels of a group"

    def _is_plain(self, x: Tensor, by_running: bool) -> bool:
        return False

    def _checked(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, **options: Any) -> str:
        given = (options[name] for name in ("eps", "activation", "residual", "mask", "channel_dim"))
        return check_arguments(x, weight, bias, *given)

    # Statistics.

    def moments(self, x: Tensor, mask: Tensor | None = None, dtype: torch.dtype = torch.float64) -> Moments:
        """As of the plain layer, with the covariances within groups."""
        return whitening.comoments(x.detach().to(dtype), self._group, mask, self.channel_dim)

    def no_moments(self) -> Comoments:
        """Moments of no samples, of the kind that `move` takes."""
        plain = super().no_moments()
        return Comoments(plain.mean, plain.var, plain.count, torch.zeros_like(self.running_cov))

    def move(self, moments: Moments) -> None:
        """As of the plain layer; the running covariances move alike."""
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            raise ValueError(
                "running covariances do not move under torch.func transforms (vmap, grad, …): make the layer "
                "with track_running_stats=False, or put it in evaluation mode"
            )
        cov = moments.estimates()[2]
        running = (self.running_mean, self.running_var, self.num_batches_tracked)
        commit(*running, moments, self.momentum, others=[(self.running_cov, cov)])

    def _statistics(self) -> dict[str, Tensor]:
        cov = self._buffers.get("running_cov")
        return super()._statistics() | ({} if cov is None else {"running_cov": cov})

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        key, var = f"{prefix}running_cov", state_dict.get(f"{prefix}running_var")
        is_plains = self._buffers.get("running_cov") is not None and key not in state_dict and var is not None
        if is_plains and var.shape == self.running_var.shape:
            state_dict[key] = diagonal(var, self._group)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if is_plains:
            state_dict.pop(key, None)


class WhitenedBatchNorm1d(Whitened, BatchNorm1d):
    """`BatchNorm1d` that whitens groups of channels."""


class WhitenedBatchNorm2d(Whitened, BatchNorm2d):
    """`BatchNorm2d` that whitens groups of channels."""


class WhitenedBatchNorm3d(Whitened, BatchNorm3d):
    """`BatchNorm3d` that whitens groups of channels."""


WHITENED: dict[type[Normalization], type[Whitened]] = {
    BatchNorm1d: WhitenedBatchNorm1d,
    BatchNorm2d: WhitenedBatchNorm2d,
    BatchNorm3d: WhitenedBatchNorm3d,
}
"""The whitening class for each of the plain ones; single activations have no samples enough for it."""
