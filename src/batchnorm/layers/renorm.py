"""Layers that correct each batch towards the running statistics, so that training is as inference."""

from collections import deque
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from batchnorm.functional.plain import batch_norm_by, check_arguments
from batchnorm.functional.renorm import check_limits, corrected, correction, moments_of
from batchnorm.layers import recompute
from batchnorm.layers.base import Normalization
from batchnorm.layers.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d, BatchNormPerActivation
from batchnorm.layers.ramp import Ramp
from batchnorm.layers.running import is_recomputation
from batchnorm.layers.variation import Variation
from batchnorm.moments import Moments

Limit = float | Callable[[Any], Any]
"""A number, or a function of the number of batches that have moved the running statistics."""

R_MAX, D_MAX = Ramp(1.0, 3.0, 5_000, 40_000), Ramp(0.0, 5.0, 5_000, 25_000)
"""The paper's limits (section 3): 1 and 0 for 5,000 steps, then more, r until 40,000 and d until 25,000."""

_MOST_KEPT = 16
"""Batches whose corrections are kept, for activation checkpointing to repeat them."""


def check_renorm(*, r_max: Limit, d_max: Limit) -> None:
    """Raise ``ValueError`` unless the limits, at the first step where they are functions, make sense."""
    limits = [limit(0) if callable(limit) else limit for limit in (r_max, d_max)]
    check_limits(*limits)


