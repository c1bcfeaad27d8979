"""Normalization with statistics of each time step by itself, and one γ and β for all steps."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.functional import normalize_with
from batchnorm.layers import small
from batchnorm.layers.base import where
from batchnorm.layers.batchnorm import BatchNorm1d
from batchnorm.layers.pending import Pending


class StepBatchNorm(BatchNorm1d):
    """One time step of a `StepwiseBatchNorm`: its own running statistics, the owner's γ and β.

    A normalization like any other to all that looks for one: `batchnorm.recalibrate`, `freeze`,
    `commit_on_step`, `watch`.

    Args:
        owner: Whose γ and β are used.
        options: As of `BatchNorm1d`.
    """

    def __init__(self, owner: "StepwiseBatchNorm", **options: Any) -> None:
        super().__init__(owner.num_features, affine=False, **options)
        # Past Module.__setattr__: the owner holds its steps, not they it.
        self.__dict__["owner"] = owner

    def _vectors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        shared, own = self.__dict__["owner"]._parameters, self._buffers
        return shared["weight"], shared["bias"], own["running_mean"], own["running_var"]

    def by_running(self, x: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
        """What `forward` gives in evaluation, in either mode."""
        self._check_input_dim(x)
        weight, bias, mean, var = self._vectors()
        if x.is_cpu and not torch.compiler.is_compiling():
            given = (x, weight, bias, mean, var, None, None, self.eps, activation, residual)
            y = small.normalize_with(*given)
            if y is not None:
                return y
        options: dict[str, Any] = {"eps": self.eps, "activation": activation, "residual": residual}
        return normalize_with(x, mean, var, weight, bias, **options)

    def affine_parameters(self) -> dict[str, nn.Parameter]:
        """γ and β, which all steps share."""
        return dict(self.__dict__["owner"].named_parameters(recurse=False))


class StepwiseBatchNorm(nn.Module):
    """Normalizes what a recurrent network computes at a time step by the statistics of that step.

    Early steps of a sequence have statistics of their own, as the state starts from one point and
    spreads, so each of the first ``max_length`` steps has its own; all later ones share the last's.

    - In training, a step is normalized by its batch. A step that a single sequence reaches has no
      variance: it is normalized by running statistics, and moves none.
    - In evaluation, or when frozen, by the step's running statistics; where training has never moved
      them, as no sequence was so long, by those of the last step before it that training has moved.
      (Not in compiled code, which cannot look: there by the step's own.)

    Args:
        num_features: C.
        max_length: Steps with statistics of their own, at least one.
        eps: Added to the variance (squared units of the input).
        momentum: As of `BatchNorm1d`.
        gamma: Initial γ, positive. Where tanh follows, 1 would saturate it.
        bias: Whether there is a β.
        device: Of parameters and buffers.
        dtype: Of parameters; running statistics stay in float32 or wider.

    Attributes:
        weight: γ, shape (C,).
        bias: β, shape (C,), or ``None``.
        steps: One normalization for each step.

    Raises:
        ValueError: ``max_length`` is less than 1, ``gamma`` is not positive, or ``eps`` is negative.

    Source: Cooijmans et al. (2017), *Recurrent Batch Normalization*, sections 3 and 4.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        num_features: int,
        max_length: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        *,
        gamma: float = 0.1,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
            raise ValueError(
                f"max_length must be a number of time steps, at least 1, got {max_length!r}: the length of "
                f"the training sequences, or after how many steps their statistics change no more"
            )
        if not gamma > 0:
            raise ValueError(f"gamma, the initial scale, must be positive, got {gamma}")
        self.num_features, self.max_length, self.eps, self.gamma = num_features, max_length, eps, gamma
        self.weight = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.register_parameter("bias", nn.Parameter(torch.empty_like(self.weight)) if bias else None)
        options: dict[str, Any] = {"eps": eps, "momentum": momentum, "device": device, "dtype": dtype}
        self.steps = nn.ModuleList(StepBatchNorm(self, **options) for _ in range(max_length))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """γ is ``gamma`` again, β zero, and no step has statistics."""
        nn.init.constant_(self.weight, self.gamma)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        for step in self.steps:
            step.reset_running_stats()

    def forward(
        self, x: Tensor, step: int, residual: Tensor | None = None, *, activation: str | None = None
    ) -> Tensor:
        """``activation(BN(x) + residual)`` by the statistics of one time step.

        Args:
            x: Shape (N, C): the sequences that are alive at this step.
            step: The time step, from 0.
            residual: Added before the activation, shape of ``x``.
            activation: One of `batchnorm.functional.ACTIVATIONS`.

        Returns:
            Shape and dtype of ``x``.

        Raises:
            ValueError: ``step`` is negative, or a shape does not fit.
            TypeError: ``x`` is not floating point.
        """
        if step < 0:
            raise ValueError(f"a time step is 0 or more, got {step}")
        index = min(step, self.max_length - 1)
        layer = self._at(index)
        by_batch = layer.training and not layer.frozen
        if not by_batch or x.shape[0] == 1:
            layer = self._at(self._last_moved(index))
        if not by_batch or x.shape[0] != 1:
            return layer(x, residual, activation=activation)
        return layer.by_running(x, residual, activation)

    @contextmanager
    def together(self, num_steps: int) -> Iterator[None]:
        """Within, one sequence: the steps that share the last statistics move them once.

        By the pooled moments of all these steps, as by one batch: moved at each of them, the
        running statistics would be those of the last few.

        Args:
            num_steps: Number of the sequence's last step.
        """
        last = self._at(self.max_length - 1)
        if num_steps <= self.max_length or not last.training or last.pending is not None:
            yield
            return
        last.pending = pending = Pending(last)
        try:
            yield
        finally:
            del last.pending
        with torch.no_grad():
            pending.settle(last)

    def _at(self, index: int) -> StepBatchNorm:
        layer = self.steps[index]
        assert isinstance(layer, StepBatchNorm)
        return layer

    def _last_moved(self, index: int) -> int:
        """The last step up to this one whose statistics were ever moved; this one if none was."""
        if torch.compiler.is_compiling():
            return index
        for earlier in range(index, -1, -1):
            if int(self._at(earlier).num_batches_tracked):
                return earlier
        return index

    def extra_repr(self) -> str:
        """What `repr` shows of the settings."""
        return f"{self.num_features}, max_length={self.max_length}, eps={self.eps}"

    def __repr__(self) -> str:
        # Not the steps, of which there may be hundreds.
        return f"{type(self).__name__}({self.extra_repr()})"


def check_first_batch(module: nn.Module, num_sequences: int, first_step: int) -> None:
    """Raise ``ValueError`` for training on one sequence: only later steps may lose all others."""
    if module.training and num_sequences == 1 and first_step == 0:
        frozen = all(m.frozen for m in module.modules() if isinstance(m, StepBatchNorm))
        if not frozen:
            raise ValueError(
                "training needs two sequences of at least one step, got one: nothing could be normalized "
                "by its batch (use a larger batch, drop the last one of an epoch, or call .eval())"
            )


def placed(module: nn.Module, error: Exception) -> Exception:
    """The error with the module's path in it, but for compiled code, which cannot look for it."""
    return error if torch.compiler.is_compiling() else type(error)(f"{where(module)}: {error}")
