"""Whether a written file computes what the model does: on the example and on other batch sizes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from batchnorm.surgery.models import outputs
from batchnorm.surgery.proof import allowed, difference, roundoff_of, widened

Runner = Callable[[tuple[Any, ...]], list[Tensor]]
"""Runs a written file on positional arguments: all tensors that come out."""

SPARE = 20
"""How many times the model's own rounding a file may be off: other programs sum in another order."""


@dataclass(frozen=True)
class Comparison:
    """The file against the model, on one batch.

    Attributes:
        runner: What ran the file.
        batch_size: Examples, or None where the model takes no batch.
        absolute: Largest difference of any entry of the outputs.
        relative: That over the largest entry.
        allowed: Relative difference that rounding explains.
    """

    runner: str
    batch_size: int | None
    absolute: float
    relative: float
    allowed: float

    @property
    def agrees(self) -> bool:
        """Whether the difference is one of rounding."""
        return self.relative <= self.allowed


def batch_size_of(args: tuple[Any, ...]) -> int | None:
    """The first dimension of the first tensor; None where there is none."""
    first = next((leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor) and leaf.dim()), None)
    return None if first is None else len(first)


def resized(args: tuple[Any, ...], size: int) -> tuple[Any, ...]:
    """The example with another number of rows: those that are there, over and over.

    Args:
        args: With ``batch_size_of(args)`` rows in each tensor that has a batch dimension.
        size: Rows wanted.
    """
    have = batch_size_of(args)
    assert have

    def of(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.dim() or len(value) != have:
            return value
        # From the last row on, so that a file that has kept the example's rows would show.
        return value[(torch.arange(size) + have - 1) % have]

    return tree_map(of, args)


def compare(
    model: nn.Module, runner: str, run: Runner, args: tuple[Any, ...], size: int | None
) -> Comparison:
    """Hold a file against a model.

    Args:
        model: On the CPU, in evaluation mode.
        runner: Name of what runs the file.
        run: Runs it.
        args: Arguments of both.
        size: Examples in them.
    """
    with torch.no_grad():
        expected = outputs(model, args)
    got = run(args)
    shapes = [tuple(t.shape) for t in expected]
    if shapes != [tuple(t.shape) for t in got]:
        raise ValueError(
            f"{runner} returns shapes {[tuple(t.shape) for t in got]} for a batch of {size}, "
            f"the model {shapes}"
        )
    gaps = [
        float((a.double() - b.double()).abs().max()) for a, b in zip(expected, got, strict=True) if a.numel()
    ]
    absolute = max((float("inf") if gap != gap else gap for gap in gaps), default=0.0)
    return Comparison(runner, size, absolute, difference(expected, got), _limit(model, args, expected))


def _limit(model: nn.Module, args: tuple[Any, ...], expected: Sequence[Tensor]) -> float:
    wide, wide_args = widened(model, args)
    if roundoff_of(wide) == roundoff_of(model):
        return allowed(model)
    with torch.no_grad():
        own = difference(outputs(wide, wide_args), expected)
    return min(SPARE * own + 100 * roundoff_of(model), 0.1)
