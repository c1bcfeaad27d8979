"""Cases run by several processes at once, over gloo, with an end in any case."""

import faulthandler
import importlib
import io
import socket
import time
import traceback
import warnings
from collections.abc import Callable
from queue import Empty

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Case = Callable[[int, int], object]
"""Called on every rank with its number and the number of ranks; asserts, or returns what a test wants."""

Answers = dict[tuple[str, int], object]
"""What every case returned on every rank, by (case, rank); a traceback, as text, where it raised."""


def run(module: str, num_ranks: int, limit_s: float = 300) -> Answers:
    """Run all cases in ``module.CASES`` one after the other, in the same processes.

    What has not come when the time is up is missing, and the processes are killed.
    """
    num_answers = num_ranks * len(importlib.import_module(module).CASES)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Ranks are forks of one process that has imported everything and done nothing: imports cost seconds.
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["judge", "gloo_ranks", "batchnorm"])
    queue = context.Queue()
    ranks = [
        context.Process(target=_on_rank, args=(rank, num_ranks, port, queue, module, limit_s), daemon=True)
        for rank in range(num_ranks)
    ]
    for process in ranks:
        process.start()
    found: Answers = {}
    end = time.monotonic() + limit_s
    try:
        while len(found) < num_answers and time.monotonic() < end:
            try:
                case, rank, answer = queue.get(timeout=1)
            except Empty:
                if not any(process.is_alive() for process in ranks):
                    break
                continue
            found[case, rank] = torch.load(io.BytesIO(answer), weights_only=True)
    finally:
        for process in ranks:
            process.join(5)
            process.kill()
    return found


def _on_rank(rank: int, num_ranks: int, port: int, answers: mp.Queue, module: str, limit_s: float) -> None:
    # Where it stands if it hangs, before it is killed.
    faulthandler.dump_traceback_later(max(limit_s - 5, 1), exit=True)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
    warnings.filterwarnings(
        "ignore", ".*is deprecated and slated for removal in Python 3.14", DeprecationWarning
    )
    # Its new name is not known to older versions.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=num_ranks)
    store = dist.group.WORLD.get_group_store()
    for name, case in importlib.import_module(module).CASES.items():
        torch.manual_seed(0)
        try:
            answer = case(rank, num_ranks)
        except BaseException:
            answer = traceback.format_exc()
        packed = io.BytesIO()
        torch.save(answer, packed)
        answers.put((name, rank, packed.getvalue()))
        # By the store, not by a collective: ranks that a failed case left apart meet here again.
        store.add(f"done {name}", 1)
        while store.add(f"done {name}", 0) < num_ranks:
            time.sleep(0.002)
    dist.destroy_process_group()


def assert_passed(found: Answers, num_ranks: int, *cases: str) -> None:
    """Fail with what went wrong in any of the cases on any rank; a case that passes returns nothing."""
    wrong = []
    for case in cases:
        for rank in range(num_ranks):
            if (case, rank) not in found:
                wrong.append(f"{case}: rank {rank} of {num_ranks} never came back")
            elif found[case, rank] is not None:
                wrong.append(f"{case}: rank {rank} of {num_ranks}: {found[case, rank]}")
    assert not wrong, "\n".join(wrong)


# For cases.


def summed(t: torch.Tensor) -> torch.Tensor:
    """The sum over ranks."""
    whole = t.clone()
    dist.all_reduce(whole)
    return whole


def is_same_everywhere(t: torch.Tensor) -> bool:
    """Whether all ranks have the same bits."""
    first = t.clone()
    dist.broadcast(first, 0)
    return torch.equal(t, first)


def gathered(part: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """All ranks' parts of a batch, in order, of ``sizes`` examples."""
    parts = [torch.empty(size, *part.shape[1:], dtype=part.dtype) for size in sizes]
    for source, received in enumerate(parts):
        if source == dist.get_rank():
            received.copy_(part.detach())
        dist.broadcast(received, source)
    return torch.cat(parts)


def collectives(task: Callable[[], object]) -> list[tuple[str, int]]:
    """Name of every collective that a task runs, and how many numbers this rank gives, in order."""
    with torch.profiler.profile(record_shapes=True) as seen:
        task()
    events = sorted(seen.events(), key=lambda event: event.time_range.start)
    return [
        (event.name.removeprefix("gloo:"), torch.Size(event.input_shapes[0]).numel())
        for event in events
        if event.name.startswith("gloo:")
    ]
