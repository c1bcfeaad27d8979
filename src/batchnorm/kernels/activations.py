"""The nonlinearities that a normalization can carry, each with its derivative.

Derivatives are written in differentiable operations of z, the value before the
nonlinearity, so that a second backward pass can go through them.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LEAKY_SLOPE = 0.01  # torch.nn.LeakyReLU's default
ELU_ALPHA = 1.0  # torch.nn.ELU's default


class Activation(NamedTuple):
    """A nonlinearity and its derivative, both functions of the value before it."""

    value: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]


def _step(z: Tensor) -> Tensor:
    return (z > 0).to(z.dtype)


def _leaky_slope(z: Tensor) -> Tensor:
    return torch.where(z > 0, torch.ones_like(z), LEAKY_SLOPE)


def _elu_slope(z: Tensor) -> Tensor:
    # exp only where it is used: exp of a large z would turn 0·inf into NaN in a second backward.
    return torch.where(z > 0, 1.0, ELU_ALPHA * z.clamp(max=0).exp())


def _gelu_slope(z: Tensor) -> Tensor:
    density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    return 0.5 * torch.erfc(-z / math.sqrt(2)) + z * density


def _silu_slope(z: Tensor) -> Tensor:
    gate = torch.sigmoid(z)
    return gate * (1 + z * (1 - gate))


def _sigmoid_slope(z: Tensor) -> Tensor:
    return torch.sigmoid(z) * torch.sigmoid(-z)


def _tanh_slope(z: Tensor) -> Tensor:
    return 1 - torch.tanh(z).square()


def _hardswish_slope(z: Tensor) -> Tensor:
    middle = torch.where(z < 3, z / 3 + 0.5, 1.0)
    return torch.where(z > -3, middle, 0.0)


TABLE: dict[str, Activation] = {
    "identity": Activation(lambda z: z, torch.ones_like),
    "relu": Activation(torch.relu, _step),
    "leaky_relu": Activation(lambda z: F.leaky_relu(z, LEAKY_SLOPE), _leaky_slope),
    "elu": Activation(lambda z: F.elu(z, ELU_ALPHA), _elu_slope),
    "gelu": Activation(F.gelu, _gelu_slope),
    "silu": Activation(F.silu, _silu_slope),
    "sigmoid": Activation(torch.sigmoid, _sigmoid_slope),
    "tanh": Activation(torch.tanh, _tanh_slope),
    "hardswish": Activation(F.hardswish, _hardswish_slope),
}
"""By name; ``identity`` stands for no activation."""


def check_activation(name: str | None) -> str:
    """``name``, or ``"identity"`` for ``None``.

    Raises:
        ValueError: The name is not in the table; the message lists those that are.
    """
    if name is None:
        return "identity"
    if name not in TABLE:
        known = ", ".join(sorted(set(TABLE) - {"identity"}))
        raise ValueError(
            f"unknown activation {name!r}: use one of {known}, or None and apply your own after the layer"
        )
    return name
