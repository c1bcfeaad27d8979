"""Normalization of virtual batches: each part of a batch by its own moments."""

from typing import Any

import torch
from torch import Tensor

from batchnorm.functional.plain import batch_norm, check_arguments
from batchnorm.kernels import reference
from batchnorm.kernels.activations import check_activation
from batchnorm.moments import Moments


def ghost_batch_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    ghost_size: int,
    eps: float = 1e-5,
    activation: str | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    channel_dim: int = 1,
) -> tuple[Tensor, Moments]:
    """`batch_norm` of every ghost, a virtual batch of ``ghost_size`` examples, by its own moments.

    A batch of N examples has G = N // ``ghost_size`` ghosts, at least one, of sizes as equal as can
    be. So no example is left out, and no ghost is smaller than ``ghost_size`` unless the batch is.
    Examples are dealt out in turn, as cards are: of a batch that G divides, example n belongs to
    ghost n mod G. Otherwise the first examples make up the ghosts that are larger by one, and the
    rest the others, each dealt out likewise.

    Args:
        x: As in `batch_norm`; examples are along dimension 0.
        weight: As in `batch_norm`; so are the other arguments not listed here.
        ghost_size: Examples in a ghost, at least.

    Returns:
        ``y`` with the shape, dtype and memory layout of ``x``, and the biased moments of the whole
        batch: those of the ghosts, merged.

    Raises:
        TypeError: ``x`` is not floating point.
        ValueError: As `batch_norm`; ``ghost_size`` is not a positive whole number, or a ghost would
            hold one value per channel.

    Source: Hoffer, Hubara & Soudry (2017), arXiv 1705.08741, algorithm 1.
    """
    given = {"eps": eps, "activation": activation, "residual": residual, "mask": mask}
    y, ghosts = by_ghosts(x, weight, bias, ghost_size=ghost_size, channel_dim=channel_dim, **given)
    return y, pooled(ghosts)


