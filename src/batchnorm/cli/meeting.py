"""How the ranks of one attempt find each other, and none of an attempt that has failed."""

import hashlib
import json
import time
import uuid
from collections.abc import Sequence

import torch.distributed as dist

POLL_S = 0.02


def meet(store: dist.Store, rank: int, num: int, timeout_s: float) -> dist.Store:
    """The part of a store that the ranks of this attempt share, with nothing in it yet.

    torchrun keeps one store over all restarts. What a killed attempt left there, such as the addresses of
    its ranks, would be taken for this one's by whoever looks first; and neither torchrun's count of
    restarts nor its rounds are the same on all machines. So each rank says a word that nobody said
    before, rank 0 repeats all it has heard, each confirms the list that has its word, and rank 0 says
    that all have.

    Args:
        store: That all ranks reach, of this attempt and of earlier ones.
        rank: This process.
        num: How many there are.
        timeout_s: How long to wait for the others.

    Raises:
        TimeoutError: Some did not come.
    """
    if num == 1:
        return dist.PrefixStore(uuid.uuid4().hex, store)
    word, limit = uuid.uuid4().hex, time.monotonic() + timeout_s
    meeting = dist.PrefixStore("batchnorm", store)
    wait = _first if rank == 0 else _other
    while (name := wait(meeting, rank, num, word)) is None:
        if time.monotonic() > limit:
            raise TimeoutError(f"some of the {num} ranks did not come")
        time.sleep(POLL_S)
    return dist.PrefixStore(name, store)


def _first(store: dist.Store, _: int, num: int, word: str) -> str | None:
    others = range(1, num)
    heard = _read(store, [f"word-{rank}" for rank in others])
    if heard is None:
        return None
    words = [word, *heard]
    store.set("words", json.dumps(words))
    name = _name(words)
    if _read(store, [f"confirmed-{rank}" for rank in others]) != [name] * len(others):
        return None
    store.set("complete", name)
    return name


def _other(store: dist.Store, rank: int, num: int, word: str) -> str | None:
    store.set(f"word-{rank}", word)
    said = _read(store, ["words"])
    words = json.loads(said[0]) if said else []
    if len(words) != num or words[rank] != word:
        return None
    name = _name(words)
    store.set(f"confirmed-{rank}", name)
    return name if _read(store, ["complete"]) == [name] else None


def _name(words: Sequence[str]) -> str:
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:32]


def _read(store: dist.Store, keys: list[str]) -> list[str] | None:
    """The values, or None as long as one is missing."""
    return [value.decode() for value in store.multi_get(keys)] if store.check(keys) else None
