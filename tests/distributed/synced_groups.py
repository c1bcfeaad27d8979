"""Who shares a batch with whom, and how models come to it; on four ranks, see `test_synced_groups`."""

import copy

import pytest
import torch
import torch.distributed as dist
from gloo_ranks import collectives
from torch import nn

import batchnorm as bn
from batchnorm import layers

C = 3


def whole(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(10, C, generator=generator, dtype=torch.float64) * 2 + torch.arange(10)[:, None]


SIZES = [1, 4, 2, 3]


def equals_one_process(layer, members: list[int], rank: int) -> None:
    """The layer on this rank's part against the plain one on all members' parts."""
    parts, cotangents = whole().split(SIZES), whole(1).split(SIZES)
    alone = layers.BatchNorm1d(C, dtype=torch.float64)
    together = torch.cat([parts[r] for r in members]).requires_grad_()
    expected = alone(together)
    expected.backward(torch.cat([cotangents[r] for r in members]))
    x = parts[rank].clone().requires_grad_()
    y = layer(x)
    y.backward(cotangents[rank])
    start = sum(SIZES[r] for r in members[: members.index(rank)])
    here = slice(start, start + SIZES[rank])
    torch.testing.assert_close(y, expected[here], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, together.grad[here], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.running_var, alone.running_var, rtol=1e-12, atol=1e-12)


def subgroups(rank: int, num_ranks: int) -> None:
    pair = [rank // 2 * 2, rank // 2 * 2 + 1]
    for _ in range(2):  # made once
        layer = layers.SyncedBatchNorm1d(C, dtype=torch.float64, group_size=2)
        equals_one_process(layer, pair, rank)
    assert copy.deepcopy(layer).group_name == layer.group_name
    by_itself = layers.SyncedBatchNorm1d(C, dtype=torch.float64, group_size=1)
    if rank:
        assert collectives(lambda: equals_one_process(by_itself, [rank], rank)) == []
    equals_one_process(layers.SyncedBatchNorm1d(C, dtype=torch.float64, group_size=4), [0, 1, 2, 3], rank)


def chosen_ranks(rank: int, num_ranks: int) -> None:
    group = dist.new_group([0, 3])
    if rank in (0, 3):
        equals_one_process(layers.SyncedBatchNorm1d(C, dtype=torch.float64, group=group), [0, 3], rank)
        with pytest.raises(ValueError, match="not both"):
            layers.SyncedBatchNorm1d(C, group=group, group_size=2)
    else:
        with pytest.raises(ValueError, match="with this rank in it"):
            layers.SyncedBatchNorm1d(C, group=group)


def indivisible(rank: int, num_ranks: int) -> str:
    try:
        bn.convert(nn.Sequential(nn.BatchNorm1d(C)), "synced", group_size=3)
    except ValueError as error:
        return str(error)
    return "no error"


class Tied(nn.Module):
    """A normalization used twice, with a ReLU that it carries."""

    def __init__(self, norm) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(C, C), norm
        self.again = self.norm

    def forward(self, x):
        return self.again(self.first(self.norm(x)))


def converted(rank: int, num_ranks: int) -> None:
    torch.manual_seed(0)
    model = Tied(layers.BatchNorm1d(C, activation="relu")).double()
    before = copy.deepcopy(model.state_dict())
    # Examples that differ from rank to rank: what is compared is no other rank's business.
    new, report = bn.convert(model, "synced", torch.randn(4 + rank, C, dtype=torch.float64), group_size=2)
    assert [(c.where, c.what) for c in report.changes] == [
        ("norm", "now batchnorm.SyncedBatchNorm1d, over 2 ranks")
    ]
    assert [a.mode for a in report.agreement] == ["training", "evaluation"]
    # torch's converter loses the ReLU (least output 0 → −3.15), and unties the two.
    assert new.norm is new.again
    assert new.norm.activation == "relu"
    assert new(whole().split(SIZES)[rank]).min() >= 0
    assert new.norm.place == "norm"
    same, report = bn.convert(new, "synced", group_size=2)
    assert not report.changes
    back, report = bn.convert(same, "plain", torch.randn(4, C, dtype=torch.float64))
    assert type(back.norm) is layers.BatchNorm1d
    assert back.norm is back.again
    assert report.changes[0].what == "now batchnorm.BatchNorm1d; every rank uses its own batch"
    assert "group_name" not in vars(back.norm)
    assert collectives(lambda: back(whole())) == []
    assert list(back.state_dict()) == list(before)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def converted_to_torch(rank: int, num_ranks: int) -> None:
    model = nn.Sequential(nn.Linear(C, C), nn.BatchNorm1d(C), nn.ReLU()).double()
    example = torch.randn(4, C, dtype=torch.float64)
    new, _ = bn.convert(model, "synced", example)
    assert type(new[1]) is layers.SyncedBatchNorm1d
    back, report = bn.convert(new, "torch", example)
    assert type(back[1]) is nn.BatchNorm1d
    assert "every rank uses its own batch" in report.changes[0].what
    assert vars(back[1]).keys() == vars(model[1]).keys()


def from_torchs_synced(rank: int, num_ranks: int) -> None:
    torch.manual_seed(0)
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    model = nn.Sequential(nn.Linear(C, C), nn.SyncBatchNorm(C, process_group=halves[rank // 2])).double()
    with pytest.raises(ValueError, match="GPU"):  # torch's refuses a CPU
        model(torch.randn(4, C, dtype=torch.float64))
    new, report = bn.convert(model, "synced", torch.randn(4, C, dtype=torch.float64))
    assert report.changes[0].what == "now batchnorm.SyncedBatchNorm1d, over 2 ranks"
    plain = nn.Identity()
    new[0] = plain
    equals_one_process(new[1], [rank // 2 * 2, rank // 2 * 2 + 1], rank)


CASES = {
    "subgroups": subgroups,
    "chosen": chosen_ranks,
    "indivisible": indivisible,
    "converted": converted,
    "to torch": converted_to_torch,
    "from torch": from_torchs_synced,
}
