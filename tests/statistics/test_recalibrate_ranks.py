"""Recalibration over ranks that hold different amounts of data: two processes, gloo."""

import socket
import traceback
from queue import Empty

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from batchnorm.statistics import recalibrate

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4), nn.BatchNorm1d(4)]
    return nn.Sequential(*layers).double()


def data() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.cat([torch.randn(40, 3), torch.randn(6, 3) * 2 + 5]).double()


def on_rank(rank: int, port: int, answers: mp.Queue) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for name, case in CASES.items():
        try:
            answers.put((name, rank, case(rank)))
        except Exception:
            answers.put((name, rank, traceback.format_exc()))
            raise  # the other rank may be waiting: no use going on
    dist.destroy_process_group()


def share(rank: int, method: str = "exact") -> dict[str, torch.Tensor]:
    model = nn.parallel.DistributedDataParallel(network())
    # Rank 0 has five batches, rank 1 one: more passes or collectives on one would hang.
    mine = data()[:40].split(8) if rank == 0 else [data()[40:]]
    report = recalibrate(model, mine, method=method, group=dist.group.WORLD)
    assert report.num_batches == 6
    assert report.layers[0].count == 46
    return {key: value.numpy() for key, value in model.module.state_dict().items()}


def nothing_on_rank_1(rank: int) -> dict[str, torch.Tensor]:
    model = network()
    recalibrate(model, data().split(8) if rank == 0 else [], group=dist.group.WORLD)
    return {key: value.numpy() for key, value in model.state_dict().items()}


def poison_on_rank_1(rank: int) -> str:
    model = network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    batch = data()
    if rank == 1:
        batch[3] = torch.nan
    try:
        recalibrate(model, [batch], group=dist.group.WORLD)
    except (ValueError, RuntimeError) as error:
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        return f"{type(error).__name__}: {error}"
    return "no error"


def means_of_ranks_differ(rank: int) -> dict[str, torch.Tensor]:
    model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.BatchNorm1d(1)).double())
    for value in (-1.0, 1.0):  # training: each rank's running statistics are those of its own data
        model(torch.tensor([[value - 1], [value + 1]]).double() + 10 * rank)
    mine = [torch.tensor([[-1.0], [1.0]]).double() + 10 * rank] * 500
    recalibrate(model, mine, group=dist.group.WORLD)
    return {key: value.numpy() for key, value in model.module.state_dict().items()}


def stop_early(rank: int) -> tuple[float, int, float]:
    model = nn.Sequential(nn.BatchNorm1d(1)).double()
    # Rank 1 has fewer batches than will be needed; rank 0 has them all, in lists of its own sizes.
    mine = (
        list(shuffled()[: 12_000 - 12 * 60].split(12))
        if rank == 0
        else list(shuffled()[-12 * 60 :].split(12))
    )
    report = recalibrate(model, mine, group=dist.group.WORLD, standard_error=0.02)
    return report.standard_error, report.num_batches, model[0].running_mean.item()


def shuffled() -> torch.Tensor:
    torch.manual_seed(2)
    return torch.randn(12_000, 1, dtype=torch.float64) + 3


def metric_of_ranks(rank: int) -> tuple[float, float, bool, float]:
    model = nn.Sequential(nn.BatchNorm1d(1)).double()
    # Alone rank 0 would keep the new statistics and rank 1 the old ones.
    report = recalibrate(
        model,
        data()[:, :1].split(8),
        group=dist.group.WORLD,
        metric=lambda m: (m[0].running_mean.item() != 0) * (1.0 if rank == 0 else -3.0),
        keep_better=True,
    )
    return report.metric.old, report.metric.new, report.kept_old, model[0].running_mean.item()


def metric_fails_on_rank_1(rank: int) -> str:
    model = network()
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def metric(_: nn.Module) -> float:
        if rank == 1:
            raise KeyError("labels")
        return 0.0

    try:
        recalibrate(model, [data()], group=dist.group.WORLD, metric=metric)
    except (KeyError, RuntimeError) as error:
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        return f"{type(error).__name__}: {error}"
    return "no error"


CASES = {
    "exact": share,
    "pooled": lambda rank: share(rank, "pooled"),
    "paper": lambda rank: share(rank, "paper"),
    "nothing": nothing_on_rank_1,
    "poison": poison_on_rank_1,
    "means of ranks differ": means_of_ranks_differ,
    "stop early": stop_early,
    "metric": metric_of_ranks,
    "metric fails": metric_fails_on_rank_1,
}


@pytest.fixture(scope="module")
def answers() -> dict[tuple[str, int], object]:
    """What every case returned on both ranks, by (case, rank)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.Queue()
    ranks = [context.Process(target=on_rank, args=(rank, port, queue)) for rank in range(2)]
    for process in ranks:
        process.start()
    found = {}
    try:
        while len(found) < 2 * len(CASES):
            case, rank, answer = queue.get(timeout=60)
            found[case, rank] = answer
    except Empty:
        pass  # the tests say which answers are missing
    finally:
        for process in ranks:
            process.join(10)
            process.kill()
    return found


@pytest.mark.parametrize("case", ["exact", "pooled", "paper", "nothing"])
def test_fvcore_row_ranks_with_different_amounts_of_data_agree_with_one_process(case, answers):
    first, second = (answers.get((case, rank)) for rank in range(2))
    assert isinstance(first, dict), first
    assert isinstance(second, dict), second
    alone = network()
    parts = data().split(8) if case == "nothing" else [*data()[:40].split(8), data()[40:]]
    recalibrate(alone, parts, method="exact" if case == "nothing" else case)
    for key, value in alone.state_dict().items():
        assert torch.equal(torch.from_numpy(first[key]), torch.from_numpy(second[key])), key
        torch.testing.assert_close(torch.from_numpy(first[key]), value, rtol=1e-12, atol=1e-13)


def test_an_error_on_one_rank_ends_both_and_changes_nothing(answers):
    first, second = (answers.get(("poison", rank)) for rank in range(2))
    assert str(first).startswith("RuntimeError: recalibration failed on 1 other rank"), first
    assert str(second).startswith("ValueError: batch 0, layer '1'"), second


def test_ddp_and_timm_distribute_bn_rows_statistics_are_pooled_over_ranks(answers):
    for rank in range(2):
        state = answers["means of ranks differ", rank]
        # Rank 0 alone has mean 0, rank 1 has 10; the average of their variances is 1.
        assert state["0.running_mean"].item() == pytest.approx(5, rel=1e-12)
        assert state["0.running_var"].item() == pytest.approx((1 + 25) * 2000 / 1999, rel=1e-12)


def test_ranks_stop_at_the_same_batch_once_all_their_data_are_enough(answers):
    first, second = (answers["stop early", rank] for rank in range(2))
    assert first == second
    error, num_batches, mean = first
    assert 0.012 < error <= 0.02
    assert 2500 / 12 * 0.6 < num_batches < 2500 / 12 * 2
    assert mean == pytest.approx(3, abs=4 * 0.02)


def test_the_mean_of_the_metric_over_ranks_decides_for_all(answers):
    assert answers["metric", 0] == answers["metric", 1] == (0.0, -1.0, True, 0.0)


def test_a_metric_that_fails_on_one_rank_ends_both_and_changes_nothing(answers):
    assert answers["metric fails", 0].startswith("RuntimeError: the metric failed on 1 other rank")
    assert answers["metric fails", 1] == "KeyError: 'labels'"
