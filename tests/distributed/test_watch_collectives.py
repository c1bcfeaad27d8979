"""Ranks that wait say so, and ranks that come to different collectives are told apart: two processes."""

import re

import gloo_ranks
import pytest
import torch
import torch.distributed as dist
from torch import nn

from batchnorm.distributed import watch_collectives

gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")


@pytest.fixture(scope="module")
def found():
    return gloo_ranks.run("watched_ranks", 2)


@gloo
def test_watching_changes_no_number_and_ends(found):
    gloo_ranks.assert_passed(found, 2, "same")


@gloo
def test_another_layer_on_one_rank_is_named_and_ranks_go_on(found):
    for rank in range(2):
        assert isinstance(found["layers", rank], list), found["layers", rank]
        (message,) = found["layers", rank]
        assert "rank 0: the forward of 'a' (3 channels); rank 1: the forward of 'b' (3 channels)" in message


@gloo
def test_a_forward_against_a_backward_is_named(found):
    for rank in range(2):
        message = str(found["directions", rank])
        assert "rank 0: the forward of 'a' (3 channels); rank 1: the backward of 'a' (3 channels)" in message


@gloo
def test_other_numbers_of_channels_are_named_and_nothing_hangs(found):
    for rank in range(2):
        message = str(found["channels", rank])
        assert "rank 0: the forward of 'a' (3 channels); rank 1: the forward of 'a' (5 channels)" in message


@gloo
def test_every_rank_tells_where_it_is_when_one_waits_too_long(found):
    waits, elsewhere = (str(found["late", rank]) for rank in range(2))
    assert re.search(
        r"batchnorm: rank 0 has waited \d+ s in the forward of 'b' \(3 channels\), call 1 there, "
        r"collective 1 of the group; not there: rank 1",
        waits,
    ), waits
    assert (
        "batchnorm: rank 1 is in no collective, while others wait too long; the last was the forward of 'a' "
        "(3 channels), call 1 there, collective 0 of the group"
    ) in elsewhere, elsewhere


def test_one_process_watches_nothing():
    with watch_collectives(nn.BatchNorm1d(3)) as watch:
        nn.BatchNorm1d(3)(torch.randn(4, 3))
    assert watch._thread is None


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"needs a torch\.nn\.Module, got str"):
        watch_collectives("model")
    with pytest.raises(ValueError, match="limit_s must be a positive number of seconds, got 0"):
        watch_collectives(nn.Linear(1, 1), limit_s=0)
