"""What is left of a fused layer when its normalization has been folded away."""

from torch import Tensor, nn

from batchnorm.kernels.activations import TABLE, check_activation


class Joined(nn.Module):
    """``activation(x + residual)``, called as our layers are.

    Args:
        activation: One of `batchnorm.functional.ACTIVATIONS`, or ``None``.

    Raises:
        ValueError: ``activation`` is unknown.
    """

    def __init__(self, activation: str | None = None) -> None:
        super().__init__()
        check_activation(activation)
        self.activation = activation

    def forward(self, x: Tensor, residual: Tensor | None = None, *, activation: str | None = None) -> Tensor:
        """The sum, if there is one, and the activation, if there is one.

        Args:
            x: Any shape.
            residual: Shape of ``x``.
            activation: For this call, of a layer that has none of its own.
        """
        z = x if residual is None else x + residual
        return TABLE[check_activation(self.activation or activation)].value(z)

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return "" if self.activation is None else f"activation={self.activation!r}"
