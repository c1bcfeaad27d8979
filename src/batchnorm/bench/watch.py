"""What watching costs at its defaults: training steps with it beside the same steps without."""

import copy
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch

from batchnorm.bench.networks import NETWORKS, TITLES, Network, network_of, training_step
from batchnorm.bench.timing import Timing, process, synchronize
from batchnorm.diagnostics import watch

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
        progress(f"{network}: {TITLES[network]}")
        with process("default", threads) as fresh:
            found.append(fresh.submit(_measure, network, every, seconds).result())
    return found


def _measure(network: Network, every: int, seconds: float) -> dict[str, Any]:
    torch.manual_seed(0)
    net, x, labels = network_of(network)
    plain, watched = training_step(copy.deepcopy(net), x, labels), training_step(net, x, labels)
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
        "network": TITLES[network],
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
