"""Copies, examples and a proof of sameness: what every operation on a model needs."""

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map

_WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "OptimizedModule")


def check_model(model: nn.Module, task: str) -> None:
    """Refuse what cannot be operated on.

    Args:
        model: The user's model.
        task: What is going to be done, for the message.

    Raises:
        TypeError: Not a module.
        ValueError: A wrapper whose inner model should be given, a scripted model, or lazy layers.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{task} needs a torch.nn.Module, got {type(model).__name__}")
    if type(model).__name__ in _WRAPPERS:
        raise ValueError(
            f"{task} needs the model inside {type(model).__name__}: give model.module (or model._orig_mod "
            f"of a compiled one) and wrap the result again"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(f"{task} needs the Python model, got a scripted one: do it before torch.jit.script")
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(f"{name} has no shape yet: run the lazy model once on real data before {task}")


def as_args(example: Any) -> tuple[Any, ...]:
    """The positional arguments that an ``example`` stands for.

    Raises:
        TypeError: Neither a tensor nor a tuple.
    """
    if isinstance(example, Tensor):
        return (example,)
    if isinstance(example, tuple):
        return example
    raise TypeError(
        f"example must be one input tensor or a tuple of positional arguments, got {type(example).__name__}"
    )


def copied(model: nn.Module) -> nn.Module:
    """An independent copy.

    Raises:
        ValueError: The model holds something that cannot be copied.
    """
    try:
        return copy.deepcopy(model)
    except Exception as error:  # attributes of the user's may raise anything
        raise ValueError(
            f"the model cannot be copied with copy.deepcopy, which keeps yours untouched: {error}"
        ) from error


def skeleton(model: nn.Module) -> nn.Module:
    """A copy that shares the parameters, and so costs little memory; buffers are its own.

    Raises:
        ValueError: The model holds something that cannot be copied.
    """
    try:
        return copy.deepcopy(model, {id(p): p for p in model.parameters()})
    except Exception as error:  # attributes of the user's may raise anything
        raise ValueError(f"the structure of the model cannot be copied: {error}") from error


def outputs(model: nn.Module, args: Sequence[Any]) -> list[Tensor]:
    """All tensors that a model returns, with the random generator in a fixed state.

    Dropout written without its mode, or noise, so comes out the same before and after surgery.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        args = tree_map(lambda a: a.clone() if isinstance(a, Tensor) else a, tuple(args))
        return [leaf for leaf in tree_leaves(model(*args)) if isinstance(leaf, Tensor)]


def check_example(model: nn.Module, args: Sequence[Any]) -> None:
    """Run a copy in evaluation mode.

    Raises:
        ValueError: The model fails on the example or returns something that is not finite.
    """
    try:
        with torch.no_grad():
            got = outputs(skeleton(model).eval(), args)
    except Exception as error:  # the user's forward may raise anything
        raise ValueError(
            f"the model fails on the example, in evaluation mode: {type(error).__name__}: {error}"
        ) from error
    if not all(t.isfinite().all() for t in got):
        raise ValueError(
            "the model's output on the example is not finite, in evaluation mode, so nothing could be proved "
            "of it; give another example, or look for NaN or inf in its weights and buffers"
        )


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


def widened(
    model: nn.Module, args: Sequence[Any], mode: Callable[[nn.Module], Any] = nn.Module.eval
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
    modes: Sequence[Callable[[nn.Module], Any]] = (nn.Module.eval,),
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


def depth_of(model: nn.Module) -> int:
    """Number of layers, at least one: what rounding errors can add up over."""
    return max(1, sum(1 for module in model.modules() if not any(True for _ in module.children())))


def _doubled(args: Sequence[Any]) -> tuple[Any, ...]:
    def widen(value: Any) -> Any:
        is_real = isinstance(value, Tensor) and value.is_floating_point()
        return value.double() if is_real else value

    return tree_map(widen, tuple(args))
