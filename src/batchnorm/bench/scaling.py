"""What a training step takes on many ranks: compute, the gradient's reduction, and the collectives of BN.

Arithmetic alone; nothing here runs a collective. ``docs/scaling.md`` has the formulas and where they fail.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

BUCKET_BYTES = 25 * 2**20
"""Of gradients that DistributedDataParallel sends at once, its default."""

BACKWARD_SHARE = 2 / 3
"""Of a step's compute: the backward of a convolution is two convolutions of its size."""


class Links(Protocol):
    """How long collectives take; with one rank, nothing."""

    def gather_s(self, num_bytes: float, ranks: int) -> float:
        """Seconds until every rank has the ``num_bytes`` of each of them."""

    def reduce_s(self, num_bytes: float, ranks: int) -> float:
        """Seconds until every rank has the sum of vectors of ``num_bytes``."""


@dataclass(frozen=True, kw_only=True)
class Route:
    """One way of a library to run a collective.

    Attributes:
        kind: A ring goes through all ranks, a tree through the nodes by halves.
        start_s: Before anything is sent.
        inside_s: Of one step between GPUs of a node.
        between_s: Of one step between nodes.
        share: Of the links' bandwidth that carries data.
    """

    kind: Literal["ring", "tree"]
    start_s: float
    inside_s: float
    between_s: float
    share: float


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Nodes of several GPUs, and the ways of their collective library.

    Attributes:
        name: For tables.
        per_node: GPUs of a node.
        inside_bytes_s: What one GPU sends inside its node, in one direction.
        between_bytes_s: What one node sends to others, in one direction, over all of its adapters.
        memory_bytes_s: Of one GPU's own memory.
        images_per_s: Of one GPU training ResNet-50 by itself.
        element_bytes: Of an activation.
        routes: Of which the fastest is taken; gathering takes rings alone.
    """

    name: str
    per_node: int
    inside_bytes_s: float
    between_bytes_s: float
    memory_bytes_s: float
    images_per_s: float
    element_bytes: int
    routes: tuple[Route, ...]

    def nodes(self, ranks: int) -> int:
        """That so many ranks fill, one after the other."""
        return math.ceil(ranks / self.per_node)

    def bandwidth(self, ranks: int) -> float:
        """Bytes a second through a ring of so many ranks: those of its narrowest link."""
        if self.nodes(ranks) == 1:
            return self.inside_bytes_s
        return min(self.inside_bytes_s, self.between_bytes_s)

    def gather_s(self, num_bytes: float, ranks: int) -> float:
        """As `Links.gather_s`: n - 1 steps around a ring."""
        if ranks == 1:
            return 0.0
        return min(
            self._around_s(route, ranks) + (ranks - 1) * num_bytes / self.bandwidth(ranks) / route.share
            for route in self.routes
            if route.kind == "ring"
        )

    def reduce_s(self, num_bytes: float, ranks: int) -> float:
        """As `Links.reduce_s`: twice around a ring, or up a tree and down."""
        if ranks == 1:
            return 0.0
        return min(self._reduce_by(route, num_bytes, ranks) for route in self.routes)

    def _reduce_by(self, route: Route, num_bytes: float, ranks: int) -> float:
        carried = self.bandwidth(ranks) * route.share
        if route.kind == "ring":
            latency = 2 * self._around_s(route, ranks) - route.start_s
            return latency + 2 * (ranks - 1) / ranks * num_bytes / carried
        nodes = self.nodes(ranks)
        chain, depth = math.ceil(ranks / nodes) - 1, math.ceil(math.log2(nodes))
        return (
            route.start_s + 2 * (chain * route.inside_s + depth * route.between_s) + 2 * num_bytes / carried
        )

    def _around_s(self, route: Route, ranks: int) -> float:
        """Latency once around, from the first rank to the last."""
        between = self.nodes(ranks) - 1
        return route.start_s + (ranks - 1 - between) * route.inside_s + between * route.between_s


class Line(NamedTuple):
    """A collective's time as a straight line over its bytes."""

    latency_s: float
    bytes_s: float


