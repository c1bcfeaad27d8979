"""What watching costs at its defaults: training steps with it beside the same steps without."""

import copy
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchnorm.bench.timing import Timing, process, synchronize
from batchnorm.diagnostics import watch
from batchnorm.models import inception, mlp
from batchnorm.surgery import insert

Network = Literal["mlp", "cifar10", "resnet"]
NETWORKS: tuple[Network, ...] = get_args(Network)
_TITLES: dict[Network, str] = {
    "mlp": "784-100-100-100-10 with BN, batch 60",
    "cifar10": "BN-Inception at the scale of CIFAR-10, 32×32, batch 32",
    "resnet": "residual network of 9 convolutions, 32×32, batch 32",
}
_LEAST_PERIODS = 3


def measure(
    *,
    networks: Sequence[Network] = NETWORKS,
    every: int = 100,
    seconds: float = 60.0,
    threads: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Time a network's training with and without a recorder, one step of each in turn.

    Args:
        networks: Each in a process of its own.
        every: Steps from one record to the next.
        seconds: For each network; at least three records are made, however long that takes.
        threads: PyTorch's threads; 0 leaves its own choice.
        progress: Told what is going on.

    Returns:
        For each network, each as median and quartiles over periods of ``every`` steps: seconds of a
        step without (``step_s``); share of a period's time that watching adds, from the sums over
        all of its steps, by the clock (``added``) and by the processor's time (``added_cpu``, which
        other programs disturb less); and its parts by the processor's time: what a step between
        records adds, in steps (``between``, of the period's median steps), and what a record adds
        (``record``).
    """
    found = []
    for network in networks:
        progress(f"{network}: {_TITLES[network]}")
        with process("default", threads) as fresh:
            found.append(fresh.submit(_measure, network, every, seconds).result())
    return found


def _measure(network: Network, every: int, seconds: float) -> dict[str, Any]:
    torch.manual_seed(0)
    net, x, labels = _network(network)
    plain, watched = _step(copy.deepcopy(net), x, labels), _step(net, x, labels)
    for _ in range(3):
        plain()
        watched()
    recorder = watch(net, every=every)
    for _ in range(every + 1):  # up to the first record that has one before it to drift from
        watched()
    while recorder.num_steps % every:
        watched()
    parts: defaultdict[str, list[float]] = defaultdict(list)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(parts["added"]) < _LEAST_PERIODS:
        for name, value in _period(plain, watched, every).items():
            parts[name].append(value)
    recorder.close()
    timings = {name: Timing.of(values) for name, values in parts.items()}
    return {
        "network": _TITLES[network],
        "layers": len(recorder.layers),
        "periods": len(parts["added"]),
        **{name: [float(f"{s:.4g}") for s in (t.median_s, t.low_s, t.high_s)] for name, t in timings.items()},
    }


def _period(plain: Callable[[], object], watched: Callable[[], object], every: int) -> dict[str, float]:
    """One record and all that comes before the next; either goes first in half of the steps."""
    without: list[tuple[float, float]] = []
    with_it: list[tuple[float, float]] = []
    for i in range(every):
        for step, taken in ((plain, without), (watched, with_it))[:: 1 if i % 2 else -1]:
            synchronize()
            start, start_cpu = time.perf_counter(), time.process_time()
            step()
            synchronize()
            taken.append((time.perf_counter() - start, time.process_time() - start_cpu))
    (clock, cpu), (clock_with, cpu_with) = zip(*without, strict=True), zip(*with_it, strict=True)
    typical = statistics.median(cpu)
    return {
        "step_s": statistics.median(clock),
        "added": sum(clock_with) / sum(clock) - 1,
        "added_cpu": sum(cpu_with) / sum(cpu) - 1,
        "between": statistics.median(cpu_with[2:] or cpu_with) / typical - 1,
        # The step after a record completes it.
        "record": sum(cpu_with[:2]) / typical - 2,
    }


def _network(network: Network) -> tuple[nn.Module, Tensor, Tensor]:
    if network == "mlp":
        x = torch.randn(60, 784)
        return insert(mlp(), x)[0], x, torch.randint(0, 10, (60,))
    x, labels = torch.randn(32, 3, 32, 32), torch.randint(0, 10, (32,))
    if network == "cifar10":
        return inception(10, stem="cifar", width=0.25, separable=True), x, labels
    blocks = [_Block(16, 16, 1), _Block(16, 32, 2), _Block(32, 64, 2)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(_unit(3, 16, 1), nn.ReLU(), *blocks, *head), x, labels


class _Block(nn.Module):
    """Two convolutions beside a shortcut, which is a convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = _unit(inputs, outputs, stride), _unit(outputs, outputs, 1)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else _unit(inputs, outputs, stride, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


def _unit(inputs: int, outputs: int, stride: int, kernel: int = 3) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


def _step(net: nn.Module, x: Tensor, labels: Tensor) -> Callable[[], object]:
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(net(x), labels).backward()
        optimizer.step()

    return step
