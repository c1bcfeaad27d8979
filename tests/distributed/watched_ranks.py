"""Collectives under a watch, on two ranks; see `test_watch_collectives`."""

import contextlib
import io
import threading
import time

import torch
from torch import nn

from batchnorm import layers
from batchnorm.distributed import watch_collectives


def model(channels: int = 3) -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {name: layers.SyncedBatchNorm1d(channels, dtype=torch.float64) for name in ("a", "b")}
    )


def x(rank: int, channels: int = 3):
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(4, channels, generator=generator, dtype=torch.float64)


def same_numbers(rank: int, num_ranks: int) -> None:
    plain, watched = model(), model()
    expected = plain["b"](plain["a"](x(rank)))
    with watch_collectives(watched, limit_s=30):
        given = x(rank).requires_grad_()
        for _ in range(3):
            got = watched["b"](watched["a"](given))
            got.square().sum().backward()
        names = [t.name for t in threading.enumerate()]
        assert "batchnorm-watch" in names
    assert "batchnorm-watch" not in [t.name for t in threading.enumerate()]
    assert torch.equal(got, expected)
    assert watched["a"].place == "a"
    # Over: no one meets any more.
    if rank == 0:
        time.sleep(0.05)
    watched["a"](x(rank))


def caught(task) -> str:
    try:
        task()
    except RuntimeError as error:
        return str(error)
    return "no error"


def other_layers(rank: int, num_ranks: int) -> list[str]:
    net = model()
    with watch_collectives(net, limit_s=30):
        net["a"](x(rank))
        found = [caught(lambda: net["b" if rank else "a"](x(rank)))]
        # The ranks are together again.
        net["b"](x(rank))
        return found


def forward_against_backward(rank: int, num_ranks: int) -> str:
    net = model()
    with watch_collectives(net, limit_s=30):
        y = net["a"](x(rank).requires_grad_())
        return caught(y.square().sum().backward if rank else lambda: net["a"](x(rank)))


def other_channels(rank: int, num_ranks: int) -> str:
    net = model(3 + 2 * rank)
    with watch_collectives(net, limit_s=30):
        return caught(lambda: net["a"](x(rank, 3 + 2 * rank)))


def late(rank: int, num_ranks: int) -> str:
    net, said = model(), io.StringIO()
    with contextlib.redirect_stderr(said), watch_collectives(net, limit_s=0.2):
        net["a"](x(rank))
        if rank:
            time.sleep(1.5)  # in no collective
        net["b"](x(rank))
    return said.getvalue()


CASES = {
    "same": same_numbers,
    "layers": other_layers,
    "directions": forward_against_backward,
    "channels": other_channels,
    "late": late,
}
