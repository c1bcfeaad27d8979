"""Training with synchronized layers on three ranks, one of them empty; see `test_synced_training`."""

import copy
from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.utils.checkpoint as cp
from gloo_ranks import collectives, gathered, is_same_everywhere, summed
from torch import nn

import batchnorm as bn
from batchnorm import distributed, kernels, layers

SIZES = [3, 0, 4]


class Residual(nn.Module):
    """Two normalized convolutions around a sum, with all that the layers can carry."""

    def __init__(self, norm=layers.BatchNorm2d, checkpoint="") -> None:
        super().__init__()
        torch.manual_seed(5)
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), norm(4, activation="relu"))
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), norm(4, activation="silu")
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), norm(4, activation="relu")
        self.head = nn.Linear(4, 3)
        self.checkpoint = checkpoint
        self.double()

    def block(self, x):
        return self.bn2(self.conv2(self.bn1(self.conv1(x))), x)

    def forward(self, x):
        x = self.stem(x)
        if self.checkpoint:
            x = cp.checkpoint(self.block, x, use_reentrant=self.checkpoint == "reentrant")
        else:
            x = self.block(x)
        return self.head(x.mean((2, 3)))


def synced(**options):
    return Residual(layers.SyncedBatchNorm2d, **options)


def batch(step: int = 0):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(7, 2, 5, 5, generator=generator, dtype=torch.float64) * 2 + 1
    return x, torch.randn(7, 3, generator=generator, dtype=torch.float64)


def mine(t):
    return t.split(SIZES)[dist.get_rank()]


def assert_same(model, other, what=""):
    for (name, t), (_, expected) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
        torch.testing.assert_close(
            t, expected, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{what} {n}: {m}"
        )


def five_steps(rank: int, num_ranks: int) -> None:
    alone, inner = Residual(), synced()
    ranks = nn.parallel.DistributedDataParallel(inner, broadcast_buffers=False)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.3, momentum=0.9) for m in (alone, ranks)]
    for step in range(5):
        x, target = batch(step)
        # The wrapper takes the mean over ranks.
        (num_ranks * (ranks(mine(x)) - mine(target)).square().sum() / 7).backward()
        ((alone(x) - target).square().sum() / 7).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert_same(inner, alone, f"step {step}")
    for name, t in inner.state_dict().items():
        assert is_same_everywhere(t), name
    assert alone.bn2.num_batches_tracked == 5


def gradients(model, x, target):
    ((model(x) - target).square().sum() / 7).backward()
    return [p.grad for p in model.parameters()]


def checkpointed(rank: int, num_ranks: int) -> None:
    for kind in ("", "reentrant", "not reentrant"):
        alone, ranks = Residual(), synced(checkpoint=kind)
        x, target = batch()
        expected = gradients(alone, x, target)
        for got, grad in zip(gradients(ranks, mine(x), mine(target)), expected, strict=True):
            torch.testing.assert_close(summed(got), grad, rtol=1e-11, atol=1e-12)
        for (name, t), (_, b) in zip(ranks.named_buffers(), alone.named_buffers(), strict=True):
            torch.testing.assert_close(t, b, rtol=1e-12, atol=1e-12, msg=f"{kind} {name}")
        assert ranks.bn1.num_batches_tracked == 1


def counted(rank: int, num_ranks: int) -> None:
    model, (x, target) = synced(), batch()
    x, target = mine(x), mine(target)
    held = []
    forward = collectives(lambda: held.append((model(x) - target).square().sum()))
    C = 4
    assert forward == [("all_gather", 2 * C + 1)] * 3
    backward = collectives(held[0].backward)
    assert backward == [("all_reduce", 2 * C)] * 3


def alone_where_nothing_is_shared(rank: int, num_ranks: int) -> None:
    def same_bits(make, context):
        ranks, alone = synced(), Residual()
        make(ranks), make(alone)
        x = torch.randn(3 + rank, 2, 5, 5, dtype=torch.float64)
        got = []

        def step():
            with context():
                got.append(ranks(x))
            got[0].sum().backward()

        assert collectives(step) == []
        assert torch.equal(got[0], alone(x))
        for t, b in zip(ranks.buffers(), alone.buffers(), strict=True):
            assert torch.equal(t, b)

    same_bits(lambda m: m.eval(), nullcontext)
    same_bits(bn.freeze, nullcontext)
    same_bits(lambda m: None, distributed.alone)
    # Without running statistics evaluation is by the batch, too: by this rank's.
    layer = layers.SyncedBatchNorm1d(3, track_running_stats=False).eval()
    x = torch.randn(4 + rank, 3)
    assert collectives(lambda: layer(x)) == []
    assert torch.equal(layer(x), layers.BatchNorm1d(3, track_running_stats=False)(x))


def single_sample(rank: int, num_ranks: int) -> str:
    layer = layers.SyncedBatchNorm1d(3)
    layer.place = "head.norm"
    try:
        layer(torch.randn(1 if rank == 1 else 0, 3))
    except ValueError as error:
        assert layer.num_batches_tracked == 0
        # None of the ranks is left behind.
        layer(torch.randn(1, 3)).sum().backward()
        assert layer.num_batches_tracked == 1
        return str(error)
    return "no error"


