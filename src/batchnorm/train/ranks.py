"""The processes that train together, and what they have to agree on besides the gradient."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

Result = TypeVar("Result")
Failure = TypeVar("Failure", bound=BaseException)


class RankLost(ConnectionError):
    """Another rank ended, or did not answer in time; nobody can go on without it."""


class Agreed(NamedTuple):
    """What all ranks know before they take a step."""

    num_examples: int
    """In the step, over all ranks."""
    signal_number: int | None
    """Of the signal that some rank got and by which all stop, if any."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together.

    What is said here goes over the CPU and does not wait for a GPU's queue, so that one exchange a step
    costs a fraction of a millisecond.
    """

    rank: int = 0
    """Number of this process."""
    num: int = 1
    """How many there are; alone, nothing is exchanged and nothing computed differently."""
    num_local: int = 1
    """How many of them this machine has."""
    made: dist.ProcessGroup | None = None
    """A group for tensors on the CPU, where the default group cannot carry them."""

    @classmethod
    def here(cls) -> "Ranks":
        """The ranks of the default process group, or this process alone where there is none."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return cls()
        group = dist.group.WORLD
        # One made with nccl alone cannot reach the CPU.
        on_cpu = "cpu" in dist.get_backend_config(group)
        made = None if on_cpu else dist.new_group(backend="gloo")
        num_local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return cls(dist.get_rank(), dist.get_world_size(), num_local, made)

    @property
    def group(self) -> dist.ProcessGroup | None:
        """All of them, for tensors on the training device; None when alone."""
        return dist.group.WORLD if self.num > 1 else None

    @property
    def talk(self) -> dist.ProcessGroup | None:
        """All of them, for tensors on the CPU."""
        return self.made or self.group

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that reads and writes the run's folder."""
        return self.rank == 0

    def part(self, total: int) -> slice:
        """This rank's contiguous part of so many things."""
        return slice(total * self.rank // self.num, total * (self.rank + 1) // self.num)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of tensors on the CPU of one shape; the same bits on every rank."""
        if self.num == 1:
            return values
        summed = values.clone()
        dist.all_reduce(summed, group=self.talk)
        return summed

    def broadcast(self, data: bytes | None) -> bytes:
        """What rank 0 has; the others give None."""
        if self.num == 1:
            assert data is not None
            return data
        size = torch.tensor([len(data) if data is not None else 0])
        dist.broadcast(size, 0, group=self.talk)
        whole = torch.empty(int(size), dtype=torch.uint8)
        if data:
            whole = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        if len(whole):
            dist.broadcast(whole, 0, group=self.talk)
        return whole.numpy().tobytes()

    def gather(self, value: Any) -> list[Any]:
        """What each rank has, by its number: JSON values."""
        if self.num == 1:
            return [value]
        mine = json.dumps(value).encode()
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.num)]
        dist.all_gather(sizes, torch.tensor([len(mine)]), group=self.talk)
        longest = int(max(sizes))
        padded = torch.frombuffer(bytearray(mine.ljust(longest)), dtype=torch.uint8)
        every = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.num)]
        dist.all_gather(every, padded, group=self.talk)
        return [json.loads(each.numpy().tobytes()) for each in every]

    def lead(self, action: Callable[[], Result]) -> Result | None:
        """Let rank 0 do something while the others wait; what it raises, all raise.

        Returns:
            On rank 0 what ``action`` returned, on the others None.
        """
        result: Result | None = None
        with self.together():
            if self.is_first:
                result = action()
        return result

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block, without exchanges in it, that all ranks get through or none.

        Raises:
            Exception: On every rank what the first of those raised that failed: the error itself there,
                a copy on the others, marked so that it is told only once.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            if self.num == 1:
                raise
            error = caught
        if self.num > 1:
            self._raise_first(error)

    def before_step(
        self, num_examples: int, signals: Sequence[int], known: Sequence[int], error: Exception | None
    ) -> Agreed:
        """Exchange what decides whether and how the next step is taken, in one collective.

        Args:
            num_examples: That this rank has for the step.
            signals: That it got.
            known: Signals that there may be.
            error: What kept it from having a batch, if anything.

        Raises:
            Exception: As `together`, if there was an error anywhere and no signal.
        """
        got = [int(number in signals) for number in known]
        summed = self.sum(torch.tensor([num_examples, int(error is not None), *got], dtype=torch.int64))
        total, num_failed, *num_signals = summed.tolist()
        for number, count in zip(known, num_signals, strict=True):
            # A signal to a whole group ends the processes that decode, too: then that is no error.
            if count:
                return Agreed(total, number)
        if num_failed:
            if self.num == 1 and error is not None:
                raise error
            self._raise_first(error)
        return Agreed(total, None)

    def once(self, error: Failure) -> Failure:
        """The same error, which every rank raises by itself, marked so that rank 0 alone tells it."""
        if not self.is_first:
            _mark(error)
        return error

    @contextmanager
    def contact(self) -> Iterator[None]:
        """Say in one sentence what PyTorch says when another rank is lost.

        Raises:
            RankLost: A collective failed.
        """
        try:
            yield
        except RuntimeError as error:
            if self.num == 1 or not _is_lost(error):
                raise
            raise RankLost(
                f"rank {self.rank} of {self.num} lost contact with another rank, which ended or did not "
                "answer in time. Give the same command again to go on from the newest checkpoint. PyTorch: "
                f"{str(error).splitlines()[0]}"
            ) from error

    def _raise_first(self, error: Exception | None) -> None:
        failed = self.sum(
            torch.nn.functional.one_hot(torch.tensor(self.rank), self.num) * (error is not None)
        )
        if not failed.any():
            return
        first = int(failed.nonzero()[0])
        told = self.gather(None if error is None or self.rank != first else _told(error))
        if self.rank == first:
            assert error is not None
            raise error
        raise _mark(_rebuilt(told[first], first)) from error


KINDS: tuple[type[Exception], ...] = (
    OSError,
    ImportError,
    FloatingPointError,
    TypeError,
    ValueError,
    RuntimeError,
)
"""As which an error is raised on the ranks that did not meet it."""

LOST = ("gloo", "connection closed", "connection reset", "timed out", "pair closure", "nccl")
"""What PyTorch says of a collective that lost another rank, as gloo's errors have no class of their own."""

ALONE = Ranks()
"""No other process trains with this one."""


def _mark(error: Failure) -> Failure:
    # The command line asks for it.
    error.told_elsewhere = True  # type: ignore[attr-defined]
    return error


def _told(error: Exception) -> dict[str, Any]:
    number = next((n for n, kind in enumerate(KINDS) if isinstance(error, kind)), len(KINDS) - 1)
    arguments: list[Any] = [str(error) or type(error).__name__]
    if isinstance(error, OSError) and error.errno is not None:
        arguments = [error.errno, error.strerror, *([str(error.filename)] if error.filename else [])]
    return {"kind": number, "arguments": arguments}


def _rebuilt(told: dict[str, Any], rank: int) -> Exception:
    error = KINDS[told["kind"]](*told["arguments"])
    error.add_note(f"raised by rank {rank}")
    return error


def _is_lost(error: RuntimeError) -> bool:
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError):
        return True
    said = str(error).lower()
    return any(sign in said for sign in LOST)
