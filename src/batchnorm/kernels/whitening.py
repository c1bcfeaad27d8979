"""Whitening of groups of channels by Newton's iteration, in operations that autograd knows.

Shapes: C channels, M samples of each (batch and locations), groups of g channels. ``x_CM`` has
shape (C, M); ``cov_Ggg`` holds the covariances of G groups.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from batchnorm.comoments import Comoments
from batchnorm.kernels.activations import TABLE
from batchnorm.kernels.reference import before_activation, visible


def inverse_root(cov_Ggg: Tensor, eps: float, iterations: int) -> Tensor:
    """Towards (cov + eps · 1)^(−1/2), by Newton's iteration from the unit matrix.

    P ← P · (3 − P² Σ) / 2, where Σ is the matrix divided by its trace. P² Σ is carried along: the
    same numbers in exact arithmetic, and the error of rounding does not grow with the iterations.

    Args:
        cov_Ggg: Symmetric, positive semidefinite; float32 or wider.
        eps: Added to the diagonal.
        iterations: An eigenvalue that is a share s of the trace is right after about
            log(1 / √s) / log(1.5) of them; what is smaller is scaled up by 1.5 each time.

    Source: Huang et al. (2019), Algorithm 1; Higham (2008), section 7.3, for carrying P² Σ.
    """
    one = torch.eye(cov_Ggg.shape[-1], dtype=cov_Ggg.dtype, device=cov_Ggg.device)
    regular = cov_Ggg + eps * one
    trace = regular.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    error, root = regular / trace, one.expand_as(regular)
    for i in range(iterations):
        step = 1.5 * one - 0.5 * error
        root = root @ step
        if i + 1 < iterations:
            error = step @ error @ step
    return root * trace.rsqrt()


def comoments(x: Tensor, group: int, mask: Tensor | None, channel_dim: int) -> Comoments:
    """Mean and covariances within groups, in the dtype of ``x``, float32 at least."""
    return _centred(x, group, mask, channel_dim)[0]


def forward(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: str,
    *,
    group: int,
    iterations: int,
    channel_dim: int,
) -> tuple[Tensor, Comoments]:
    """Whiten by the covariances of this batch, scale, shift, add, activate.

    Args:
        x: Shape (N, C, *spatial), or (N, *spatial, C) with ``channel_dim=-1``.
        gamma: Shape (C,), or ``None`` for ones; so is ``beta``, for zeros.
        residual: Added before the activation, shape of ``x``.
        mask: Boolean, shape of ``x`` without channels: samples that count. Others give zeros.
        eps: Added to the variances.
        activation: A name in `TABLE`.
        group: Channels of a group.
        iterations: Of `inverse_root`.
        channel_dim: 1 or -1.

    Returns:
        ``y`` with shape and dtype of ``x``, and the moments, all differentiable.

    Source: Huang et al. (2019), Algorithm 1.
    """
    with torch.autocast(x.device.type, enabled=False):
        moments, deviations_CM = _centred(x, group, mask, channel_dim)
        whitened_CM = _whitened(deviations_CM, moments.cov, eps, iterations)
        return _finished(whitened_CM, x, gamma, beta, residual, mask, activation, channel_dim), moments


def apply(
    x: Tensor,
    mean: Tensor,
    cov_Cg: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: str,
    *,
    iterations: int,
    channel_dim: int,
) -> Tensor:
    """The same with given mean and covariances, as `Comoments` has them; differentiable in all."""
    with torch.autocast(x.device.type, enabled=False):
        rows_CM, mask_M = _rows(x, mask, channel_dim)
        deviations_CM = _where(mask_M, rows_CM - mean.unsqueeze(1).to(rows_CM.dtype))
        whitened_CM = _whitened(deviations_CM, cov_Cg.to(rows_CM.dtype), eps, iterations)
        return _finished(whitened_CM, x, gamma, beta, residual, mask, activation, channel_dim)


def _centred(x: Tensor, group: int, mask: Tensor | None, channel_dim: int) -> tuple[Comoments, Tensor]:
    x_CM, mask_M = _rows(x, mask, channel_dim)
    count = x_CM.shape[1] if mask_M is None else mask_M.sum()
    divisor = max(count, 1) if isinstance(count, int) else count.clamp(min=1)
    first_C1 = x_CM.sum(1, keepdim=True) / divisor
    # Around a mean that is refined, as in `Moments.of`: covariances of x − mean are those of x.
    off_CM = _where(mask_M, x_CM - first_C1)
    correction_C1 = off_CM.sum(1, keepdim=True) / divisor
    deviations_CM = _where(mask_M, off_CM - correction_C1)
    cov_Cg = torch.cat(
        [
            pad((part @ part.mT / divisor).flatten(0, 1), [0, group - part.shape[1]])
            for part in _groups(deviations_CM, group)
        ]
    )
    var = (deviations_CM.square().sum(1)) / divisor
    return Comoments((first_C1 + correction_C1).squeeze(1), var, count, cov_Cg), deviations_CM


def _whitened(deviations_CM: Tensor, cov_Cg: Tensor, eps: float, iterations: int) -> Tensor:
    size = cov_Cg.shape[1]
    parts = zip(_groups(deviations_CM, size), _groups(cov_Cg, size), strict=True)
    return torch.cat(
        [
            (inverse_root(cov[..., : cov.shape[1]], eps, iterations) @ part).flatten(0, 1)
            for part, cov in parts
        ]
    )


def _groups(rows: Tensor, group: int) -> Iterator[Tensor]:
    """Rows of channels as (groups, g, …): the whole groups, then what is left, if anything is."""
    whole = len(rows) // group * group
    if whole:
        yield rows[:whole].unflatten(0, (-1, group))
    if whole < len(rows):
        yield rows[whole:].unsqueeze(0)


def _rows(x: Tensor, mask: Tensor | None, channel_dim: int) -> tuple[Tensor, Tensor | None]:
    x_CM = x.movedim(channel_dim, 0).flatten(1).to(torch.promote_types(x.dtype, torch.float32))
    mask_M = None if mask is None else mask.flatten()
    return _where(mask_M, x_CM), mask_M


def _where(mask_M: Tensor | None, t_CM: Tensor) -> Tensor:
    # What the mask hides may hold anything, NaN included.
    return t_CM if mask_M is None else torch.where(mask_M, t_CM, 0)


def _finished(
    whitened_CM: Tensor,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    activation: str,
    channel_dim: int,
) -> Tensor:
    first = x.movedim(channel_dim, 0).shape
    x_hat = whitened_CM.reshape(first).transpose(0, 1) if channel_dim == 1 else whitened_CM.reshape(first)
    if channel_dim == -1:
        rows = x_hat.flatten(1).t()
        flat = None if residual is None else residual.reshape(rows.shape)
        z = before_activation(rows, gamma, beta, flat)
        shown = visible(TABLE[activation].value(z), None if mask is None else mask.flatten())
        return shown.to(x.dtype).reshape(x.shape)
    z = before_activation(x_hat, gamma, beta, residual)
    return laid_out_as(visible(TABLE[activation].value(z), mask).to(x.dtype), x)


def laid_out_as(y: Tensor, x: Tensor) -> Tensor:
    """``y`` channels-last where ``x`` is, else contiguous."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if last is not None and x.is_contiguous(memory_format=last) and not x.is_contiguous():
        return y.contiguous(memory_format=last)
    return y.contiguous()
