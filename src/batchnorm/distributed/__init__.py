"""Ranks that normalize together: groups, the collectives of a layer, and who waits for whom."""

from batchnorm.distributed.groups import WORLD, alone, are_many, group_named, name_of, num_ranks
from batchnorm.distributed.normalize import batch_norm
from batchnorm.distributed.watchdog import CollectiveWatch, watch_collectives

__all__ = [
    "WORLD",
    "CollectiveWatch",
    "alone",
    "are_many",
    "batch_norm",
    "group_named",
    "name_of",
    "num_ranks",
    "watch_collectives",
]
