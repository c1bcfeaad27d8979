"""Clusters and networks to put into the model of step time, each figure with its source.

Bandwidths are the makers' and so bounds; latencies are those by which NCCL itself chooses its ways.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from batchnorm.bench.scaling import Cluster, Route, StepTime, Work, step_time
from batchnorm.bench.shapes import Shape, inception_shapes, resnet50_shapes
from batchnorm.models.inception import inception

NCCL = (
    # Small messages travel with a flag in every 8 bytes (the LL protocol), at a quarter of the bandwidth.
    # 0.47 and 0.52 µs on NVLink are multiplied by 1.8 across nodes, which is what matters: there always.
    Route(kind="ring", start_s=3.6e-6, inside_s=0.85e-6, between_s=2.7e-6, share=1 / 4),
    Route(kind="ring", start_s=8.4e-6, inside_s=3.4e-6, between_s=9.6e-6, share=1.0),
    Route(kind="tree", start_s=4.4e-6, inside_s=0.94e-6, between_s=5.0e-6, share=0.9 / 3.8),
    Route(kind="tree", start_s=0.0, inside_s=28e-6, between_s=50e-6, share=0.9),
)
"""Ring and tree, for small and for large messages. Source: NCCL 2.8, src/graph/tuning.cc, ``baseLat`` and
``hwLat``."""

P100_ETHERNET = Cluster(
    name="8 P100, NVLink; 50 Gbit/s Ethernet",
    per_node=8,
    inside_bytes_s=80e9,
    between_bytes_s=6.25e9,
    memory_bytes_s=732e9,
    images_per_s=138.0,
    element_bytes=4,
    routes=NCCL,
)
"""The cluster of Goyal et al. (1706.02677): links from there. NVLink 1 has 160 GB/s both ways together,
the P100's memory 732 GB/s (NVIDIA). Images a second: 90 epochs of 1,281,167 images in 29 hours on 8
GPUs, float32."""

A100_INFINIBAND = Cluster(
    name="8 A100, NVLink; 8 × 200 Gbit/s InfiniBand",
    per_node=8,
    inside_bytes_s=300e9,
    between_bytes_s=200e9,
    memory_bytes_s=2039e9,
    images_per_s=2470.0,
    element_bytes=2,
    routes=NCCL,
)
"""DGX A100 with 80 GB: NVLink 3 with 600 GB/s both ways together, eight ConnectX-6 of 200 Gbit/s (NVIDIA's
data sheet). Images a second in mixed precision: NVIDIA's DeepLearningExamples, ResNet-50 v1.5 in PyTorch."""

H100_INFINIBAND = Cluster(
    name="8 H100, NVLink; 8 × 400 Gbit/s InfiniBand",
    per_node=8,
    inside_bytes_s=450e9,
    between_bytes_s=400e9,
    memory_bytes_s=3350e9,
    images_per_s=4000.0,
    element_bytes=2,
    routes=NCCL,
)
"""DGX H100: NVLink 4 with 900 GB/s both ways together, eight ConnectX-7 of 400 Gbit/s (NVIDIA's data sheet).
Images a second: an assumption, the A100's times the ratio of the memories' bandwidths."""

CLUSTERS = {"p100": P100_ETHERNET, "a100": A100_INFINIBAND, "h100": H100_INFINIBAND}
"""By the name of their GPU."""

PASSES = 5
"""Over an input's elements, that synchronized layers make more than local ones: forward, a read and a
write; backward, two reads and a write. Counted in `batchnorm.distributed.operators`."""


def bn_inception() -> Work:
    """BN-Inception of this library, at 224×224."""
    with torch.device("meta"):
        num_parameters = sum(p.numel() for p in inception().parameters())
    return _work("BN-Inception", num_parameters, inception_shapes(1))


def resnet50() -> Work:
    """ResNet-50 at 224×224; 25,557,032 parameters, as torchvision counts them."""
    return _work("ResNet-50", 25_557_032, resnet50_shapes(1))


def _work(name: str, num_parameters: int, shapes: Sequence[Shape]) -> Work:
    channels = tuple(C for shape in shapes for C in [shape.size[0]] * shape.count)
    num_elements = sum(shape.count * torch.Size(shape.size).numel() for shape in shapes)
    return Work(name, num_parameters, channels, num_elements)


NETWORKS = {"inception": bn_inception, "resnet50": resnet50}
"""Networks of the table, by name."""

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
"""GPUs of the table."""


class Row(NamedTuple):
    """A number of ranks, and the step by each way to normalize."""

    ranks: int
    local: StepTime
    subgroup: StepTime
    synced: StepTime


def table(work: Work, cluster: Cluster, *, batch: int, group_size: int = 8) -> list[Row]:
    """Step times for 1 to 1,024 GPUs, by the model; no GPU has confirmed them.

    Args:
        work: A network; all of them at ResNet-50's images a second, which is an assumption.
        cluster: Of GPUs.
        batch: Images of a GPU.
        group_size: Of the subgroups; where there are fewer GPUs, all of them.
    """
    compute_s = batch / cluster.images_per_s
    passes_s = PASSES * batch * work.num_elements * cluster.element_bytes / cluster.memory_bytes_s

    def step(ranks: int, group_size: int) -> StepTime:
        return step_time(
            work, cluster, ranks=ranks, compute_s=compute_s, group_size=group_size, passes_s=passes_s
        )

    return [Row(n, step(n, 1), step(n, min(group_size, n)), step(n, n)) for n in RANKS]