@dataclass(frozen=True)
class Measured:
    """Links by what was measured on them, for the numbers of ranks that were.

    Attributes:
        gather: By ranks; the bandwidth is of the bytes that a rank receives, (n - 1) times its own.
        reduce: By ranks; the bandwidth is of the bytes that a ring sends, 2 (n - 1) / n times the vector.
    """

    gather: Mapping[int, Line]
    reduce: Mapping[int, Line]

    def gather_s(self, num_bytes: float, ranks: int) -> float:
        """As `Links.gather_s`."""
        if ranks == 1:
            return 0.0
        line = self.gather[ranks]
        return line.latency_s + (ranks - 1) * num_bytes / line.bytes_s

    def reduce_s(self, num_bytes: float, ranks: int) -> float:
        """As `Links.reduce_s`."""
        if ranks == 1:
            return 0.0
        line = self.reduce[ranks]
        return line.latency_s + 2 * (ranks - 1) / ranks * num_bytes / line.bytes_s


@dataclass(frozen=True)
class Work:
    """What a network sends, and what its normalizations read.

    Attributes:
        name: For tables.
        num_parameters: All of which are trained, in float32.
        channels: Of each normalization.
        num_elements: Of all normalizations' inputs, for one image.
    """

    name: str
    num_parameters: int
    channels: tuple[int, ...]
    num_elements: int

    @property
    def gradient_bytes(self) -> int:
        """Of all gradients, in float32."""
        return 4 * self.num_parameters

    @property
    def gathered_bytes(self) -> int:
        """That a rank gives in the forwards of a step: mean, variance and count, in float64."""
        return sum(8 * (2 * C + 1) for C in self.channels)

    @property
    def summed_bytes(self) -> int:
        """That a rank gives in the backwards of a step: the gradients of shift and scale, in float64."""
        return sum(8 * 2 * C for C in self.channels)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, by what they are spent on.

    Attributes:
        compute_s: As on one rank, on as many images.
        passes_s: More passes over the normalizations' inputs.
        gradient_s: Waiting for the gradient's reduction, which goes on beside the backward.
        gather_s: Collectives of the normalizations' forwards.
        reduce_s: Collectives of their backwards.
    """

    compute_s: float
    passes_s: float
    gradient_s: float
    gather_s: float
    reduce_s: float

    @property
    def total_s(self) -> float:
        """The whole step."""
        return self.compute_s + self.passes_s + self.gradient_s + self.gather_s + self.reduce_s

    @property
    def efficiency(self) -> float:
        """Images a second and rank, against one rank by itself."""
        return self.compute_s / self.total_s


def step_time(
    work: Work,
    links: Links,
    *,
    ranks: int,
    compute_s: float,
    group_size: int = 1,
    passes_s: float = 0.0,
    overlap: float = 1.0,
) -> StepTime:
    """The time of a step that ``ranks`` ranks take together.

    Args:
        work: Of each rank.
        links: Between them.
        ranks: That add up their gradients.
        compute_s: Of one rank's part of the batch, on a rank by itself.
        group_size: Ranks that share a batch in their normalizations: 1 is local, all is synced.
        passes_s: What synchronized layers compute more than local ones, without their collectives.
        overlap: Share of the backward beside which gradients travel; 0 where the links take the same
            cores as the compute.

    Raises:
        ValueError: Ranks cannot be cut into groups of that size, or the overlap is no share.

    A layer's collectives hide behind nothing: the next layer needs their result. Of the gradient's
    reduction at least the last bucket is waited for. Ranks that wait for the slowest of them are not here.
    """
    if ranks < 1 or group_size < 1 or ranks % group_size:
        raise ValueError(f"ranks must be a multiple of group_size, got {ranks} and {group_size}")
    if not 0 <= overlap <= 1:
        raise ValueError(f"overlap must be a share of the backward, 0 to 1, got {overlap}")
    shared = group_size > 1
    return StepTime(
        compute_s,
        passes_s if shared else 0.0,
        waited_s(work.gradient_bytes, links, ranks, overlap * BACKWARD_SHARE * compute_s),
        sum(links.gather_s(8 * (2 * C + 1), group_size) for C in work.channels),
        sum(links.reduce_s(8 * 2 * C, group_size) for C in work.channels),
    )


def waited_s(gradient_bytes: float, links: Links, ranks: int, hidden_s: float) -> float:
    """Seconds for which a step waits for its gradient, sent in buckets of one size.

    Args:
        gradient_bytes: Of all buckets.
        links: That they take, one after the other.
        ranks: That add up.
        hidden_s: Of backward beside which buckets travel, the last one excepted.
    """
    buckets = max(1, math.ceil(gradient_bytes / BUCKET_BYTES))
    each_s = links.reduce_s(gradient_bytes / buckets, ranks)
    return max(each_s, buckets * each_s - hidden_s)


def stretch(processes: int, cores: int) -> float:
    """How much longer a process computes when so many share so many cores, one thread each."""
    return max(1.0, processes / cores)
