"""`commit_on_step` under DistributedDataParallel: two processes, gloo; every rank pools its own batches."""

import socket
import traceback
from queue import Empty

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from batchnorm.statistics import commit_on_step

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")


def batches(rank: int) -> torch.Tensor:
    torch.manual_seed(rank)
    return torch.randn(12 + 4 * rank, 3) + 5 * rank


def train(rank: int, *, broadcast: bool) -> dict[str, list[float]]:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))
    model = nn.parallel.DistributedDataParallel(inner, broadcast_buffers=broadcast)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = commit_on_step(model, optimizer)
    first, second = batches(rank).chunk(2)
    with model.no_sync():
        model(first).sum().backward()
    model(second).sum().backward()
    optimizer.step()
    found = {"after the step": inner[0].running_mean.tolist(), "moves": list(handle.moves.items())}
    optimizer.zero_grad()
    model(first).sum().backward()
    found["in the next forward"] = inner[0].running_mean.tolist()
    return found


def on_rank(rank: int, port: int, answers: mp.Queue) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for broadcast in (False, True):
        try:
            answers.put((broadcast, rank, train(rank, broadcast=broadcast)))
        except Exception:
            answers.put((broadcast, rank, traceback.format_exc()))
            raise  # the other rank may be waiting: no use going on
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def answers() -> dict[tuple[bool, int], dict]:
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
        while len(found) < 4:
            broadcast, rank, answer = queue.get(timeout=60)
            found[broadcast, rank] = answer
    except Empty:
        pass  # the tests say which answers are missing
    finally:
        for process in ranks:
            process.join(10)
            process.kill()
    return found


@pytest.mark.parametrize("broadcast", [False, True], ids=["own buffers", "rank 0's buffers"])
def test_each_rank_moves_once_by_the_batches_that_it_saw(answers, broadcast):
    for rank in range(2):
        found = answers.get((broadcast, rank))
        assert isinstance(found, dict), found
        pooled = 0.1 * batches(rank).double().mean(0)
        torch.testing.assert_close(
            torch.tensor(found["after the step"]).double(), pooled, rtol=1e-5, atol=1e-6
        )
        assert found["moves"] == [("0", 1)]
    # As ever, DistributedDataParallel hands rank 0's buffers to all as a forward begins, if told so.
    source = 0 if broadcast else 1
    assert answers[broadcast, 1]["in the next forward"] == answers[broadcast, source]["after the step"]
