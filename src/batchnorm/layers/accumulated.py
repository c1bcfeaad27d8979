"""Layers that normalize a micro-batch by its own moments merged with those of the ones before it."""

from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from batchnorm.functional.plain import as_rows, check_arguments, check_size
from batchnorm.kernels import reference
from batchnorm.layers.base import Normalization
from batchnorm.layers.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d, BatchNormPerActivation
from batchnorm.layers.running import is_recomputation
from batchnorm.layers.variation import Variation
from batchnorm.moments import Moments

_WINDOW = ("window_mean", "window_var", "window_count")


def check_settings(*, micro_batches: int) -> None:
    """Raise ``ValueError`` unless it is a positive whole number."""
    if not isinstance(micro_batches, int) or isinstance(micro_batches, bool) or micro_batches < 1:
        raise ValueError(f"micro_batches must be a whole number of at least 1, got {micro_batches!r}")


class Accumulated(Variation):
    """What accumulated Batch Normalization adds to the plain layers.

    In training each micro-batch is normalized by the moments of all samples of itself and of the
    ``micro_batches`` − 1 before it, a sliding window: the law of `Moments.merge`, so that micro-batches
    of any sizes, and masks, weigh by their samples. In evaluation, or when frozen, the layer is the
    plain one.

    The gradient of a big batch holds two sums over all its samples, of dy and of dy · x̂, from the mean
    and the variance. They are estimated from this micro-batch: its means stand for those of all, as if
    the others had the same. Where they do, it is the gradient of the big batch. To hold the others
    constant instead would leave all but a share of 1 / k of these terms out, and training would not
    see most of the normalization.

    The window holds micro-batches and not steps of an optimizer: give the number that gradients are
    accumulated over. It goes on over steps, with moments that older weights gave; `restart` empties
    it. A micro-batch that is not finite, or of which a mask shows nothing, does not enter it.

    Running statistics move by what the window holds, or, with a handle of
    `batchnorm.commit_on_step`, once a step by the samples of that step.

    The window is in the state dict (``window_mean`` and ``window_var`` of shape (k, C), and
    ``window_count`` (k,), newest first), so that a resumed run goes on with the same numbers. A state
    dict of a plain layer can be loaded: the window is then empty.

    Args:
        args: As of the plain layer.
        micro_batches: Of the window, with the present one; 1 is the plain layer.
        kwargs: As of the plain layer.

    Raises:
        ValueError: As of the plain layer; ``micro_batches`` is not a positive whole number; one value
            per channel while the window holds nothing; training under `torch.func` transforms; a
            backward pass that runs a micro-batch again (activation checkpointing) after a later one.

    Source: Yao et al. (2021), arXiv 2002.05712, without their compensation for changed weights; Chan,
    Golub & LeVeque (1983) for the merging.
    """

    settings = ("micro_batches",)
    differs: ClassVar = {"training": "micro-batches are normalized together with those before them"}
    check_settings = staticmethod(check_settings)
    own_buffers = _WINDOW
    ended = "; each batch is normalized by itself"

    window_mean: Tensor
    window_var: Tensor
    window_count: Tensor
    micro_batches: int

    def __init__(self, *args: Any, micro_batches: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._vary(micro_batches=micro_batches)

    def _vary(self, **settings: Any) -> Self:
        super()._vary(**settings)
        like = next(iter((*self._statistics().values(), *self.parameters(recurse=False))), torch.zeros(0))
        dtype = torch.promote_types(like.dtype, torch.float32)
        shape = (self.micro_batches, self.num_features)
        for name in _WINDOW[:2]:
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=like.device))
        self.register_buffer("window_count", torch.zeros(shape[0], dtype=torch.int64, device=like.device))
        return self

    @torch.no_grad()
    def restart(self) -> None:
        """Empty the window: the next micro-batch is normalized by itself."""
        for name in _WINDOW:
            self._buffers[name].zero_()

    def reset_running_stats(self) -> None:
        """Forget the running statistics, and empty the window."""
        super().reset_running_stats()
        if "window_count" in self._buffers:  # not yet there while the layer is made
            self.restart()

    def _is_plain(self, x: Tensor, by_running: bool) -> bool:
        return (by_running or self.micro_batches == 1) and Normalization._is_plain(self, x, by_running)

    def _by_batch(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, **options: Any
    ) -> tuple[Tensor, Moments]:
        if self.micro_batches == 1 or not self.training:
            return super()._by_batch(x, weight, bias, **options)
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            raise ValueError(
                "a window of micro-batches does not move under torch.func transforms (vmap, grad, …): use "
                "plain Batch Normalization there, bn.convert(model, to='plain')"
            )
        eps, channel_dim = options["eps"], options["channel_dim"]
        activation, residual, mask = options["activation"], options["residual"], options["mask"]
        name = check_arguments(x, weight, bias, eps, activation, residual, mask, channel_dim)
        rows = x
        if channel_dim == -1:
            rows, residual, mask = as_rows(x, residual, mask)
        is_single = x.numel() == x.shape[channel_dim] and not torch.compiler.is_compiling()
        if is_single and not self.window_count.any():
            check_size(x, channel_dim)
        moments = Moments.of(rows, mask=mask)
        whole = _merged(moments, *self._enter(moments.map(Tensor.detach)))
        y = reference.apply(rows, whole.mean, whole.var, weight, bias, residual, mask, eps, name)
        # A handle merges the micro-batches of a step itself; and nothing new moves nothing.
        moving = (
            moments if self.pending is not None else replace(whole, count=whole.count * (moments.count > 0))
        )
        return y.reshape(x.shape), moving.map(Tensor.detach)

    @torch.no_grad()
    def _enter(self, moments: Moments) -> list[Tensor]:
        """Put a micro-batch into the window; gives those before it: mean, variance, count."""
        window = (self.window_mean, self.window_var, self.window_count)
        count = torch.as_tensor(moments.count, device=moments.mean.device)
        new = (moments.mean, moments.var, count)
        sound = (moments.mean.sum() + moments.var.sum()).isfinite() & (count > 0)
        if is_recomputation():
            # The first run has put it in front: what is behind it is what it was normalized with.
            again = all(
                torch.allclose(t[0].double(), n.double(), rtol=1e-3, atol=1e-6)
                for t, n in zip(window, new, strict=True)
            )
            if sound and not again:
                raise ValueError(
                    "activation checkpointing runs a micro-batch again after a later one, whose window is "
                    "gone: call backward for a micro-batch before the next goes forward, and the layer once "
                    "in a forward"
                )
            return [(t[1:] if sound else t[:-1]).clone() for t in window]
        earlier = [t[:-1].clone() for t in window]
        for there, value in zip(window, new, strict=True):
            moved = torch.cat([value.unsqueeze(0).to(there.dtype), there[:-1]])
            there.copy_(torch.where(sound, moved, there))
        return earlier

    def _statistics(self) -> dict[str, Tensor]:
        named = {name: self._buffers.get(name) for name in _WINDOW[:2]}
        return super()._statistics() | {name: t for name, t in named.items() if t is not None}

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        missing = [f"{prefix}{name}" for name in _WINDOW if f"{prefix}{name}" not in state_dict]
        if len(missing) == len(_WINDOW):
            state_dict.update({f"{prefix}{name}": torch.zeros_like(self._buffers[name]) for name in _WINDOW})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if len(missing) == len(_WINDOW):
            for key in missing:
                state_dict.pop(key)


