"""Where each repetition starts: from which weights, with which examples to learn from and to score on."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from batchnorm.choosing.examples import Batches, Examples, Order, divided, examples_of
from batchnorm.choosing.field import seed_all
from batchnorm.choosing.scoring import Metric

HELD_OUT_SHARE, MOST_HELD_OUT = 0.2, 2_000
"""Of the data, and at most so many examples, where no other data are given for scores."""


class Given:
    """The model that each repetition starts from."""

    def __init__(self, model: Any, seed: int) -> None:
        if not callable(model):
            raise TypeError(f"model must be a torch.nn.Module, or a function that makes one, got {model!r}")
        self.model, self.seed = model, seed
        self.makes = not isinstance(model, nn.Module)

    def at(self, repetition: int) -> nn.Module:
        """The user's own model, which is not to be changed, or a new one."""
        if not self.makes:
            return self.model
        seed_all(self.seed + repetition)
        made = self.model()
        if not isinstance(made, nn.Module):
            raise TypeError(
                f"the function for the model returned {type(made).__name__}, not a torch.nn.Module"
            )
        return made


@dataclass(frozen=True)
class Split:
    """Examples to learn from and to score on, by repetition."""

    examples: Examples
    numbers: Tensor
    held_out: Examples
    num_held_out: int
    is_given: bool
    batch_size: int
    order: Order

    @classmethod
    def of(
        cls,
        data: Any,
        held_out: Any,
        metric: Metric | None,
        order: Order,
        limit: int | None,
        batch_size: int,
        seed: int,
        notes: list[str],
    ) -> "Split":
        """Divide data as `choose` describes; raises ``ValueError`` where they are too few."""
        if isinstance(data, DataLoader):
            notes.append("of the loader its dataset and collate_fn are used, not its sampler or batch size")
        found = examples_of(data, limit)
        total = len(found)
        numbers = torch.arange(total)
        if limit is not None and limit < total:
            drawn = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:limit]
            numbers = drawn.sort().values if order == "examples" else numbers[:limit]
        if metric is not None:
            kept, other = 0, found
        elif held_out is None:
            kept, other = min(MOST_HELD_OUT, int(HELD_OUT_SHARE * len(numbers))), found
        else:
            other = examples_of(held_out, None)
            kept = len(other)
        to_learn = len(numbers) - (kept if held_out is None else 0)
        if to_learn < batch_size or (metric is None and kept < 1):
            raise ValueError(
                f"data hold {len(numbers)} examples, of which {len(numbers) - to_learn} are held out for "
                f"scores: too few for a batch of {batch_size}"
            )
        return cls(found, numbers, other, kept, held_out is not None, batch_size, order)

    def at(self, seed: int) -> tuple[Batches, Tensor]:
        """Batches, and numbers of the held-out examples."""
        if self.is_given or not self.num_held_out:
            learned, held_out = self.numbers, torch.arange(self.num_held_out)
        else:
            stays, drawn = divided(len(self.numbers), self.num_held_out, seed)
            learned, held_out = self.numbers[stays], self.numbers[drawn]
        return Batches(learned, self.batch_size, self.order, seed), held_out
