"""Models and examples: what is accepted, copied and run."""

import copy
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
    # Process groups cannot be copied, and need not be.
    groups = [m.process_group for m in model.modules() if isinstance(m, nn.SyncBatchNorm)]
    try:
        return copy.deepcopy(model, {id(group): group for group in groups})
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


@contextmanager
def fixed_randomness(model: nn.Module) -> Iterator[None]:
    """The random generators of the CPU and of the model's devices in a fixed state, and back afterwards."""
    indices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(indices):
        torch.manual_seed(0)
        yield


def outputs(model: nn.Module, args: Sequence[Any]) -> list[Tensor]:
    """All tensors that a model returns, with the random generator in a fixed state.

    Dropout written without its mode, or noise, so comes out the same before and after surgery.
    """
    with fixed_randomness(model):
        args = tree_map(lambda a: a.clone() if isinstance(a, Tensor) else a, tuple(args))
        return [leaf for leaf in tree_leaves(model(*args)) if isinstance(leaf, Tensor)]


def check_example(model: nn.Module, args: Sequence[Any]) -> None:
    """Run a copy in evaluation mode.

    Args:
        model: Not changed.
        args: Example.

    Raises:
        ValueError: The model fails on the example or returns something that is not finite.
    """
    try:
        with torch.no_grad():
            got = outputs(copied(model).eval(), args)
    except Exception as error:  # the user's forward may raise anything
        raise ValueError(
            f"the model fails on the example, in evaluation mode: {type(error).__name__}: {error}"
        ) from error
    if not all(t.isfinite().all() for t in got):
        raise ValueError(
            "the model's output on the example is not finite, in evaluation mode, so nothing could be proved "
            "of it; give another example, or look for NaN or inf in its weights and buffers"
        )
