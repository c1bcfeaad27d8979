"""The processes that torchrun starts: how a command joins them, and who of them speaks."""

import contextlib
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from batchnorm.cli.meeting import meet
from batchnorm.train.build import resolve_device
from batchnorm.train.ranks import Ranks


def launched() -> bool:
    """Whether torchrun, or something that sets the same variables, started this process."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def is_first() -> bool:
    """Whether this process speaks for all of them."""
    return not launched() or os.environ["RANK"] == "0"


@contextlib.contextmanager
def quiet_but_first() -> Iterator[None]:
    """Let rank 0 alone print: of what all of them do with the same arguments."""
    if is_first():
        yield
        return
    with open(os.devnull, "w") as nowhere:
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            yield


@contextlib.contextmanager
def joined(timeout_s: float, device_name: str) -> Iterator[Ranks]:
    """Join the process group of torchrun, if there is one, and leave it.

    Tensors on CPUs go by gloo and those on GPUs by NCCL, each rank on the GPU of its number on the machine.

    Args:
        timeout_s: How long a collective waits.
        device_name: As in a recipe.

    Raises:
        ValueError: The timeout is not above 0, or a rank has no GPU of its own.
        OSError: The others did not come in time.
    """
    if not 0 < timeout_s < float("inf"):
        raise ValueError(f"--timeout must be above 0 seconds and finite, got {timeout_s}.")
    if not launched():
        yield Ranks()
        return
    backend, gpu = "gloo", None
    if resolve_device(device_name).type == "cuda":
        local, num_gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= num_gpus:
            raise ValueError(
                f"Rank {os.environ['RANK']} is number {local} on this machine, which has {num_gpus} GPU(s): "
                f"start at most --nproc-per-node {num_gpus}, or train with --device cpu."
            )
        torch.cuda.set_device(local)
        backend, gpu = "cpu:gloo,cuda:nccl", local
    if not is_first():
        # What rank 0 is warned of, the others are, too.
        warnings.simplefilter("ignore")
    try:
        _within(timeout_s, lambda: _join(backend, gpu, timeout_s))
    except (dist.DistError, RuntimeError, TimeoutError) as error:
        raise OSError(
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} could not join the others at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} within {timeout_s:g} s: "
            f"{str(error).splitlines()[0]}"
        ) from error
    try:
        ranks = Ranks.here()
        with ranks.contact():
            yield ranks
    finally:
        dist.destroy_process_group()


def _within(timeout_s: float, action: Callable[[], None]) -> None:
    """Do it in another thread, and give that up when the time is over.

    The limit of a store is only for keys that are not there yet: for an answer over a dead link it waits as
    long as the kernel does, a quarter of an hour.
    """
    errors: list[Exception] = []

    def attempt() -> None:
        try:
            action()
        except Exception as error:
            errors.append(error)

    # A daemon, so that the process can end without it.
    thread = threading.Thread(target=attempt, name="join", daemon=True)
    thread.start()
    # What has a limit of its own says more, and shall come first.
    thread.join(1.1 * timeout_s + 1)
    if thread.is_alive():
        raise TimeoutError("no answer")
    if errors:
        raise errors[0]


def _join(backend: str, gpu: int | None, timeout_s: float) -> None:
    if gpu is not None:
        # Each thread has a GPU of its own.
        torch.cuda.set_device(gpu)
    timeout = timedelta(seconds=timeout_s)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        dist.init_process_group(backend, timeout=timeout)
        return
    rank, num = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, num, False, timeout, wait_for_workers=False)
    shared = meet(store, rank, num, timeout_s)
    dist.init_process_group(backend, store=shared, rank=rank, world_size=num, timeout=timeout)


@contextlib.contextmanager
def take_turns(ranks: Ranks) -> Iterator[None]:
    """Let one rank of each machine go first: what it fetches, the others find there.

    Every rank must come here, or none.
    """
    goes_first = int(os.environ.get("LOCAL_RANK", "0")) == 0 or ranks.num == 1
    if not goes_first:
        ranks.sum(torch.zeros(1))
    try:
        yield
    finally:
        if goes_first:
            ranks.sum(torch.zeros(1))
