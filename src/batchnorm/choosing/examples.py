"""What trials learn from: examples by number, and the order in which they come."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from batchnorm.data import batch_indices, epoch_order

Order = Literal["examples", "batches", "given"]
"""What is drawn anew in every epoch: which examples meet in a batch; the order of batches, each of them of
examples that follow one another in the data; nothing."""
ORDERS: tuple[Order, ...] = ("examples", "batches", "given")


class Examples(Protocol):
    """Examples that can be taken by number."""

    def __len__(self) -> int: ...

    def take(self, numbers: Tensor) -> Any:
        """A batch of the examples with these numbers, int64 on the CPU."""


class InMemory:
    """Tensors whose first dimensions are the examples, in tuples, lists or mappings."""

    def __init__(self, batch: Any) -> None:
        self.leaves, self.spec = _flat(batch)
        self.count = _length(self.leaves, "data")

    def __len__(self) -> int:
        return self.count

    def take(self, numbers: Tensor) -> Any:
        """As `Examples.take`."""
        return tree_unflatten([leaf[numbers.to(leaf.device)] for leaf in self.leaves], self.spec)


class Mapped:
    """A dataset whose items are put together into batches."""

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any]) -> None:
        self.dataset, self.collate = dataset, collate

    def __len__(self) -> int:
        return len(self.dataset)

    def take(self, numbers: Tensor) -> Any:
        """As `Examples.take`."""
        return self.collate([self.dataset[number] for number in numbers.tolist()])


def examples_of(data: Any, limit: int | None) -> Examples:
    """Examples of whatever holds them.

    Args:
        data: A tuple or mapping of tensors (all examples as one batch), a dataset, a loader, or an iterable
            of batches, which are kept in memory.
        limit: Of an iterable, stop after the batch with which there are so many; None for all.

    Raises:
        TypeError: It holds no examples that can be told apart.
        ValueError: It is empty, or its batches do not fit together.
    """
    # A loader without a batch size gives what its dataset holds, which are batches then.
    makes_batches = isinstance(data, DataLoader) and data.batch_sampler is not None
    if makes_batches and not isinstance(data.dataset, IterableDataset):
        return Mapped(data.dataset, data.collate_fn)
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        if not hasattr(data, "__len__"):
            raise TypeError(f"{type(data).__name__} has no length: examples are taken by number")
        return Mapped(data, default_collate)
    if isinstance(data, Mapping) or (isinstance(data, tuple) and all(isinstance(t, Tensor) for t in data)):
        return InMemory(data)
    if isinstance(data, Tensor) or not isinstance(data, Iterable):
        raise TypeError(
            f"data must be a tuple (inputs, labels) or a mapping of tensors, a Dataset, a DataLoader, or an "
            f"iterable of batches, got {type(data).__name__}"
        )
    batches: list[Any] = []
    found = 0
    for batch in data:
        batches.append(batch)
        found += _length(_flat(batch)[0], f"batch {len(batches) - 1}")
        if limit is not None and found >= limit:
            break
    if not batches:
        raise ValueError("data is empty: trials need examples")
    return InMemory(_joined(batches))


def _flat(batch: Any) -> tuple[list[Any], Any]:
    # Mappings of other classes, such as tokenizers', are taken for plain ones.
    return tree_flatten(dict(batch) if isinstance(batch, Mapping) else batch)


def _length(leaves: Sequence[Any], where: str) -> int:
    if not leaves or not all(isinstance(leaf, Tensor) and leaf.dim() for leaf in leaves):
        kinds = ", ".join(sorted({type(leaf).__name__ for leaf in leaves})) or "nothing"
        raise TypeError(f"{where}: tensors with examples in their first dimension are needed, got {kinds}")
    lengths = {len(leaf) for leaf in leaves}
    if len(lengths) > 1:
        raise ValueError(f"{where}: its tensors hold {', '.join(map(str, sorted(lengths)))} examples")
    return lengths.pop()


def _joined(batches: Sequence[Any]) -> Any:
    flat = [_flat(batch) for batch in batches]
    leaves, spec = flat[0]
    for index, (other, its_spec) in enumerate(flat):
        if its_spec != spec:
            raise ValueError(f"batch {index} is built otherwise than batch 0: {its_spec}, not {spec}")
        if any(a.shape[1:] != b.shape[1:] for a, b in zip(other, leaves, strict=True)):
            shapes = [[tuple(leaf.shape[1:]) for leaf in found] for found in (other, leaves)]
            raise ValueError(
                f"examples of batch {index} have shapes {shapes[0]}, those of batch 0 {shapes[1]}"
            )
    columns = zip(*(found for found, _ in flat), strict=True)
    return tree_unflatten([torch.cat(column) for column in columns], spec)


class Batches:
    """Which examples each step of one repetition sees.

    Args:
        numbers: Of the examples to train on, in the order of the data, int64.
        batch_size: Examples in a batch; what is left over at the end of an epoch is dropped.
        order: One of `ORDERS`.
        seed: Of the order.
    """

    def __init__(self, numbers: Tensor, batch_size: int, order: Order, seed: int) -> None:
        self.numbers, self.batch_size, self.order, self.seed = numbers, batch_size, order, seed

    def at(self, step: int) -> Tensor:
        """Numbers of the examples of a step counted from 0."""
        total, size = len(self.numbers), self.batch_size
        if self.order == "examples":
            return self.numbers[batch_indices(step, size, total, self.seed)]
        epoch, place = divmod(step, total // size)
        if self.order == "batches":
            place = int(epoch_order(epoch, total // size, self.seed)[place])
        return self.numbers[place * size : (place + 1) * size]


def divided(total: int, held_out: int, seed: int) -> tuple[Tensor, Tensor]:
    """Numbers to train on, in the order of the data, and numbers held out, which the seed draws."""
    drawn = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:held_out]
    stays = torch.ones(total, dtype=torch.bool)
    stays[drawn] = False
    return stays.nonzero().flatten(), drawn.sort().values
