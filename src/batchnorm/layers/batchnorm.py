"""Drop-in layers: subclasses of `torch.nn`'s, with the same state dicts and the same numbers."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.layers.base import Normalization
from batchnorm.moments import Moments


def _check_dims(layer: Normalization, x: Tensor, allowed: tuple[int, ...], named: str) -> None:
    # Features that sit last may have any locations before them.
    if layer.channel_dim == 1 and x.dim() not in allowed:
        raise ValueError(f"expected {named} input, got {x.dim()}-d input of shape {tuple(x.shape)}")


class BatchNorm1d(Normalization, nn.BatchNorm1d):
    """Drop-in for `torch.nn.BatchNorm1d`: input (N, C) or (N, C, L).

    With ``channel_dim=-1``: (N, C), (N, L, C) or any (…, C), as a ``Linear`` leaves features.
    """

    def _check_input_dim(self, x: Tensor) -> None:
        _check_dims(self, x, (2, 3), "2-d or 3-d")
        Normalization._check_input_dim(self, x)


class BatchNorm2d(Normalization, nn.BatchNorm2d):
    """Drop-in for `torch.nn.BatchNorm2d`: input (N, C, H, W)."""

    def _check_input_dim(self, x: Tensor) -> None:
        _check_dims(self, x, (4,), "4-d (N, C, H, W)")
        Normalization._check_input_dim(self, x)


class BatchNorm3d(Normalization, nn.BatchNorm3d):
    """Drop-in for `torch.nn.BatchNorm3d`: input (N, C, D, H, W)."""

    def _check_input_dim(self, x: Tensor) -> None:
        _check_dims(self, x, (5,), "5-d (N, C, D, H, W)")
        Normalization._check_input_dim(self, x)


class BatchNormPerActivation(Normalization):
    """γ, β and statistics for every activation: each channel *and* location by itself.

    The paper's non-convolutional variant, used in the last hidden layers of some members of
    its ensemble (section 4.2.3).

    Args:
        shape: Of one example, without the batch: (C, H, W), say. Parameters and running
            statistics have this shape.
        eps: As in `BatchNorm2d`; so are the others.

    Source: Ioffe & Szegedy (2015), section 3.2.
    """

    def __init__(
        self,
        shape: Sequence[int] | int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
    ) -> None:
        sizes = (shape,) if isinstance(shape, int) else tuple(shape)
        super().__init__(
            math.prod(sizes),
            eps,
            momentum,
            affine,
            track_running_stats,
            device,
            dtype,
            bias=bias,
            activation=activation,
        )
        self.shape = sizes
        for name, parameter in self.named_parameters(recurse=False):
            setattr(self, name, nn.Parameter(parameter.detach().reshape(sizes)))
        for name, running in self._statistics().items():
            self.register_buffer(name, running.reshape(sizes))

    def _normalize(
        self, x: Tensor, residual: Tensor | None, mask: Tensor | None, activation: str | None
    ) -> Tensor:
        residual = None if residual is None else residual.flatten(1)
        return super()._normalize(x.flatten(1), residual, mask, activation).reshape(x.shape)

    def _vectors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        weight, bias, mean, var = (t if t is None else t.view(-1) for t in super()._vectors())
        return weight, bias, mean, var

    def moments(self, x: Tensor, mask: Tensor | None = None, dtype: torch.dtype = torch.float64) -> Moments:
        """Moments of every activation, shape ``shape``; ``mask`` chooses examples, shape (N,)."""
        flat = Moments.of(x.detach().flatten(1), mask=mask, dtype=dtype)
        return Moments(flat.mean.reshape(self.shape), flat.var.reshape(self.shape), flat.count)

    def _check_input_dim(self, x: Tensor) -> None:
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(
                f"expected input of shape (N, {', '.join(map(str, self.shape))}), got {tuple(x.shape)}"
            )
