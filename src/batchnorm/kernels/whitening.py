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
        moments, off_CM, left_C = _centred(x, group, mask, channel_dim)
        z_CM = _mapped(off_CM, left_C, moments.cov, gamma, beta, eps, iterations)
        return _finished(z_CM, x, residual, mask, activation, channel_dim), moments


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
        off_CM = _where(mask_M, rows_CM - mean.unsqueeze(1).to(rows_CM.dtype))
        z_CM = _mapped(off_CM, None, cov_Cg.to(rows_CM.dtype), gamma, beta, eps, iterations)
        return _finished(z_CM, x, residual, mask, activation, channel_dim)


def _centred(
    x: Tensor, group: int, mask: Tensor | None, channel_dim: int
) -> tuple[Comoments, Tensor, Tensor]:
    """Moments, the samples without their mean, and the mean that rounding has left in these."""
    x_CM, mask_M = _rows(x, mask, channel_dim)
    count = x_CM.shape[1] if mask_M is None else mask_M.sum()
    divisor = max(count, 1) if isinstance(count, int) else count.clamp(min=1)
    first_C1 = x_CM.sum(1, keepdim=True) / divisor
    # The mean is refined, as in `Moments.of`. What that moves the covariances by is its square: nothing
    # that subtraction could lose.
    off_CM = _where(mask_M, x_CM - first_C1)
    left_C1 = off_CM.sum(1, keepdim=True) / divisor
    pairs = zip(_groups(off_CM, group), _groups(left_C1, group), strict=True)
    cov_Cg = torch.cat(
        [
            pad((part @ part.mT / divisor - left @ left.mT).flatten(0, 1), [0, group - part.shape[1]])
            for part, left in pairs
        ]
    )
    own = torch.arange(len(cov_Cg), device=x.device).unsqueeze(1) % group
    var = cov_Cg.gather(1, own).squeeze(1).clamp(min=0)
    return Comoments((first_C1 + left_C1).squeeze(1), var, count, cov_Cg), off_CM, left_C1.squeeze(1)


def _mapped(
    off_CM: Tensor,
    left_C: Tensor | None,
    cov_Cg: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    iterations: int,
) -> Tensor:
    """γ · root · (off − left) + β, as one product for each group."""
    size, dtype = cov_Cg.shape[1], off_CM.dtype
    vectors = [None if v is None else _columns(v.to(dtype), size) for v in (left_C, gamma, beta)]
    parts = []
    for i, (off, cov) in enumerate(zip(_groups(off_CM, size), _groups(cov_Cg, size), strict=True)):
        left, scale, shift = (None if v is None else v[i] for v in vectors)
        root = inverse_root(cov[..., : cov.shape[1]], eps, iterations)
        root = root if scale is None else scale * root
        if left is not None:
            shift = (0 if shift is None else shift) - root @ left
        parts.append((root @ off if shift is None else torch.baddbmm(shift, root, off)).flatten(0, 1))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _columns(vector_C: Tensor, group: int) -> list[Tensor]:
    """Vectors of channels as (groups, g, 1)."""
    return list(_groups(vector_C.unsqueeze(1), group))


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
    z_CM: Tensor, x: Tensor, residual: Tensor | None, mask: Tensor | None, activation: str, channel_dim: int
) -> Tensor:
    z = z_CM.reshape(x.movedim(channel_dim, 0).shape).movedim(0, channel_dim)
    if residual is not None:
        z = z + residual
    y = TABLE[activation].value(z)
    if mask is not None:
        y = torch.where(mask.unsqueeze(channel_dim), y, 0)
    return laid_out_as(y.to(x.dtype), x)


def laid_out_as(y: Tensor, x: Tensor) -> Tensor:
    """``y`` channels-last where ``x`` is, else contiguous."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if last is not None and x.is_contiguous(memory_format=last) and not x.is_contiguous():
        return y.contiguous(memory_format=last)
    return y.contiguous()
