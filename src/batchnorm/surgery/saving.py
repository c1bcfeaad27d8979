"""Models that forget the outputs of their normalizations between forward and backward."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from batchnorm.layers.recompute import Saver, active, can_forget
from batchnorm.surgery.models import copied, fixed_randomness


def forget_outputs(model: nn.Module) -> None:
    """Let the model's forward run within a `Saver`; its class becomes a subclass of itself.

    Args:
        model: Changed in place.

    Raises:
        ValueError: The model has a ``forward`` of its own beside its class's.
    """
    if "forward" in vars(model):
        raise ValueError(
            "save_memory wraps the forward of the model's class, but this model has another as an attribute: "
            "delete model.forward, or move it into a class"
        )
    cls = type(model)

    @functools.wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if active() is not None or not can_forget():
            return cls.forward(self, *args, **kwargs)
        with Saver():
            return cls.forward(self, *args, **kwargs)

    body = {
        "forward": forward,
        "forgets_outputs": True,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    model.__class__ = type(cls.__name__, (cls,), body)


def bytes_for_backward(model: nn.Module, args: Sequence[Any], *, forget: bool) -> int:
    """What a training forward leaves for backward, beside parameters, buffers and the example.

    Args:
        model: Not changed.
        args: Example.
        forget: Whether outputs of normalizations are forgotten.
    """
    model = copied(model).train()
    # A forward may write into its example.
    given = tree_map(lambda a: a.clone() if isinstance(a, Tensor) else a, tuple(args))
    own = [*model.parameters(), *model.buffers(), *(a for a in tree_leaves(given) if isinstance(a, Tensor))]
    with torch.enable_grad(), fixed_randomness(model), Saver(forget=forget) as saver:
        result = model(*given)
    count = saver.num_bytes({t.untyped_storage().data_ptr() for t in own})
    del result  # until here: with it goes the graph
    return count
