"""PyTorch's own batch normalization, with the addition and the activation as operations after it.

Implements `contract.Kernel`; being made of PyTorch's operations, its forward functions also record
a graph where gradients are wanted, which is how eager code uses them.
"""

import torch
from torch import Tensor

from batchnorm.kernels.activations import TABLE
from batchnorm.kernels.contract import Gradients
from batchnorm.moments import Moments

_CUDNN = True  # where it is installed and suits


def refuses(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    activation: str,
) -> str:
    """Why PyTorch's kernel cannot run on such tensors; empty if it can."""
    return "" if mask is None else "PyTorch's own kernel has no mask"


def forward(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, Moments]:
    """See `contract.Kernel.forward`; PyTorch hands out moments only as running averages."""
    wide, C = _wide(x), x.shape[1]
    mean, unbiased = x.new_zeros(C, dtype=wide), x.new_zeros(C, dtype=wide)
    y = torch.batch_norm(x, _to(gamma, wide), _to(beta, wide), mean, unbiased, True, 1.0, eps, _CUDNN)
    count = x.numel() // C
    return _finish(y, residual, activation), Moments(mean, unbiased * ((count - 1) / count), count)


def moments(x: Tensor, mask: Tensor | None) -> Moments:
    """See `contract.Kernel.moments`; by plain operations."""
    return Moments.of(x, mask=mask)


def apply(
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
    """See `contract.Kernel.apply`."""
    wide = _wide(x)
    given = (_to(gamma, wide), _to(beta, wide), _to(mean, wide), _to(var, wide))
    y = torch.batch_norm(x, *given, False, 0.0, eps, _CUDNN)
    return _finish(y, residual, activation)


def backward(
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
    """See `contract.Kernel.backward`: PyTorch's own gradient of the forward, which it runs again."""
    return _gradients(dy, x, y, gamma, beta, residual, eps, activation, None)


def apply_backward(
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
    """See `contract.Kernel.apply_backward`."""
    return _gradients(dy, x, y, gamma, beta, residual, eps, activation, (mean, var))


def _gradients(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str,
    statistics: tuple[Tensor, Tensor] | None,
) -> Gradients:
    wide = _wide(x)
    if y is not None:
        dy, activation = dy * TABLE[activation].derivative(y), "identity"
    ones = torch.ones(x.shape[1], dtype=wide, device=x.device)
    given = (
        x,
        ones if gamma is None else gamma.to(wide),
        ones * 0 if beta is None else beta.to(wide),
        residual,
    )
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in given if t is not None]
        extra = leaves[3] if residual is not None else None
        if statistics is None:
            out, _ = forward(leaves[0], leaves[1], leaves[2], extra, None, eps, activation)
        else:
            out = apply(leaves[0], *statistics, leaves[1], leaves[2], extra, None, eps, activation)
    dx, dgamma, dbeta, *dresidual = torch.autograd.grad(out, leaves, dy.to(out.dtype))
    if y is not None:
        dresidual = [dy]
    return dx, dgamma, dbeta, dresidual[0] if dresidual else None


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _to(v: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return v if v is None or v.dtype == dtype else v.to(dtype)


def _finish(y: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    # In place: no gradient needs the output of the normalization itself.
    if residual is not None:
        y = y.add_(residual)
    return y.relu_() if activation == "relu" else TABLE[activation].value(y)
