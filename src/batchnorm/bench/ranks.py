"""Training steps of 1, 2 and 4 processes on this machine, beside what the model of step time says of them."""

import copy
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from batchnorm import distributed
from batchnorm.bench.networks import TITLES, Network, network_of, training_step
from batchnorm.bench.scaling import Line, Measured, Work, step_time, stretch
from batchnorm.bench.timing import Timing, environment
from batchnorm.distributed.collectives import all_gather, all_sum
from batchnorm.distributed.watchdog import Call
from batchnorm.kernels import keep_freed_memory
from batchnorm.surgery import convert

APART, LOCAL, SYNCED, TORCH = "no communication", "local BN", "synced BN", "torch.nn BN"
PASSES = "synced BN, its passes"
"""Synchronized layers that go through their collectives in a group of one: what they compute more."""
PAIRS = "synced BN, groups of 2"

_NUM_WARM = 3
_TIMEOUT = timedelta(minutes=3)
_SMALL, _LARGE = 129, 2**19
"""Numbers of float64 by which links are measured: of a layer of 64 channels, and 4 MiB."""

_steps: dict[str, Callable[[], object]] = {}
"""Forms that this process has prepared."""


def measure(
    *,
    networks: Sequence[Network] = ("resnet", "cifar10"),
    ranks: Sequence[int] = (1, 2, 4),
    rounds: int = 9,
    steps: int = 3,
    threads: int = 1,
    progress: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Time data-parallel training steps over gloo, each rank with a whole batch of its own.

    All numbers of ranks and all forms take turns in one run. A sample is the slowest rank's.

    Args:
        networks: One after the other.
        ranks: Numbers of processes; the model starts from what one of them takes.
        rounds: Samples of each form, at least two.
        steps: Of a sample.
        threads: PyTorch's, in each process.
        progress: Told what is going on.

    Returns:
        For each network what was measured and what the model says: see `_row`.

    Raises:
        ValueError: One process alone is not among the ``ranks``, or one thing is asked for twice.
    """
    if 1 not in ranks or min(ranks) < 1 or len(set(ranks)) < len(ranks):
        raise ValueError(f"ranks must hold 1, from which the model starts, and others once each, got {ranks}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        progress(f"starting {sum(ranks)} processes")
        teams = {n: _Team(stack, n) for n in ranks}
        for n, team in teams.items():
            team.join(stack, folder / str(n), threads)
        for network in networks:
            progress(f"{network}: preparing")
            prepared = {n: team.run(_prepare, network) for n, team in teams.items()}
            samples: dict[int, dict[str, list[float]]] = {n: {} for n in ranks}
            links: dict[int, list[dict[str, dict[int, list[float]]]]] = {n: [] for n in ranks}
            for turn in range(rounds):
                progress(f"{network}: round {turn + 1} of {rounds}")
                for n, team in teams.items():
                    links[n].append(team.run(_links_round))
                    for form, seconds in team.run(_round, turn, steps).items():
                        samples[n].setdefault(form, []).append(seconds)
            progress(f"{network}: counting")
            counted = {n: team.run(_count) for n, team in teams.items()}
            work = Work(network, prepared[1]["parameters"], tuple(prepared[1]["channels"]), 0)
            rows = [
                _row(work, samples, n, _fit(links[n]), counted[n], stretch(n * threads, cores))
                for n in sorted(ranks)
            ]
            found.append(
                {
                    "network": TITLES[network] + " a rank",
                    "layers": len(work.channels),
                    "parameters": work.num_parameters,
                    "cores": cores,
                    "torch.nn.SyncBatchNorm": prepared[1]["refusal"],
                    "ranks": rows,
                }
            )
    return found


def _row(
    work: Work,
    samples: Mapping[int, Mapping[str, Sequence[float]]],
    ranks: int,
    links: Measured,
    counted: Any,
    sharing: float,
) -> dict[str, Any]:
    """One number of ranks.

    Returns:
        ``seconds`` of each form (median and quartiles); ``predicted`` by the model, from one process
        and the sharing of cores, and from the slowdown of compute as measured (``stretch`` has both);
        ``overhead`` over local BN, a median of ratios within rounds; the latency and bandwidth of the
        ``links``; the collectives of BN and the bytes that a rank gave to them, measured and computed.
    """
    one, here = samples[1], samples[ranks]
    base_s = statistics.median(one[LOCAL])
    # What the forced layers take for collectives of one rank, microseconds, stays in.
    passes_s = base_s * max(0.0, _ratio(one[PASSES], one[LOCAL]).median_s - 1)
    stretches = (sharing, _ratio(here[APART], one[APART]).median_s)

    def model_s(group_size: int, factor: float) -> float:
        # gloo adds on the cores that compute, so nothing overlaps.
        compute_s, more_s = factor * base_s, factor * passes_s
        return step_time(
            work,
            links,
            ranks=ranks,
            compute_s=compute_s,
            group_size=group_size,
            passes_s=more_s,
            overlap=0.0,
        ).total_s

    groups = {form: size for form, size in ((LOCAL, 1), (PAIRS, 2), (SYNCED, ranks)) if form in here}
    computed = (
        {
            "all_gather": (len(work.channels), work.gathered_bytes),
            "all_reduce": (len(work.channels), work.summed_bytes),
        }
        if ranks > 1
        else {"all_gather": (0, 0), "all_reduce": (0, 0)}
    )
    return {
        "ranks": ranks,
        "seconds": {form: _quartiles(Timing.of(list(taken))) for form, taken in here.items()},
        "predicted": {
            form: [_rounded(model_s(size, factor)) for factor in stretches] for form, size in groups.items()
        },
        "stretch": {"computed": sharing, "measured": _rounded(stretches[1])},
        "overhead": {
            form: _quartiles(_ratio(here[form], here[LOCAL], less=1.0))
            for form in (SYNCED, PAIRS, TORCH)
            if form in here
        },
        "links": {
            kind: {str(size): [_rounded(line.latency_s), _rounded(line.bytes_s)] for size, line in of.items()}
            for kind, of in (("all_gather", links.gather), ("all_reduce", links.reduce))
        },
        "collectives": {"measured": counted, "computed": {kind: list(of) for kind, of in computed.items()}},
    }


def _ratio(above: Sequence[float], below: Sequence[float], less: float = 0.0) -> Timing:
    """Of samples of the same rounds, so that what the machine does besides meets both."""
    return Timing.of([a / b - less for a, b in zip(above, below, strict=True)])


def _quartiles(timing: Timing) -> list[float]:
    return [_rounded(value) for value in (timing.median_s, timing.low_s, timing.high_s)]


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _fit(rounds: Sequence[Mapping[str, Mapping[int, Sequence[float]]]]) -> Measured:
    """Lines through small and large collectives: latency by the median, bandwidth by the fastest.

    What other programs take from a large one would be taken for bandwidth.
    """

    def lines(kind: str, share: Callable[[int], float]) -> dict[int, Line]:
        found = {}
        for ranks in rounds[0][kind]:
            small, large = ([each[kind][ranks][i] for each in rounds] for i in (0, 1))
            sent = share(ranks) * 8 * (_LARGE - _SMALL)
            bytes_s = sent / max(min(large) - min(small), 1e-9)
            latency_s = statistics.median(small) - share(ranks) * 8 * _SMALL / bytes_s
            found[ranks] = Line(max(0.0, latency_s), bytes_s)
        return found

    return Measured(lines("gather", lambda n: n - 1), lines("reduce", lambda n: 2 * (n - 1) / n))


class _Team:
    """Processes that are the ranks of one process group, each waiting for calls."""

    def __init__(self, stack: ExitStack, ranks: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pools = [stack.enter_context(ProcessPoolExecutor(1, context)) for _ in range(ranks)]
        # The profiler counts collectives, and would print a line each time it starts and stops.
        with environment(KINETO_LOG_LEVEL="9"):
            for pool in self._pools:
                pool.submit(os.getpid)  # starts it, and does not wait: imports take seconds

    def join(self, stack: ExitStack, meeting: Path, threads: int) -> None:
        """Make them a process group, until the stack unwinds."""
        self.run(_join, len(self._pools), str(meeting), threads, numbered=True)
        stack.callback(self.run, _leave)

    def run(self, call: Callable[..., Any], *args: Any, numbered: bool = False) -> Any:
        """The answer of rank 0 to a call that all ranks get."""
        answers = [
            pool.submit(call, *((rank, *args) if numbered else args)) for rank, pool in enumerate(self._pools)
        ]
        first, *_ = [answer.result() for answer in answers]
        return first


# In the ranks.


def _join(rank: int, ranks: int, meeting: str, threads: int) -> None:
    keep_freed_memory()
    if threads:
        torch.set_num_threads(threads)
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=ranks, timeout=_TIMEOUT)


def _leave() -> None:
    _steps.clear()
    dist.destroy_process_group()


def _prepare(network: Network) -> dict[str, Any]:
    """Make the forms and let each take its first steps."""
    torch.manual_seed(0)
    _steps.clear()
    net, x, labels = network_of(network)
    ranks = dist.get_world_size()
    plain, synced = convert(net, to="plain")[0], convert(net, to="synced")[0]
    forms = {
        APART: copy.deepcopy(plain),
        LOCAL: _parallel(copy.deepcopy(plain)),
        SYNCED: _parallel(copy.deepcopy(synced)),
        TORCH: _parallel(copy.deepcopy(net)),
    }
    if ranks == 1:
        forms[PASSES] = _parallel(copy.deepcopy(synced))
    elif ranks > 2 and ranks % 2 == 0:
        forms[PAIRS] = _parallel(convert(net, to="synced", group_size=2)[0])
    _steps.update({name: training_step(form, x, labels) for name, form in forms.items()})
    if ranks == 1:
        _steps[PASSES] = _sharing_alone(_steps[PASSES])
    for step in _steps.values():
        for _ in range(_NUM_WARM):
            step()
    return {
        "parameters": sum(p.numel() for p in net.parameters()),
        "channels": [m.num_features for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)],
        "refusal": _refusal(net, x),
    }


def _parallel(net: nn.Module) -> DistributedDataParallel:
    with warnings.catch_warnings():
        # Its successor came after the oldest PyTorch that is supported.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers")
        return DistributedDataParallel(net, broadcast_buffers=False)


def _sharing_alone(step: Callable[[], object]) -> Callable[[], object]:
    """The step with every synchronized layer going through its collectives, even in a group of one."""

    @contextmanager
    def forced() -> Iterator[None]:
        kept = distributed.are_many
        distributed.are_many = lambda name: True
        try:
            yield
        finally:
            distributed.are_many = kept

    def sharing() -> None:
        with forced():
            step()

    return sharing


def _refusal(net: nn.Module, x: Tensor) -> str:
    """What PyTorch's own synchronized layers say to this device; empty if they take it."""
    rival = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(net))
    try:
        rival(x)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _round(turn: int, steps: int) -> dict[str, float]:
    """Seconds of one step of each form on the slowest rank, in an order that rotates with the turn."""
    names, seconds = list(_steps), []
    shift = turn % len(names)
    names = names[shift:] + names[:shift]
    for name in names:
        dist.barrier()
        start = time.perf_counter()
        for _ in range(steps):
            _steps[name]()
        seconds.append((time.perf_counter() - start) / steps)
    return dict(zip(names, _slowest(seconds), strict=True))


