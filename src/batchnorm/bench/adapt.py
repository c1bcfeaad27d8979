"""Adaptation beside plain inference: the same network on the same batches."""

import copy
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from batchnorm.bench.networks import network_of
from batchnorm.bench.timing import in_turns, process
from batchnorm.reproduce.adaptation.networks import colour_network
from batchnorm.statistics import DriftAlarm, adapt

Network = Literal["cifar10", "resnet", "experiment"]
NETWORKS: tuple[Network, ...] = get_args(Network)
TITLES: dict[Network, str] = {
    "cifar10": "BN-Inception at the scale of CIFAR-10, 32×32",
    "resnet": "residual network of 9 convolutions, torch's layers, 32×32",
    "experiment": "the network of reproduce adaptation, 32×32",
}


def measure(
    *,
    networks: Sequence[Network] = NETWORKS,
    batch: int = 128,
    batches: int = 16,
    rounds: int = 9,
    threads: int = 1,
    progress: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Time `adapt` by each method on some batches of noise, and inference on the same.

    Args:
        networks: Each in a process of its own.
        batch: Images in a batch.
        batches: How many.
        rounds: Samples of each contender; all take turns in each round.
        threads: PyTorch's threads.
        progress: Told what is going on.

    Returns:
        For each network ``seconds`` of each contender for all the batches (median and quartiles) and its
        ``throughput``, that of inference being 1. "adapt" is the whole of it, with predictions of 256
        examples before and after; "adapt, statistics alone" is without them.
    """
    found = []
    for network in networks:
        progress(f"{network}: {TITLES[network]}")
        with process("kept", threads) as fresh:
            found.append(fresh.submit(_measure, network, batch, batches, rounds).result())
    return found


def _measure(network: Network, batch: int, num_batches: int, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    net = colour_network(10) if network == "experiment" else network_of(network)[0]
    net.eval()
    images = [torch.randn(batch, 3, 32, 32) for _ in range(num_batches)]
    watched = copy.deepcopy(net)
    alarm = DriftAlarm(watched, images, false_alarm_rate=0.1)
    few = list(islice(images, 1))
    calls: dict[str, Callable[[], object]] = {
        "inference": lambda: _infer(net, images),
        "adapt": lambda: adapt(net, images, trust=True),
        "adapt, statistics alone": lambda: adapt(net, images, logits=None, trust=True),
        "inference of one batch": lambda: _infer(net, few),
        "adapt, blended, one batch": lambda: adapt(net, few, method="blended", trust=True),
        "adapt, entropy, one batch": lambda: adapt(net, few, method="entropy", rate=1e-9, trust=True),
    }
    if batch <= alarm.largest_batch:
        alarm.attach(lambda check: None)
        calls["inference with an alarm"] = lambda: _infer(watched, images)
    timings = in_turns(calls, rounds=rounds)
    plain, one = timings["inference"].median_s, timings["inference of one batch"].median_s
    return {
        "network": f"{TITLES[network]}, {num_batches} batches of {batch}",
        "seconds": {
            name: [float(f"{s:.4g}") for s in (t.median_s, t.low_s, t.high_s)] for name, t in timings.items()
        },
        "throughput": {
            name: round((one if "one batch" in name else plain) / t.median_s, 3)
            for name, t in timings.items()
        },
    }


@torch.no_grad()
def _infer(net: nn.Module, images: Sequence[Tensor]) -> None:
    for x in images:
        net(x)
