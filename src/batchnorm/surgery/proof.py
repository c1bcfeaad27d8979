"""Whether two models compute the same: in float64 where they can, and what rounding explains."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from batchnorm.surgery.models import copied, outputs

Mode = Callable[[nn.Module], object]
"""Sets the mode of a model and of its parts."""


def difference(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Largest difference between two lists of outputs, relative to the largest entry of ``before``.

    Infinite when the lists do not match in number or shape.
    """
    if [t.shape for t in before] != [t.shape for t in after]:
        return float("inf")
    miss, scale = 0.0, 0.0
    for old, new in zip(before, after, strict=True):
        if old.numel():
            wide = torch.complex128 if old.is_complex() else torch.float64
            gap = (new.to(wide) - old.to(wide)).abs().max().item()
            miss = max(miss, float("inf") if gap != gap else gap)
            scale = max(scale, old.to(wide).abs().max().item())
    return miss / scale if scale else miss


def as_it_is(model: nn.Module) -> None:
    """The mode of a model that is left in its mode."""


def widened(
    model: nn.Module, args: Sequence[Any], mode: Mode = as_it_is
) -> tuple[nn.Module, tuple[Any, ...]]:
    """A copy and its example in float64; in their own dtypes if the model cannot run in it.

    A dtype written into a forward forbids float64, as do some devices.

    Args:
        model: Not changed.
        args: Example.
        mode: Sets the mode in which the copy is tried, and left.
    """
    try:
        wide, wide_args = copied(model).double(), _doubled(args)
        mode(wide)
        with torch.no_grad():
            outputs(wide, wide_args)
        return wide, wide_args
    except Exception:  # the user's forward may raise anything
        narrow = copied(model)
        mode(narrow)
        return narrow, tuple(args)


def roundoff_of(model: nn.Module) -> float:
    """Machine epsilon of the coarsest floating point type in a model."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return max((torch.finfo(t.dtype).eps for t in tensors if t.is_floating_point()), default=2.0**-23)


def largest_difference(
    before: nn.Module,
    after: nn.Module,
    args: Sequence[Any],
    modes: Sequence[Mode] = (as_it_is,),
) -> float:
    """How far two models' outputs differ on an example, as `difference` counts it.

    Args:
        before: Model to be matched.
        after: Model that should match it; the modes of both change.
        args: Example.
        modes: Each sets the modes of a model; the models are compared in all of them. Only the
            first has to run.
    """
    worst = 0.0
    for mode in modes:
        mode(before), mode(after)
        with torch.no_grad():
            try:
                expected = outputs(before, args)
            except Exception:  # such as a detector, which wants targets in training
                if mode is modes[0]:
                    raise
                continue
            worst = max(worst, difference(expected, outputs(after, args)))
    return worst


def learning(model: nn.Module, args: Sequence[Any]) -> set[str]:
    """Names of the parameters that a gradient of the outputs reaches, in evaluation mode.

    Args:
        model: Its gradients and modes change.
        args: Example.
    """
    model.eval().zero_grad(set_to_none=True)
    with torch.enable_grad():
        ends = [t.sum() for t in outputs(model, args) if t.requires_grad]
        if not ends:
            return set()
        torch.autograd.backward(ends)
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


def allowed(model: nn.Module) -> float:
    """Relative difference that rounding may make of a model, from the first layer to the last.

    A thousand roundoffs a layer: more than trained networks amplify, and in float64 still far
    below any mistake.
    """
    depth = sum(1 for module in model.modules() if not any(True for _ in module.children()))
    return min(1000 * roundoff_of(model) * max(depth, 1), 0.1)


def _doubled(args: Sequence[Any]) -> tuple[Any, ...]:
    def widen(value: Any) -> Any:
        is_real = isinstance(value, Tensor) and value.is_floating_point()
        return value.double() if is_real else value

    return tree_map(widen, tuple(args))
