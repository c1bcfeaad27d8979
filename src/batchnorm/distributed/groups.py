"""Which ranks share a batch: process groups by name, and whether there is more than one rank at all.

Layers and operators hold a group's name instead of the group: a name can be copied, pickled and
compiled, a process group cannot.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

WORLD = ""
"""The name of the default group, whichever that is at the time of a forward."""

_groups: dict[str, dist.ProcessGroup] = {}
_subgroups: dict[int, tuple[dist.ProcessGroup, str]] = {}  # by size, with the world they were cut from

# Plain numbers of this module, so that compiled code is guarded by them.
_num_alone = 0


@contextmanager
def alone() -> Iterator[None]:
    """Let synchronized layers normalize by the batch of this process alone, without any collective.

    For what one rank does by itself, such as a comparison of two models on an example, and for
    passes over data of which ranks hold different numbers of batches. Holds for the whole process.
    """
    global _num_alone
    _num_alone += 1
    try:
        yield
    finally:
        _num_alone -= 1


def are_many(name: str) -> bool:
    """Whether a batch is shared by more than one rank, here and now."""
    return not _num_alone and num_ranks(name) > 1


def num_ranks(name: str) -> int:
    """Ranks of a group; 1 where no process group has been started.

    Raises:
        ValueError: As `group_named`.
    """
    if not dist.is_available() or not dist.is_initialized():
        return 1
    return dist.get_world_size(group_named(name))


# As `torch.compiler.assume_constant_result` marks it, which would import the compiler and Triton.
num_ranks.__dict__["_dynamo_marked_constant"] = True


def group_named(name: str) -> dist.ProcessGroup:
    """The group of a name.

    Raises:
        ValueError: There is none in this process.
    """
    if name == WORLD:
        return _world()
    group = _groups.get(name)
    if group is None:
        raise ValueError(
            f"the layer synchronizes over a process group named {name!r}, which this process has not made: "
            f"after loading or copying a model from elsewhere, make its groups and "
            f'convert it again, batchnorm.convert(model, to="synced", group=…)'
        )
    return group


def _world() -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None
    return world


def name_of(group: dist.ProcessGroup | None, group_size: int | None) -> str:
    """The name of the group that a batch is shared by.

    With ``group_size`` all ranks must call this, in the same order as other calls that make groups:
    the first call of a size makes them.

    Args:
        group: A process group with this rank in it; the default group when ``None``.
        group_size: In its place, that many consecutive ranks share a batch.

    Raises:
        ValueError: Both are given, this rank is not in the group, or the number of ranks is no
            multiple of ``group_size``.
    """
    if group is not None and group_size is not None:
        raise ValueError(
            "give group=, the ranks themselves, or group_size=, how many share a batch; not both"
        )
    if group_size is not None:
        return _subgroup(group_size)
    if group is None or group is dist.group.WORLD:
        return WORLD
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"group= must be a process group with this rank in it, got {group!r}: every rank gives its own"
        )
    _groups[group.group_name] = group
    return group.group_name


def _subgroup(size: int) -> str:
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"group_size must be a positive number of ranks, got {size!r}")
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            f"group_size={size} cuts the ranks of a process group, and none has been started: call "
            f"torch.distributed.init_process_group before, or leave group_size out"
        )
    world, num = _world(), dist.get_world_size()
    if num % size:
        divisors = ", ".join(str(d) for d in range(1, num + 1) if num % d == 0)
        raise ValueError(
            f"{num} ranks cannot be cut into groups of {size}: use a group_size of {divisors}, or start "
            f"{num - num % size + size} ranks"
        )
    if size == num:
        return WORLD
    known = _subgroups.get(size)
    if known is None or known[0] is not world:
        mine, rank = "", dist.get_rank()
        # Every rank makes all groups, in the same order, as torch.distributed wants it.
        for start in range(0, num, size):
            group = dist.new_group(list(range(start, start + size)))
            if start <= rank < start + size:
                mine = name_of(group, None)
        known = _subgroups[size] = world, mine
    return known[1]
