"""Sequences of unequal lengths, laid out step after step, with the living ones first."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


@dataclass(frozen=True)
class Steps:
    """All steps of a batch of sequences in one tensor, without padding.

    Sequences are sorted by falling length, so that those alive at a step are the first ``sizes[t]``.

    Attributes:
        data: Shape (sum of ``sizes``, F): the living sequences of step 0, then of step 1, ….
        sizes: How many sequences are alive at each step; never rising.
        num_sequences: N, with those of no steps at all.
    """

    data: Tensor
    sizes: list[int]
    num_sequences: int

    @property
    def is_even(self) -> bool:
        """Whether all sequences are alive at every step."""
        return all(size == self.num_sequences for size in self.sizes)

    def reversal(self) -> Tensor | None:
        """Where each row goes if every sequence is turned round within its own length.

        Its own inverse. ``None`` where all are of one length: the steps change places.
        """
        if self.is_even:
            return None
        sizes = torch.tensor(self.sizes)
        alive = torch.arange(self.num_sequences) < sizes[:, None]
        lengths, offsets = alive.sum(0), sizes.cumsum(0) - sizes
        step, sequence = alive.nonzero(as_tuple=True)
        return (offsets[lengths[sequence] - 1 - step] + sequence).to(self.data.device)

    def turned(self, data: Tensor, order: Tensor | None) -> Tensor:
        """Rows of ``data``, which lie as `data` does, with every sequence turned round."""
        if order is not None:
            return data[order]
        return data.unflatten(0, (len(self.sizes), self.num_sequences)).flip(0).flatten(0, 1)


def of_packed(packed: PackedSequence) -> Steps:
    """The steps of a `torch.nn.utils.rnn.PackedSequence`, which lie as ours."""
    sizes = packed.batch_sizes.tolist()
    return Steps(packed.data, sizes, sizes[0])


def of_even(x: Tensor) -> Steps:
    """The steps of sequences of one length, shape (T, N, F)."""
    return Steps(x.flatten(0, 1), [x.shape[1]] * x.shape[0], x.shape[1])


def of_masked(x: Tensor, mask: Tensor) -> tuple[Steps, Tensor]:
    """The steps of padded sequences.

    Args:
        x: Shape (T, N, F).
        mask: Boolean, shape (T, N).

    Returns:
        The steps, and the order in which they hold the sequences, shape (N,).
    """
    order = mask.sum(0).argsort(descending=True, stable=True)
    alive = mask[:, order]
    return Steps(x[:, order][alive], alive.sum(1).tolist(), x.shape[1]), order


def to_padded(steps: Steps, data: Tensor, mask: Tensor, order: Tensor) -> Tensor:
    """What `of_masked` did, undone for an output; padding is zero.

    Returns:
        Shape (T, N, features of ``data``).
    """
    padded = data.new_zeros(*mask.shape, data.shape[-1])
    padded[mask[:, order]] = data
    return padded[:, order.argsort()]


def check_mask(mask: Tensor, expected: tuple[int, ...], *, time_dim: int) -> None:
    """Raise ``ValueError`` unless a mask is boolean, of this shape, and true up to a sequence's end."""
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be boolean (true where a sequence has a step), got {mask.dtype}")
    if tuple(mask.shape) != expected:
        raise ValueError(
            f"mask must have the shape of the input without its features, {expected}, got {tuple(mask.shape)}"
        )
    head, tail = (
        mask.narrow(time_dim, 0, max(mask.shape[time_dim] - 1, 0)),
        mask.narrow(time_dim, min(1, mask.shape[time_dim]), max(mask.shape[time_dim] - 1, 0)),
    )
    if (tail & ~head).any():
        raise ValueError(
            "mask must be true for the first steps of a sequence and false after its end (padding on the "
            "right); it turns true again: move the steps of each sequence to the front"
        )
