"""The batches that a diagnosis looks at: kept, cut to size, mixed, and run through a model."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from batchnorm.statistics.feeding import Forward, explained, feed

Loss = Callable[[Any, Any], Any]

MIXED_SIZE = 128
"""Examples in a mixed batch: enough for its moments to be those of the data."""


def kept(batches: Iterable[Any], limit: int | None) -> list[Any]:
    """The first ``limit`` batches, or all, in a list.

    Raises:
        ValueError: There are none, or ``limit`` is below 1.
        TypeError: ``batches`` is a tensor or cannot be iterated over.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"num_batches must be at least 1, or None for all, got {limit}")
    if isinstance(batches, Tensor | Mapping) or not isinstance(batches, Iterable):
        raise TypeError(
            f"batches must be an iterable of batches, got {type(batches).__name__}: put a single batch in a "
            "list"
        )
    found = list(itertools.islice(batches, limit))
    if not found:
        raise ValueError("batches is empty: a diagnosis needs data")
    return found


def size_of(batch: Any) -> int | None:
    """Examples in a batch: the length that its tensors share, or None."""
    lengths = {len(t) if t.dim() else -1 for t in tree_leaves(batch) if isinstance(t, Tensor)}
    return lengths.pop() if len(lengths) == 1 and -1 not in lengths else None


def labels_of(batch: Any) -> Tensor | None:
    """Integer classes, shape (N,), of a batch that is an input followed by them; else None."""
    if isinstance(batch, tuple | list) and len(batch) > 1 and isinstance(batch[1], Tensor):
        labels = batch[1]
        if labels.dim() == 1 and not labels.is_floating_point() and labels.dtype != torch.bool:
            return labels
    return None


def mixed(batches: Sequence[Any], size: int = MIXED_SIZE) -> list[Any] | None:
    """The same examples in a random order and in batches of about ``size``; None where they cannot be cut.

    Args:
        batches: Of one structure, with tensors whose first dimensions are the examples.
        size: Of a new batch; no batch is smaller unless all the data are.
    """
    joined = _joined(batches)
    if joined is None:
        return None
    total = size_of(joined)
    assert total is not None
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    return [_taken(joined, part) for part in order.chunk(max(1, total // size))]


def _joined(batches: Sequence[Any]) -> Any:
    first = batches[0]
    if any(size_of(batch) is None for batch in batches):
        return None
    try:
        if isinstance(first, Tensor):
            return torch.cat(list(batches))
        if isinstance(first, Mapping):
            return {
                key: _joined([batch[key] for batch in batches])
                if isinstance(value, Tensor | tuple | list | Mapping)
                else value
                for key, value in first.items()
            }
        return tuple(_joined([batch[i] for batch in batches]) for i in range(len(first)))
    except (RuntimeError, KeyError, IndexError, TypeError):  # examples of unlike shapes
        return None


def _taken(joined: Any, part: Tensor) -> Any:
    if isinstance(joined, Tensor):
        return joined[part.to(joined.device)]
    if isinstance(joined, Mapping):
        return {key: _taken(value, part) for key, value in joined.items()}
    return tuple(_taken(value, part) for value in joined) if isinstance(joined, tuple | list) else joined


def run_batch(model: nn.Module, batch: Any, index: int, forward: Forward | None) -> Any:
    """The model's output for a batch.

    Raises:
        TypeError: The model wants other arguments than the batch has.
        RuntimeError: The model fails on the batch, or they are on different devices.
    """
    call = forward or feed
    try:
        return call(model, batch)
    except (TypeError, RuntimeError) as error:
        better = explained(error, model, batch, index, call)
        if better is not error:
            raise better from error
        if isinstance(error, RuntimeError):
            raise RuntimeError(f"batch {index}: {type(model).__name__} fails on it: {error}") from error
        raise


def tensors_of(output: Any) -> list[Tensor]:
    """All floating-point tensors of an output, whatever holds them."""
    fields = (
        vars(output) if hasattr(output, "__dict__") and not isinstance(output, Tensor | Mapping) else output
    )
    return [t for t in tree_leaves(fields) if isinstance(t, Tensor) and t.is_floating_point()]


def loss_of(output: Any, batch: Any, loss: Loss | None) -> float | None:
    """Mean loss of a batch: the user's, the one in the output, or cross-entropy where there are classes.

    Args:
        output: Of the model.
        batch: What it was given.
        loss: ``loss(output, batch)``, a number or a tensor of one; None looks for ``output["loss"]``, then
            for class scores, (N, K) or ``output["logits"]``, beside integer labels, (N,).
    """
    if loss is not None:
        return float(loss(output, batch))
    if isinstance(output, Mapping):
        if isinstance(output.get("loss"), Tensor):
            return float(output["loss"])
        output = output.get("logits")
    elif isinstance(output, tuple | list) and output:
        output = output[0]
    labels = labels_of(batch)
    if not isinstance(output, Tensor) or labels is None or output.dim() != 2 or len(output) != len(labels):
        return None
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < output.shape[1]:
        return None
    return float(nn.functional.cross_entropy(output.double(), labels.long()))


def halves(batch: Any) -> list[Any]:
    """The first and the second half of a batch's examples; empty where it cannot be cut."""
    size = size_of(batch)
    if size is None or size < 2:
        return []
    return [_taken(batch, part) for part in torch.arange(size).tensor_split(2)]
