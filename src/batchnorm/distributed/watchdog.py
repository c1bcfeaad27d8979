"""Who waits for whom: collectives of synchronized layers that take too long, or do not belong together.

While a `CollectiveWatch` is on, ranks meet in the process group's store before every collective,
and only go on together into one that is the same on all of them.
"""

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import nn

from batchnorm.distributed.groups import group_named, num_ranks


class Call(NamedTuple):
    """One collective of a layer.

    Attributes:
        direction: "forward", "backward" or "second backward".
        place: The layer's path in the model; empty where nobody has said.
        num_channels: What the size of the collective follows from.
    """

    direction: str
    place: str
    num_channels: int

    def __str__(self) -> str:
        name = repr(self.place) if self.place else "a layer without a path"
        return f"the {self.direction} of {name} ({self.num_channels} channels)"


_watch: "CollectiveWatch | None" = None
_num_watches = 0


def run(call: Call, group_name: str, start: Callable[[], Any]) -> None:
    """Run a collective to its end; on a GPU, until it is queued.

    Args:
        call: Which it is.
        group_name: Of the ranks that take part.
        start: Starts it, and gives a `torch.distributed.Work`.
    """
    if _watch is None:
        start().wait()
    else:
        _watch._run(call, group_name, start)


def watch_collectives(model: nn.Module, *, limit_s: float = 60.0) -> "CollectiveWatch":
    """Let the collectives of a model's synchronized layers say who waits for whom.

    When one takes longer than the limit, every rank prints its rank, the layer, and how often the
    layer was called there, to stderr, and goes on waiting; the timeout of the process group ends
    it. When ranks come to different collectives (another layer, a backward where others are in a
    forward, another number of channels), all of them raise and name each rank's, before any number
    is exchanged.

    All ranks have to start and end the watch between the same two collectives. It costs a few round
    trips to the process group's store before every collective, while it is on: for finding out why a
    job hangs, and for small ones. No device is waited for. Code under `torch.compile` is watched too.

    Args:
        model: Whose layers; those that several processes train alike.
        limit_s: Seconds a collective may take before the ranks tell.

    Returns:
        The watch; ``remove()`` ends it, or use it as a context manager. In a process without a
        process group it does nothing.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``limit_s`` is not positive, or a watch is on.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"watch_collectives needs a torch.nn.Module, got {type(model).__name__}")
    if not limit_s > 0:
        raise ValueError(f"limit_s must be a positive number of seconds, got {limit_s}")
    if _watch is not None:
        raise ValueError("collectives are being watched already: end that watch first, with remove()")
    for path, module in model.named_modules():
        if isinstance(getattr(module, "place", None), str):
            module.place = path
    return CollectiveWatch(limit_s)


@dataclass
class _Entry:
    """A collective that a rank is in.

    Attributes:
        call: Which.
        group_name: Of which ranks.
        number: Of all collectives of the group.
        times: How often the layer came to it, this time included.
        since: When it began, by the monotonic clock.
        told: When it was last printed.
        work: Of a collective that a device still runs.
    """

    call: Call
    group_name: str
    number: int
    times: int
    since: float = field(default_factory=time.monotonic)
    told: float = 0.0
    work: Any = None

    def __str__(self) -> str:
        return f"{self.call}, call {self.times} there, collective {self.number} of the group"


class CollectiveWatch:
    """What `watch_collectives` gives."""

    def __init__(self, limit_s: float) -> None:
        global _watch, _num_watches
        self.limit_s = limit_s
        self._thread: threading.Thread | None = None
        if num_ranks("") == 1:
            return
        self._rank = dist.get_rank()
        self._prefix = f"batchnorm/watch/{_num_watches}"
        self._lock = threading.Lock()
        self._open: list[_Entry] = []
        self._last: _Entry | None = None
        self._numbers: Counter[str] = Counter()
        self._times: Counter[Call] = Counter()
        self._heard = 0
        self._store, self._threads_store = _store(), _store()
        self._timeout = _timeout()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look_around, name="batchnorm-watch", daemon=True)
        self._thread.start()
        _watch, _num_watches = self, _num_watches + 1

    def remove(self) -> None:
        """End the watch; the thread that looked at the clock is gone when this returns."""
        global _watch
        if _watch is self:
            _watch = None
        if self._thread is not None:
            self._end.set()
            self._thread.join()
            self._thread = None

    def __enter__(self) -> "CollectiveWatch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    # The thread that computes.

    def _run(self, call: Call, group_name: str, start: Callable[[], Any]) -> None:
        with self._lock:
            self._times[call] += 1
            entry = _Entry(call, group_name, self._numbers[group_name], self._times[call])
            self._numbers[group_name] += 1
            self._open.append(entry)
        try:
            self._meet(entry)
            work = start()
            work.wait()
            if not work.is_completed():
                entry.work = work
        finally:
            with self._lock:
                self._last = entry
                if entry.work is None:
                    self._open.remove(entry)

    def _meet(self, entry: _Entry) -> None:
        """Wait until all ranks of the group are at their next collective, and that it is the same."""
        ranks = _ranks_of(entry.group_name)
        keys = {rank: self._key(entry, rank) for rank in ranks}
        self._store.set(keys[self._rank], str(entry.call))
        pause, end = 1e-4, entry.since + self._timeout.total_seconds()
        while not self._store.check(list(keys.values())):
            if time.monotonic() > end:
                raise RuntimeError(
                    f"rank {self._rank} waited {self._timeout.total_seconds():.0f} s, the timeout of the "
                    f"process group, in {entry}; {self._missing(entry, self._store)}"
                )
            time.sleep(pause)
            pause = min(2 * pause, 0.02)
        calls = {rank: self._store.get(key).decode() for rank, key in keys.items()}
        if entry.number:
            # Whoever has come here has read what was said before.
            self._store.delete_key(self._key(entry, self._rank, -1))
        if len(set(calls.values())) > 1:
            told = "; ".join(f"rank {rank}: {call}" for rank, call in calls.items())
            raise RuntimeError(
                f"ranks came to different collectives of batch normalization (collective {entry.number} of "
                f"their group): {told}. Every rank has to call the same synchronized layers in the same "
                f"order, forward and backward: look for a branch that depends on a rank's own data, a layer "
                f"that one rank skips, or a loader that ended early"
            )

    def _key(self, entry: _Entry, rank: int, step: int = 0) -> str:
        return f"{self._prefix}/{entry.group_name}/{entry.number + step}/{rank}"

    # The thread that looks at the clock.

    def _look_around(self) -> None:
        while not self._end.wait(self.limit_s / 4):
            try:
                late = self._late()
                for entry in late:
                    self._threads_store.add(f"{self._prefix}/alarms", 1)
                    self._tell(f"has waited {time.monotonic() - entry.since:.0f} s in {entry}", entry)
                self._answer(bool(late))
            except RuntimeError:
                return  # the store is gone, and with it the process group

    def _late(self) -> list[_Entry]:
        now = time.monotonic()
        with self._lock:
            self._open = [e for e in self._open if e.work is None or not e.work.is_completed()]
            late = [e for e in self._open if now - max(e.since, e.told) > self.limit_s]
            for entry in late:
                entry.told = now
        return late

    def _answer(self, is_late: bool) -> None:
        """Tell where this rank is, if others wait and it does not."""
        alarms = self._threads_store.add(f"{self._prefix}/alarms", 0)
        if alarms > self._heard and not is_late:
            with self._lock:
                now, last = self._open[0] if self._open else None, self._last
            if now is not None:
                self._tell(f"is in {now}, where others wait too long", now)
            else:
                where = f"the last was {last}" if last else "there was none yet"
                self._tell(f"is in no collective, while others wait too long; {where}")
        self._heard = alarms

    def _tell(self, what: str, entry: _Entry | None = None) -> None:
        who = "" if entry is None else f"; {self._missing(entry, self._threads_store)}"
        print(f"batchnorm: rank {self._rank} {what}{who}", file=sys.stderr, flush=True)

    def _missing(self, entry: _Entry, store: Any) -> str:
        ranks = [r for r in _ranks_of(entry.group_name) if not store.check([self._key(entry, r)])]
        if not ranks:
            return "all ranks have come, and the collective itself does not end"
        return f"not there: rank {', '.join(map(str, ranks))}"


def _ranks_of(group_name: str) -> list[int]:
    return dist.get_process_group_ranks(group_named(group_name))


def _store() -> Any:
    """A connection of its own to the store that the process group was made with."""
    store = group_named("").get_group_store()
    return store.clone() if hasattr(store, "clone") else store


def _timeout() -> timedelta:
    group: Any = group_named("")
    try:
        found = group._get_backend(group._device_types[0]).options._timeout
    except (AttributeError, IndexError, RuntimeError):
        return dist.distributed_c10d.default_pg_timeout
    return found