def _merged(moments: Moments, means: Tensor, variances: Tensor, counts: Tensor) -> Moments:
    """All samples together, with gradients as if every micro-batch had those of this one."""
    dtype = moments.mean.dtype
    count = torch.as_tensor(moments.count, device=counts.device).reshape(1)
    weights = torch.cat([count, counts])
    whole = Moments.pooled(
        torch.cat([moments.mean.detach().unsqueeze(0), means.to(dtype)]),
        torch.cat([moments.var.detach().unsqueeze(0), variances.to(dtype)]),
        weights.to(dtype),
    )
    # Zeros, but for their gradients: those of the mean of x, and of (x − mean)² around the common mean.
    of_mean = moments.mean - moments.mean.detach()
    around = moments.var + (moments.mean - whole.mean).square()
    return Moments(whole.mean + of_mean, whole.var + (around - around.detach()), weights.sum())


class AccumulatedBatchNorm1d(Accumulated, BatchNorm1d):
    """`BatchNorm1d` by a window of micro-batches."""


class AccumulatedBatchNorm2d(Accumulated, BatchNorm2d):
    """`BatchNorm2d` by a window of micro-batches."""


class AccumulatedBatchNorm3d(Accumulated, BatchNorm3d):
    """`BatchNorm3d` by a window of micro-batches."""


class AccumulatedBatchNormPerActivation(Accumulated, BatchNormPerActivation):
    """`BatchNormPerActivation` by a window of micro-batches."""


ACCUMULATED: dict[type[Normalization], type[Accumulated]] = {
    BatchNorm1d: AccumulatedBatchNorm1d,
    BatchNorm2d: AccumulatedBatchNorm2d,
    BatchNorm3d: AccumulatedBatchNorm3d,
    BatchNormPerActivation: AccumulatedBatchNormPerActivation,
}
"""The accumulating class for each of the plain ones."""
