"""What is left of a normalization at inference where no neighbour takes it up: one multiply-add."""

from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.functional import normalize_with
from batchnorm.kernels.activations import TABLE, check_activation

_FEW = 131072
"""Numbers; above, one pass by a fused kernel is faster than two or three by PyTorch's operations."""


class ScaleShift(nn.Module):
    """``activation(scale · x + shift + residual)``, called as our layers are.

    Args:
        scale: Shape (C,), or that of one example for a map of every activation by itself.
        shift: Shape of ``scale``.
        channel_dim: 1 or -1; of no account where ``scale`` has more than one dimension.
        activation: One of `batchnorm.functional.ACTIVATIONS`, or ``None``.
        trains: Whether scale and shift are learned further.

    Raises:
        ValueError: ``activation`` is unknown.
    """

    zero: Tensor
    one: Tensor

    def __init__(
        self,
        scale: Tensor,
        shift: Tensor,
        *,
        channel_dim: int = 1,
        activation: str | None = None,
        trains: bool = True,
    ) -> None:
        super().__init__()
        check_activation(activation)
        self.scale, self.shift = nn.Parameter(scale, trains), nn.Parameter(shift, trains)
        self.channel_dim, self.activation = channel_dim, activation
        # What the fused kernels want beside: statistics that change nothing.
        self.register_buffer("zero", torch.zeros_like(scale.flatten()), persistent=False)
        self.register_buffer("one", torch.ones_like(scale.flatten()), persistent=False)

    def forward(self, x: Tensor, residual: Tensor | None = None, *, activation: str | None = None) -> Tensor:
        """The multiply-add, then the sum and the activation, if there are any.

        Args:
            x: Shape (N, C, *spatial), or (N, *spatial, C) with ``channel_dim=-1``.
            residual: Shape of ``x``.
            activation: For this call, of a layer that has none of its own.
        """
        if isinstance(x, torch.fx.Proxy):
            extra = {"residual": residual, "activation": activation}
            given = {name: value for name, value in extra.items() if value is not None}
            return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x,), given)
        name = self.activation or activation
        if torch.compiler.is_compiling() or (x.is_cpu and x.numel() <= _FEW):
            # In plain operations: compilers fuse them with their neighbours, every runtime knows
            # them, and on little data they take less than the call of a kernel.
            scale, shift = self.scale, self.shift
            dims = [1] * x.dim()
            dims[self.channel_dim] = -1
            shape = dims if scale.dim() == 1 else [1, *scale.shape]
            z = (x * scale.view(shape)).add_(shift.view(shape)).to(x.dtype)
            z = z if residual is None else z + residual
            return z if name is None else TABLE[check_activation(name)].value(z)
        flat, joined, dim = x, residual, self.channel_dim
        if self.scale.dim() > 1:
            flat, joined, dim = x.flatten(1), None if residual is None else residual.flatten(1), 1
        given = (flat, self.zero, self.one, self.scale.flatten(), self.shift.flatten())
        options: dict[str, Any] = {"activation": name, "residual": joined, "channel_dim": dim}
        return normalize_with(*given, eps=0.0, **options).reshape(x.shape)

    def extra_repr(self) -> str:
        """What `repr` shows."""
        named = f", activation={self.activation!r}" if self.activation else ""
        place = f", channel_dim={self.channel_dim}" if self.channel_dim != 1 else ""
        return f"{', '.join(map(str, self.scale.shape))}{place}{named}"
