"""Ranks that meet in a store which outlives them."""

import threading

import pytest
import torch.distributed as dist

from batchnorm.cli.meeting import meet


def attempt(store, num, absent=()):
    """What each rank sets and all find, in threads; None for one that nobody came to."""
    found = {}

    def come(rank):
        try:
            shared = meet(store, rank, num, 10 if not absent else 0.5)
        except TimeoutError:
            found[rank] = None
            return
        # As gloo does with its addresses: overwritten by this attempt only where it comes late.
        shared.set(f"address-{rank}", f"{rank} of {id(found)}")
        found[rank] = [shared.get(f"address-{other}").decode() for other in range(num)]

    ranks = [threading.Thread(target=come, args=(rank,)) for rank in range(num) if rank not in absent]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    return id(found), found


@pytest.mark.parametrize("num", [1, 2, 5])
def test_every_attempt_finds_its_own_and_none_of_those_before(num):
    store = dist.HashStore()
    for _ in range(5):
        mine, found = attempt(store, num)
        assert found == {rank: [f"{other} of {mine}" for other in range(num)] for rank in range(num)}


@pytest.mark.parametrize("absent", [0, 1, 2])
def test_a_rank_that_does_not_come_is_not_mistaken_for_its_predecessor(absent):
    store = dist.HashStore()
    attempt(store, 3)
    assert set(attempt(store, 3, absent=(absent,))[1].values()) == {None}
    mine, found = attempt(store, 3)
    assert found[0] == [f"{other} of {mine}" for other in range(3)]


def test_another_number_of_ranks():
    store = dist.HashStore()
    for num in (3, 2, 4, 1, 2):
        mine, found = attempt(store, num)
        assert found == {rank: [f"{other} of {mine}" for other in range(num)] for rank in range(num)}
