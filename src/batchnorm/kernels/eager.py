"""The lean road of eager calls: one autograd node straight to a kernel.

The operators of `ops` cost more than a small layer's arithmetic; `torch.compile` needs them,
eager calls do not. A second differentiation goes through operations that record a graph.
"""

from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels import ops, reference
from batchnorm.kernels.contract import SIGN_IS_ENOUGH, Kernel
from batchnorm.moments import Moments


def normalize(
    kernel: Kernel,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: str,
    known: Moments | None = None,
) -> tuple[Tensor, Moments]:
    """`Kernel.forward` with its gradient, from the batch's moments on where these are known."""
    if not _records(x, gamma, beta, residual):
        return _forward(kernel, known, x, gamma, beta, residual, mask, eps, activation)
    found = [] if known is None else [known]
    y = _apply(_Normalize)(x, gamma, beta, residual, mask, eps, activation, kernel, found)
    return y, found[0]


def apply(
    kernel: Kernel,
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
    """`Kernel.apply` with its gradient."""
    if not _records(x, gamma, beta, residual):
        return kernel.apply(x, mean, var, gamma, beta, residual, mask, eps, activation)
    return _apply(_Apply)(x, mean, var, gamma, beta, residual, mask, eps, activation, kernel)


def _forward(
    kernel: Kernel,
    known: Moments | None,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, Moments]:
    if known is None:
        return kernel.forward(x, gamma, beta, residual, mask, eps, activation)
    return kernel.apply(x, known.mean, known.var, gamma, beta, residual, mask, eps, activation), known


def _records(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _kept(y: Tensor, residual: Tensor | None, mask: Tensor | None, activation: str) -> Any:
    """Of the output and the residual, what backward needs."""
    if residual is None or (activation == "identity" and mask is None):
        return None, None
    return (y, None) if activation in SIGN_IS_ENOUGH else (None, residual)


def _cast(grad: Tensor, t: Tensor | None) -> Tensor | None:
    if t is None or grad.dtype == t.dtype:
        return None if t is None else grad
    return grad.to(t.dtype)


def _apply(function: type[torch.autograd.Function]) -> Any:
    # Past the wrapper that looks for function transforms in all arguments: there are none here.
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gamma, beta, residual, mask, eps, activation, kernel, found):
        known = found[0] if found else None
        y, moments = _forward(kernel, known, x, gamma, beta, residual, mask, eps, activation)
        found[:] = [moments]
        count = moments.count if mask is not None else None
        output, joined = _kept(y, residual, mask, activation)
        ctx.save_for_backward(x, output, gamma, beta, joined, mask, moments.mean, moments.var, count)
        ctx.settings = moments.count if count is None else 0, eps, activation, kernel, residual is not None
        return y

    @staticmethod
    def backward(ctx, dy):
        x, y, gamma, beta, residual, mask, mean, var, count = ctx.saved_tensors
        number, eps, activation, kernel, has_residual = ctx.settings
        if torch.is_grad_enabled() or type(dy) is not Tensor:
            count = torch.as_tensor(number, dtype=torch.int64, device=x.device) if count is None else count
            found = ops.normalize_backward(
                dy, x, y, gamma, beta, residual, mask, mean, var, count, eps, activation
            )
        else:
            moments = Moments(mean, var, number if count is None else count)
            found = kernel.backward(dy, x, y, gamma, beta, residual, mask, moments, eps, activation)
        dx, dgamma, dbeta, dresidual = found
        if has_residual and y is None and residual is None:
            dresidual = dy
        return dx, _cast(dgamma, gamma), _cast(dbeta, beta), dresidual if has_residual else None, *_NO_MORE


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, mean, var, gamma, beta, residual, mask, eps, activation, kernel):
        y = kernel.apply(x, mean, var, gamma, beta, residual, mask, eps, activation)
        output, joined = _kept(y, residual, mask, activation)
        # Copies: these are a layer's running statistics, which the next batch may move in place.
        ctx.save_for_backward(x, output, mean.clone(), var.clone(), gamma, beta, joined, mask)
        ctx.settings = eps, activation, kernel, residual is not None
        return y

    @staticmethod
    def backward(ctx, dy):
        x, y, mean, var, gamma, beta, residual, mask = ctx.saved_tensors
        eps, activation, kernel, has_residual = ctx.settings
        if torch.is_grad_enabled() or type(dy) is not Tensor:
            kernel = reference
        dx, dgamma, dbeta, dresidual = kernel.apply_backward(
            dy, x, y, mean, var, gamma, beta, residual, mask, eps, activation
        )
        if has_residual and y is None and residual is None:
            dresidual = dy
        dresidual = dresidual if has_residual else None
        return dx, None, None, _cast(dgamma, gamma), _cast(dbeta, beta), dresidual, None, None, None, None


_NO_MORE = (None,) * 5
