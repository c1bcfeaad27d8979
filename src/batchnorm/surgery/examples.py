"""Other inputs of a model, made from one example: other batches, other sizes of image."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from batchnorm.surgery.models import outputs

_FEW = 4


def two_of(args: Sequence[Any]) -> tuple[Any, ...] | None:
    """A batch of two of an example of one or many; ``None`` if it is of a few, or no batch that shows."""
    tensors = [a for a in tree_leaves(tuple(args)) if isinstance(a, Tensor)]
    sizes = {t.shape[0] if t.dim() else 0 for t in tensors}
    if len(sizes) != 1 or sizes <= {0, *range(2, _FEW + 1)}:
        return None
    (size,) = sizes
    return _mapped(args, lambda t: torch.cat([t, t.flip(-1)]) if size == 1 else t[:2])


def other_sizes(model: nn.Module, args: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Examples of another batch size and of other lengths behind it, as far as the model takes them.

    Args:
        model: In the mode in which they are tried.
        args: Example.
    """
    candidates = [two_of(args) or _mapped(args, lambda t: t[:1] if t.dim() else t)]
    candidates.append(_mapped(two_of(args) or args, _resized))
    return [given for given in candidates if _runs(model, given)]


def _mapped(args: Sequence[Any], change: Callable[[Tensor], Tensor]) -> tuple[Any, ...]:
    made: tuple[Any, ...] = tree_map(lambda a: change(a) if isinstance(a, Tensor) else a, tuple(args))
    return made


def _resized(tensor: Tensor) -> Tensor:
    """Half as long where that leaves something, twice as long where it does not."""
    for dim in range(2, tensor.dim()):
        size = tensor.shape[dim]
        tensor = tensor.narrow(dim, 0, size // 2) if size > _FEW else torch.cat([tensor, tensor], dim)
    return tensor


def _runs(model: nn.Module, args: Sequence[Any]) -> bool:
    try:
        with torch.no_grad():
            return all(t.isfinite().all() for t in outputs(model, args))
    except Exception:  # the user's forward may raise anything on what it was not made for
        return False
