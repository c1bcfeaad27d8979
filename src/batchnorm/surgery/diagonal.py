"""A map that scales and shifts every entry of a value by itself: what a fixed normalization is."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_UNTOUCHED = -1
"""In an index: the entry stays as it is."""
_FREE = -2
"""In an index that is not settled: a step leaves the entry out, so that any map will do."""


@dataclass(frozen=True, eq=False)
class Diagonal:
    """y = scale · x + shift with a scale and a shift for every place of a value.

    Which of the K scales is whose is an index and not a matter of the numbers: two channels that
    happen to have the same scale stay two. So a map can be followed exactly through whatever moves
    entries about.

    Attributes:
        scale: Float64, shape (K,).
        shift: Float64, shape (K,).
        index: Of as many dimensions as the value, each as long as there or 1 where the map is the
            same all along; -1 where it leaves the value as it is.
    """

    scale: Tensor
    shift: Tensor
    index: Tensor

    @classmethod
    def along(cls, scale: Tensor, shift: Tensor, dims: Sequence[int], num_dims: int) -> "Diagonal":
        """A map of a value with ``num_dims`` dimensions that differs along ``dims`` only.

        Args:
            scale: Shape: the sizes of ``dims``.
            shift: Likewise.
            dims: Ascending.
            num_dims: Of the value.
        """
        sizes = [1] * num_dims
        for dim, size in zip(dims, scale.shape, strict=True):
            sizes[dim] = size
        index = torch.arange(scale.numel()).view(sizes)
        return cls(scale.flatten(), shift.flatten(), index)

    @property
    def is_identity(self) -> bool:
        """Whether it leaves every entry as it is."""
        return bool((self.index < 0).all())

    @property
    def varies(self) -> list[int]:
        """The dimensions along which it is not the same."""
        return [dim for dim, size in enumerate(self.index.shape) if size > 1]

    def at(self, shape: Sequence[int], dims: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Scale and shift as tensors over ``dims`` of a value, beside which it must not vary."""
        sizes = [size if dim in dims else 1 for dim, size in enumerate(shape)]
        index = self.index.expand(sizes).reshape([shape[dim] for dim in dims])
        return self._looked_up(index)

    def _looked_up(self, index: Tensor) -> tuple[Tensor, Tensor]:
        # The last entry is that of -1.
        one, zero = self.scale.new_ones(1), self.shift.new_zeros(1)
        return torch.cat([self.scale, one])[index], torch.cat([self.shift, zero])[index]

    def then(self, other: "Diagonal") -> "Diagonal":
        """This map and after it another, of a value of the same shape."""
        first, second = torch.broadcast_tensors(self.index, other.index)
        width = other.scale.numel() + 1
        codes, places = ((first + 1) * width + second + 1).unique(return_inverse=True)
        scale, shift = self._looked_up(codes // width - 1)
        after_scale, after_shift = other._looked_up(codes % width - 1)
        scale, shift = scale * after_scale, shift * after_scale + after_shift
        if codes[0] == 0:
            return Diagonal(scale[1:], shift[1:], places - 1)
        return Diagonal(scale, shift, places)

    def without_shift(self) -> "Diagonal":
        """The scales alone."""
        return Diagonal(self.scale, torch.zeros_like(self.shift), self.index)

    # Through a step that moves entries: `origin` tells for each place of its output from where.

    def before(self, origin: Tensor, shapes: Sequence[Sequence[int]]) -> list["Diagonal"] | None:
        """The maps of a step's inputs that amount to this one of its output, not `settled` yet.

        Args:
            origin: Shape of the output; places in the inputs' entries, laid end to end.
            shapes: Of the inputs.

        Returns:
            One for each input, or ``None`` where an entry is wanted with two different maps.
        """
        wanted = self.index.expand(origin.shape).flatten()
        sizes = [torch.Size(shape).numel() for shape in shapes]
        index = torch.full((sum(sizes),), _FREE)
        index[origin.flatten()] = wanted
        if not torch.equal(index[origin.flatten()], wanted):
            return None
        pieces = zip(index.split(sizes), shapes, strict=True)
        return [self.like(piece.view(shape)) for piece, shape in pieces]

    def settled(self, *, seen: bool) -> "Diagonal":
        """The map with those entries decided on that a step leaves out.

        Args:
            seen: Whether something else looks at them: then they stay as they are. If nothing does,
                they get what makes the map vary least.
        """
        index = self.index.where(self.index != _FREE, _UNTOUCHED) if seen else self.index
        for dim in range(index.dim()):
            # Numbers of maps are above that of what is free.
            most = index.amax(dim, keepdim=True)
            if ((index == most) | (index == _FREE)).all():
                index = most
        return self.like(index.where(index != _FREE, _UNTOUCHED).contiguous())

    def after(self, origin: Tensor, shapes: Sequence[Sequence[int]], inputs: Sequence[int]) -> "Diagonal":
        """The map of a step's output when the inputs numbered ``inputs`` have this one, and no others.

        Args:
            origin: As in `before`.
            shapes: As in `before`.
            inputs: Numbers among the shapes.
        """
        pieces = [
            (self.index.expand(shape) if i in inputs else torch.full(shape, _UNTOUCHED)).flatten()
            for i, shape in enumerate(map(tuple, shapes))
        ]
        return self.like(torch.cat(pieces)[origin]).settled(seen=True)

    def like(self, index: Tensor) -> "Diagonal":
        """The same scales and shifts in other places."""
        return Diagonal(self.scale, self.shift, index)