def nothing_anywhere(rank: int, num_ranks: int) -> None:
    for shape in ((0, 3), (0, 3, 4, 4), (2, 3, 0, 5)):
        layer = layers.SyncedBatchNorm1d(3) if len(shape) == 2 else layers.SyncedBatchNorm2d(3)
        before = copy.deepcopy(layer.state_dict())
        x = torch.randn(shape, requires_grad=True)
        y = layer(x)
        assert y.shape == x.shape
        y.sum().backward()
        assert x.grad.shape == x.shape
        assert torch.equal(layer.weight.grad, torch.zeros(3))
        for name, t in layer.state_dict().items():
            assert torch.equal(t, before[name]), name


def a_sick_rank(rank: int, num_ranks: int) -> None:
    layer = layers.SyncedBatchNorm1d(2)
    x = torch.randn(4, 2)
    if rank == 2:
        x[1, 0] = torch.inf
    y = layer(x)
    # Infinity is everybody's, as in one process; statistics do not move, on any rank.
    assert not y[:, 0].isfinite().any()
    assert y[:, 1].isfinite().all()
    assert layer.num_batches_tracked == 0
    assert torch.equal(layer.running_mean, torch.zeros(2))


def twice_differentiated(rank: int, num_ranks: int) -> None:
    def second(layer, x, dy, v, extra, shown):
        x = x.clone().requires_grad_()
        dy, extra = dy.clone().requires_grad_(), extra.clone().requires_grad_()
        y = layer(x, extra, shown)
        (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
        (dx * v).sum().backward()
        # γ's share of a rank is a share; the others are of this rank's own samples.
        return x.grad, dy.grad, extra.grad, layer.weight.grad

    for activation, masked in ((None, False), ("silu", False), ("relu", False), ("tanh", True)):
        torch.manual_seed(1)
        options = {"activation": activation, "dtype": torch.float64}
        ranks, alone = layers.SyncedBatchNorm1d(3, **options), layers.BatchNorm1d(3, **options)
        for layer in (ranks, alone):
            nn.init.constant_(layer.weight, 1.3)
        x, dy, v, extra = (torch.randn(7, 3, 4, dtype=torch.float64) for _ in range(4))
        shown = torch.rand(7, 4) > 0.3 if masked else None
        parts = [None if t is None else mine(t) for t in (x, dy, v, extra, shown)]
        got = second(ranks, *parts)
        with kernels.use("reference"):
            expected = second(alone, x, dy, v, extra, shown)
        for name, ours, theirs in zip(("x", "dy", "residual"), got, expected, strict=False):
            ours = torch.zeros_like(parts[0]) if ours is None else ours
            theirs = torch.zeros_like(x) if theirs is None else theirs
            torch.testing.assert_close(gathered(ours, SIZES), theirs, rtol=1e-10, atol=1e-11, msg=name)
        torch.testing.assert_close(summed(got[3]), expected[3], rtol=1e-10, atol=1e-11)


def committed_on_step(rank: int, num_ranks: int) -> None:
    alone, ranks = Residual(), synced()
    for model, cut in ((alone, lambda t: t), (ranks, mine)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with bn.commit_on_step(model, optimizer):
            for step in range(2):
                # Without reducing in between: the empty rank's gradient is zero when the second part comes.
                for part in range(2):
                    x, target = (cut(t) for t in batch(2 * step + part))
                    (model(x) - target).square().sum().backward()
                assert model.bn1.num_batches_tracked == step
                optimizer.step()
                optimizer.zero_grad()
    assert ranks.bn1.num_batches_tracked == 2
    assert_same(ranks, alone)
    assert all(is_same_everywhere(t) for t in ranks.buffers())


def memory_saved(rank: int, num_ranks: int) -> None:
    x, target = batch()
    # The layout is not left to each rank's clock: sums of gradients are taken as they lie in memory.
    model, report = bn.accelerate(synced(), batch()[0] + rank, save_memory=True, channels_last=False)
    assert report.bytes_after < report.bytes_before
    expected = gradients(Residual(), x, target)
    for got, grad in zip(gradients(model, mine(x), mine(target)), expected, strict=True):
        torch.testing.assert_close(summed(got), grad, rtol=1e-11, atol=1e-12)
    assert model.bn1.num_batches_tracked == 1


def other_numbers_of_batches(rank: int, num_ranks: int) -> None:
    # Every batch by itself, on each rank as many as it has: collectives of layers would hang.
    model = synced()
    batches = [batch(10 * rank + i)[0] for i in range(rank + 1)]
    report = bn.recalibrate(model, batches, method="pooled", group=dist.group.WORLD)
    assert report.num_batches == 6
    assert is_same_everywhere(model.bn2.running_var)


CASES = {
    "five steps": five_steps,
    "checkpointed": checkpointed,
    "counted": counted,
    "alone": alone_where_nothing_is_shared,
    "single": single_sample,
    "nothing": nothing_anywhere,
    "sick": a_sick_rank,
    "twice": twice_differentiated,
    "committed": committed_on_step,
    "memory": memory_saved,
    "recalibrated": other_numbers_of_batches,
}
