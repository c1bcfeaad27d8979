"""Statistics of ranks that trained apart, pooled; on three ranks, see `test_pool_statistics`."""

import copy

import torch
import torch.distributed as dist
from gloo_ranks import collectives, is_same_everywhere
from torch import nn

import batchnorm as bn
from batchnorm import layers


def with_statistics(layer, mean: float, var: float, batches: int = 1):
    layer.running_mean.fill_(mean), layer.running_var.fill_(var)
    layer.num_batches_tracked.fill_(batches)
    return layer


def two_ranks_at_0_and_10(rank: int, num_ranks: int) -> None:
    group = dist.new_group([0, 1])
    for kind in (nn.BatchNorm2d, layers.BatchNorm2d):
        layer = with_statistics(kind(3), 10.0 * rank, 1.0, 5 + rank)
        model = nn.Sequential(layer)
        if rank == 2:
            continue
        report = bn.pool_statistics(model, group)
        assert torch.equal(layer.running_mean, torch.full((3,), 5.0)), layer.running_mean
        assert torch.equal(layer.running_var, torch.full((3,), 26.0)), layer.running_var
        assert layer.num_batches_tracked == 6
        assert report.num_ranks == 2
        assert report.shares == (0.5, 0.5)
        assert abs(report.layers[0].between - 25 / 26) < 1e-12
        assert "96.2% between ranks" in str(report)


def weighed_by_samples(rank: int, num_ranks: int) -> None:
    counts = [30, 0, 10]
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(40, 2, generator=generator, dtype=torch.float64) + torch.arange(40)[:, None]
    mine = data.split(counts)[rank]
    layer = layers.BatchNorm1d(2, dtype=torch.float64)
    if len(mine):
        layer.running_mean.copy_(mine.mean(0)), layer.running_var.copy_(mine.var(0, correction=0))
    bn.pool_statistics(nn.Sequential(layer), num_samples=len(mine))
    torch.testing.assert_close(layer.running_mean, data.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(layer.running_var, data.var(0, correction=0), rtol=1e-12, atol=0)


def recalibrated_apart(rank: int, num_ranks: int) -> None:
    counts = [3000, 500, 1500]
    generator = torch.Generator().manual_seed(0)
    drift = torch.linspace(0, 10, 5000, dtype=torch.float64)[:, None]
    data = torch.randn(5000, 2, generator=generator, dtype=torch.float64) + drift
    mine, whole = (nn.Sequential(layers.BatchNorm1d(2, dtype=torch.float64)) for _ in range(2))
    bn.recalibrate(whole, data.split(100))
    bn.recalibrate(mine, data.split(counts)[rank].split(100))
    bn.pool_statistics(mine, num_samples=counts[rank])
    torch.testing.assert_close(mine[0].running_mean, whole[0].running_mean, rtol=1e-12, atol=0)
    # Each rank's variance is unbiased by its own count, and pooled as it is.
    torch.testing.assert_close(mine[0].running_var, whole[0].running_var, rtol=1 / min(counts), atol=0)


def network() -> nn.Module:
    return nn.Sequential(
        nn.Linear(3, 4),
        layers.BatchNorm1d(4),
        nn.BatchNorm1d(4),
        nn.BatchNorm1d(4, track_running_stats=False),
    )


def frozen_and_wrapped(rank: int, num_ranks: int) -> None:
    torch.manual_seed(rank)
    inner = network()
    for layer in inner[1:3]:
        with_statistics(layer, rank, 1.0 + rank)
    bn.freeze(inner, "1")
    model = nn.parallel.DistributedDataParallel(inner, broadcast_buffers=False)
    report = None

    def pool():
        nonlocal report
        report = bn.pool_statistics(model)

    found = collectives(pool)
    # One small number that compares the models, and all statistics together.
    assert found == [("all_gather", 1), ("all_gather", 1 + 2 * 4 + 1)]
    assert (inner[1].running_mean == rank).all()
    torch.testing.assert_close(inner[2].running_mean, torch.full((4,), 1.0))
    torch.testing.assert_close(inner[2].running_var, torch.full((4,), 2 + 2 / 3))
    assert is_same_everywhere(inner[2].running_var)
    assert report.notes == (
        "'1' left alone: it is frozen",
        "'3' left alone: it keeps no running statistics",
    )
    # What is the same everywhere stays, to the bit.
    before = copy.deepcopy(inner.state_dict())
    bn.pool_statistics(model)
    assert torch.equal(inner[2].running_mean, before["2.running_mean"])


def refused(rank: int, num_ranks: int) -> dict[str, str]:
    def of(model, **options):
        before = copy.deepcopy(model.state_dict())
        try:
            bn.pool_statistics(model, **options)
        except ValueError as error:
            assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items() if t.isfinite().all())
            return str(error)
        return "no error"

    sick = network()
    if rank == 2:
        sick[2].running_var[1] = torch.nan
    frozen = network()
    if rank == 1:
        bn.freeze(frozen, "1")
    return {
        "channels": of(nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(4 + (rank == 2)))),
        "missing": of(nn.Sequential(*[nn.BatchNorm1d(3) for _ in range(3 - (rank == 1))])),
        "frozen": of(frozen),
        "weights": of(network(), num_samples=7 if rank else None),
        "nothing": of(network(), num_samples=0),
        "sick": of(sick),
    }


CASES = {
    "0 and 10": two_ranks_at_0_and_10,
    "samples": weighed_by_samples,
    "recalibrated": recalibrated_apart,
    "frozen": frozen_and_wrapped,
    "refused": refused,
}
