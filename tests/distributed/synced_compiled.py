"""Synchronized layers under `torch.compile`, on two ranks; see `test_synced_compiled`."""

import copy

import torch
from gloo_ranks import collectives, summed
from torch import nn

from batchnorm import layers


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.norm = layers.SyncedBatchNorm2d(3, activation="relu")
        self.last = layers.SyncedBatchNorm1d(3, momentum=None)

    def forward(self, x, mask=None):
        return self.last(self.norm(self.conv(x), mask=mask).mean((2, 3)))


def run(model, x, dy, *mask):
    x = x.clone().requires_grad_()
    y = model(x, *mask)
    y.backward(dy)
    return y.detach(), x.grad


def compiled(rank: int, num_ranks: int) -> None:
    eager, model = Net(), Net()
    fast = torch.compile(model, fullgraph=True)
    for step in range(3):
        torch.manual_seed(10 * step + rank)
        n = 2 + 3 * rank
        x, dy, mask = torch.randn(n, 2, 5, 5), torch.randn(n, 3), torch.rand(n, 5, 5) > 0.2
        given = (x, dy, mask) if step == 2 else (x, dy)
        for got, expected in zip(run(fast, *given), run(eager, *given), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    for (name, t), expected in zip(model.state_dict().items(), eager.state_dict().values(), strict=True):
        torch.testing.assert_close(t, expected, rtol=1e-4, atol=1e-5, msg=name)
    for p, q in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(summed(p.grad), summed(q.grad), rtol=1e-4, atol=1e-4)
    assert model.norm.num_batches_tracked == 3
    held = []
    count = collectives(lambda: held.append(fast(x, mask)))
    assert len(count) == 2, count
    assert len(collectives(lambda: held[0].backward(dy))) == 2


def evaluated(rank: int, num_ranks: int) -> None:
    model = Net().eval()
    fast = torch.compile(copy.deepcopy(model), fullgraph=True)
    x = torch.randn(2 + rank, 2, 5, 5)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    assert collectives(lambda: fast(x)) == []


CASES = {"compiled": compiled, "evaluated": evaluated}
