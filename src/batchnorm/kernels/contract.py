"""What every kernel offers, so that dispatch can put one in another's place.

A kernel is a module with the six functions of `Kernel`. All tensors are plain (no autograd
graph is recorded through a kernel), on one device, and in canonical shape: ``x`` is
(N, C, *spatial) with N·S ≥ 1 samples per channel, in any memory layout; vectors are (C,).
"""

from typing import Protocol

from torch import Tensor

from batchnorm.moments import Moments

SIGN_IS_ENOUGH = ("relu", "leaky_relu")
"""Activations whose slope follows from the sign of their output: with a residual, backward is
given the saved ``y`` and no residual, which then need not be kept alive."""

Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""∂x in the dtype and layout of x, ∂γ and ∂β in float32 or wider, and ∂residual in the dtype and
layout of x, ``None`` where there is no residual. For the activation ``identity`` ∂residual
may be ``dy`` itself."""


class Kernel(Protocol):
    """Forward and backward of ``y = activation(γ·(x − mean)/sqrt(var + eps) + β + residual)``.

    Statistics and all arithmetic are float32 or wider. Where ``mask`` (bool, shape (N, *spatial))
    is false, ``y`` and the gradients are zero, whatever ``x``, ``dy`` and ``residual`` hold there.
    """

    def refuses(
        self,
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        activation: str,
    ) -> str:
        """Why this kernel cannot run on such tensors; empty if it can. Looks at no value."""
        ...

    def forward(
        self,
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        eps: float,
        activation: str,
    ) -> tuple[Tensor, Moments]:
        """``y`` in the dtype and layout of ``x``, and the batch's biased moments.

        Their count is an ``int``, or with a mask an int64 tensor of shape () on x's device.
        """
        ...

    def moments(self, x: Tensor, mask: Tensor | None) -> Moments:
        """The moments that `forward` gives, and nothing else."""
        ...

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        y: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        moments: Moments,
        eps: float,
        activation: str,
    ) -> Gradients:
        """Gradients through the moments of the batch, which are those that `forward` gave.

        There was a residual if ``residual`` or ``y`` is given; ``y`` is, and ``residual`` is not,
        for the activations of `SIGN_IS_ENOUGH`. ``dy`` may have any layout.
        """
        ...

    def apply(
        self,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        eps: float,
        activation: str,
    ) -> Tensor:
        """``y`` by given statistics, as in evaluation or when frozen."""
        ...

    def apply_backward(
        self,
        dy: Tensor,
        x: Tensor,
        y: Tensor | None,
        mean: Tensor,
        var: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        eps: float,
        activation: str,
    ) -> Gradients:
        """Gradients of `apply`, with the statistics held constant."""
        ...