class Renorm(Variation):
    """What Batch Renormalization adds to the plain layers, whose arguments and state dicts it shares.

    In training ``y = activation(weight · (x̂·r + d) + bias + residual)``: `batchnorm.functional.batch_renorm`
    towards the layer's running statistics. In evaluation, or when frozen, the layer is the plain one.

    σ is sqrt(running_var + eps), of the running variance that inference uses. (The paper averages
    deviations; so within the limits training would not compute quite what inference does.)

    Steps are counted by ``num_batches_tracked``, which the state dict keeps: a schedule goes on where
    it was, and under `batchnorm.commit_on_step` a step is one of the optimizer. Until a first batch
    has moved the running statistics there is nothing to correct towards: r = 1 and d = 0.

    Args:
        args: As of the plain layer; the paper gives a batch less weight than usual, ``momentum=0.01``.
        r_max: The largest factor r, 1 or more: a number, or a function that is given the step as an
            ``int``. Under `torch.compile` and `torch.func` it is given a tensor of shape (), and nothing
            looks at what it returns. On a GPU an ``int`` has to be waited for, which a `Ramp` spares.
        d_max: The largest shift d, in deviations, 0 or more; likewise.
        kwargs: As of the plain layer.

    Raises:
        ValueError: As of the plain layer; a limit out of its range, when the layer is made or at the
            step where a function returns it; ``track_running_stats=False``.

    Source: Ioffe (2017), arXiv 1702.03275, algorithm 1.
    """

    settings = ("r_max", "d_max")
    differs: ClassVar = {"training": "the batch is corrected towards the running statistics"}
    check_settings = staticmethod(check_renorm)
    ended = "; the batch is not corrected towards the running statistics"

    def __init__(self, *args: Any, r_max: Limit = R_MAX, d_max: Limit = D_MAX, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self.track_running_stats:
            raise ValueError(
                "batch renormalization corrects towards running statistics: it needs track_running_stats=True"
            )
        self._vary(r_max=r_max, d_max=d_max)

    def _vary(self, **settings: Any) -> "Renorm":
        super()._vary(**settings)
        self._corrections = _Corrections()
        return self

    def _unvary(self) -> None:
        super()._unvary()
        del self._corrections

    def limits(self) -> tuple[Tensor | float, Tensor | float]:
        """``r_max`` and ``d_max`` at the step that comes next.

        Raises:
            ValueError: A function returned something else than a number in its range.
        """
        tracked: Any = self.num_batches_tracked
        if _is_transformed() or not (tracked.is_cpu or self._asks_for_steps):
            # No value is looked at: there is none yet, or a device would have to be waited for.
            found = [limit(tracked) if callable(limit) else limit for limit in (self.r_max, self.d_max)]
            r_max, d_max = (torch.as_tensor(v, dtype=torch.float32, device=tracked.device) for v in found)
            return torch.where(tracked > 0, r_max, 1.0), torch.where(tracked > 0, d_max, 0.0)
        step = int(tracked)
        now: list[Any] = [limit(step) if callable(limit) else limit for limit in (self.r_max, self.d_max)]
        try:
            check_limits(*now)
        except ValueError as error:
            raise ValueError(f"at step {step}, {error}") from None
        return (now[0], now[1]) if step else (1.0, 0.0)

    @property
    def _asks_for_steps(self) -> bool:
        return any(callable(v) and not isinstance(v, Ramp) for v in (self.r_max, self.d_max))

    def _by_batch(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, **options: Any
    ) -> tuple[Tensor, Moments]:
        check_arguments(x, None, None, self.eps, None, None, options["mask"], self.channel_dim)
        moments = moments_of(x, options["mask"], self.channel_dim)
        weight, bias = corrected(weight, bias, *self._correction(moments))
        y, moments = batch_norm_by(moments, x, weight, bias, **options)
        recompute.offer(y, x, [moments.mean, moments.var, weight, bias], **options)
        return y, moments

    def _correction(self, moments: Moments) -> tuple[Tensor, Tensor]:
        known = self._corrections.find(moments) if is_recomputation() else None
        if known is not None:
            return known
        (mean, var), (r_max, d_max) = self._vectors()[2:], self.limits()
        assert mean is not None
        assert var is not None
        found = correction(moments, mean, var, eps=self.eps, r_max=r_max, d_max=d_max)
        if not _is_transformed():
            self._corrections.keep(moments, found)
        return found


def _is_transformed() -> bool:
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


class _Corrections:
    """What the last batches were corrected by, for those that activation checkpointing runs again.

    Then the running statistics have moved. A batch is known by its moments, which are the same bits.
    """

    def __init__(self) -> None:
        self._kept: deque[tuple[Moments, tuple[Tensor, Tensor]]] = deque(maxlen=_MOST_KEPT)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()

    def keep(self, moments: Moments, correction: tuple[Tensor, Tensor]) -> None:
        self._kept.append((moments, correction))

    def find(self, moments: Moments) -> tuple[Tensor, Tensor] | None:
        """The newest correction of such a batch; ``None`` where this one has not been run before.

        Raises:
            RuntimeError: It may have been, but too many came after it.
        """
        for known, its_correction in reversed(self._kept):
            if torch.equal(known.mean, moments.mean) and torch.equal(known.var, moments.var):
                return its_correction
        if len(self._kept) == _MOST_KEPT:
            raise RuntimeError(
                f"a batch is run again in a backward pass, as activation checkpointing does, more than "
                f"{_MOST_KEPT} batches after it was run: what it was corrected by is not kept for so long"
            )
        return None


class BatchRenorm1d(Renorm, BatchNorm1d):
    """`BatchNorm1d`, corrected towards its running statistics."""


class BatchRenorm2d(Renorm, BatchNorm2d):
    """`BatchNorm2d`, corrected towards its running statistics."""


class BatchRenorm3d(Renorm, BatchNorm3d):
    """`BatchNorm3d`, corrected towards its running statistics."""


class BatchRenormPerActivation(Renorm, BatchNormPerActivation):
    """`BatchNormPerActivation`, corrected towards its running statistics."""


RENORMS: dict[type[Normalization], type[Renorm]] = {
    BatchNorm1d: BatchRenorm1d,
    BatchNorm2d: BatchRenorm2d,
    BatchNorm3d: BatchRenorm3d,
    BatchNormPerActivation: BatchRenormPerActivation,
}
"""The renormalizing class for each of the plain ones."""
