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


CASES = {
    "exact": share,
    "pooled": lambda rank: share(rank, "pooled"),
    "paper": lambda rank: share(rank, "paper"),
    "nothing": nothing_on_rank_1,
    "poison": poison_on_rank_1,
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
