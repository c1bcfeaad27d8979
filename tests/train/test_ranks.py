"""What PyTorch says when another rank is lost, and what we make of it."""

import pytest

from batchnorm.train.ranks import RankLost, Ranks

TWO = Ranks(rank=1, num=2)


@pytest.mark.parametrize(
    "said",
    [
        "[/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4321",
        "[/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 15000ms for recv operation to complete",
        # Of the second collective to time out on one connection.
        "Application timeout caused pair closure",
    ],
    ids=["ended", "does not answer", "did not answer before"],
)
def test_a_lost_rank(said):
    with pytest.raises(RankLost, match=r"rank 1 of 2 lost contact with another rank.*Give the same command"):
        with TWO.contact():
            raise RuntimeError(f"{said}\nand more lines")


def test_an_error_of_another_kind_is_left_alone():
    with pytest.raises(RuntimeError, match=r"^size mismatch$"):
        with TWO.contact():
            raise RuntimeError("size mismatch")