def by_ghosts(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    ghost_size: int,
    eps: float,
    activation: str | None,
    residual: Tensor | None,
    mask: Tensor | None,
    channel_dim: int,
) -> tuple[Tensor, list[Moments]]:
    """`ghost_batch_norm`, with the moments of its ghosts: one entry for ghosts of one size, shape (G, C)."""
    check_ghost_size(ghost_size)
    check_arguments(x, weight, bias, eps, activation, residual, mask, channel_dim)
    num = x.shape[0]
    num_ghosts = max(num // ghost_size, 1) if x.numel() else 1
    if num_ghosts == 1:
        given = {"activation": activation, "residual": residual, "mask": mask, "channel_dim": channel_dim}
        y, whole = batch_norm(x, weight, bias, eps=eps, **given)
        return y, [Moments(whole.mean.unsqueeze(0), whole.var.unsqueeze(0), whole.count)]
    if ghost_size == 1 and x.numel() == num * x.shape[channel_dim]:
        raise ValueError(
            f"a ghost must hold more than one value per channel to be normalized by its own moments; with "
            f"ghost_size=1, those of an input of shape {tuple(x.shape)} hold one (give ghost_size=2 or more)"
        )
    size, num_larger = divmod(num, num_ghosts)
    cuts = [(size + 1) * num_larger, size * (num_ghosts - num_larger)]
    first = _channels_first(x, channel_dim), _channels_first(residual, channel_dim), mask
    if num_larger == 0:
        y, moments = _deal(*first, weight, bias, num_ghosts, eps, activation)
        found = [moments]
    else:
        parts: Any = zip(*([None] * 2 if t is None else t.split(cuts) for t in first), strict=True)
        done: list[tuple[Tensor, Moments]] = [
            _deal(px, pr, pm, weight, bias, number, eps, activation)
            for (px, pr, pm), number in zip(parts, (num_larger, num_ghosts - num_larger), strict=True)
        ]
        y, found = torch.cat([part for part, _ in done]), [moments for _, moments in done]
    y = y if channel_dim == 1 else y.movedim(1, -1)
    return y if y.stride() == x.stride() else torch.empty_like(x).copy_(y), found


def pooled(ghosts: list[Moments]) -> Moments:
    """The moments of all ghosts' samples, from what `by_ghosts` gives."""
    return Moments.merged(_merged(part) for part in ghosts)


def _merged(part: Moments) -> Moments:
    """Moments of shape (G, C), and a count for each or shape (G,), in one."""
    number = part.mean.shape[0]
    if number == 1:
        count = part.count.sum() if isinstance(part.count, Tensor) else part.count
        return Moments(part.mean[0], part.var[0], count)
    if isinstance(part.count, Tensor):
        whole = Moments.pooled(part.mean.double(), part.var.double(), part.count.double())
        return Moments(whole.mean, whole.var, part.count.sum()).to(part.mean.dtype)
    mean = part.mean.mean(0)
    return Moments(mean, (part.var + (part.mean - mean).square()).mean(0), number * part.count)


def _channels_first(t: Tensor | None, channel_dim: int) -> Tensor | None:
    return t if t is None or channel_dim == 1 else t.movedim(-1, 1)


def _deal(
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    num_ghosts: int,
    eps: float,
    activation: str | None,
) -> tuple[Tensor, Moments]:
    """Ghosts of one size, examples dealt out in turn.

    Then a ghost's channel is to the batch what a channel is: of a contiguous tensor a view has them
    as so many more channels, and the kernels do what they do for a batch.
    """
    if mask is not None:
        return _deal_masked(x, residual, mask, weight, bias, num_ghosts, eps, activation)

    # Where channels lie innermost, examples are dealt by copying whole runs of them.
    by_rows = x.dim() > 2 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()
    num, C = x.shape[:2]

    def dealt(t: Tensor | None) -> Tensor | None:
        if t is None or not by_rows:
            return None if t is None else t.reshape(-1, num_ghosts * C, *x.shape[2:])
        rows = t.movedim(1, -1).reshape(num // num_ghosts, num_ghosts, -1, C)
        return rows.transpose(1, 2).reshape(-1, num_ghosts * C)

    vectors = (None if v is None else v.repeat(num_ghosts) for v in (weight, bias))
    y, moments = batch_norm(dealt(x), *vectors, eps=eps, activation=activation, residual=dealt(residual))
    mean, var = (v.reshape(num_ghosts, C) for v in (moments.mean, moments.var))
    if by_rows:
        y = y.reshape(num // num_ghosts, -1, num_ghosts, C).transpose(1, 2)
        y = y.reshape(num, *x.shape[2:], C).movedim(-1, 1)
    return y.reshape(x.shape), Moments(mean, var, moments.count)


def _deal_masked(
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_ghosts: int,
    eps: float,
    activation: str | None,
) -> tuple[Tensor, Moments]:
    # A mask has no channels, so ghosts cannot be told apart as such: plain operations for each in its lane.
    def dealt(t: Tensor) -> Tensor:
        return t.reshape(-1, num_ghosts, *t.shape[1:])

    def ghost(x: Tensor, mask: Tensor, residual: Tensor | None) -> tuple[Tensor, ...]:
        y, moments = reference.forward(x, weight, bias, residual, mask, eps, check_activation(activation))
        return y, moments.mean.detach(), moments.var.detach(), torch.as_tensor(moments.count)

    lanes = (1, 1, None if residual is None else 1)
    given = (dealt(x), dealt(mask), None if residual is None else dealt(residual))
    y, mean, var, count = torch.vmap(ghost, in_dims=lanes, out_dims=(1, 0, 0, 0))(*given)
    return y.reshape(x.shape), Moments(mean, var, count)


def check_ghost_size(ghost_size: int) -> None:
    """Raise ``ValueError`` unless ``ghost_size`` is a positive whole number."""
    if not isinstance(ghost_size, int) or isinstance(ghost_size, bool) or ghost_size < 1:
        raise ValueError(f"ghost_size must be a positive whole number of examples, got {ghost_size!r}")