def _slowest(seconds: Sequence[float]) -> list[float]:
    found = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return list(found.tolist())


def _links_round() -> dict[str, dict[int, list[float]]]:
    """Seconds of small and of large collectives, over all ranks and, where there are more, over pairs."""
    ranks = dist.get_world_size()
    groups = {ranks: distributed.WORLD}
    if ranks > 2 and ranks % 2 == 0:
        groups[2] = distributed.name_of(None, 2)
    calls: dict[str, Callable[[Tensor, str], object]] = {
        "gather": lambda t, group: all_gather(t, group, Call("forward", "", 0)),
        "reduce": lambda t, group: all_sum(t, group, Call("backward", "", 0)),
    }
    return {
        kind: {
            size: [_each_s(call, group, numbers, times) for numbers, times in ((_SMALL, 30), (_LARGE, 3))]
            for size, group in groups.items()
        }
        for kind, call in calls.items()
        if ranks > 1
    } or {"gather": {}, "reduce": {}}


def _each_s(call: Callable[[Tensor, str], object], group: str, numbers: int, times: int) -> float:
    packed = torch.zeros(numbers, dtype=torch.float64)
    call(packed, group)
    dist.barrier()
    start = time.perf_counter()
    for _ in range(times):
        call(packed, group)
    return _slowest([(time.perf_counter() - start) / times])[0]


def _count() -> dict[str, list[int]]:
    """Collectives of a synced step that one with local BN has not, and the bytes a rank gave to them."""
    more = _collectives(_steps[SYNCED]) - _collectives(_steps[LOCAL])
    found = {"all_gather": [0, 0], "all_reduce": [0, 0]}
    for (name, numbers), times in more.items():
        of = found.setdefault(name, [0, 0])
        of[0] += times
        of[1] += times * 8 * numbers
    return found


def _collectives(step: Callable[[], object]) -> Counter[tuple[str, int]]:
    """How often a step ran each collective, by name and how many numbers this rank gave."""
    with torch.profiler.profile(record_shapes=True) as seen:
        step()
    return Counter(
        (event.name.removeprefix("gloo:"), torch.Size(event.input_shapes[0]).numel())
        for event in seen.events()
        if event.name.startswith("gloo:")
    )
