"""`save_memory`: the bytes that are held, and what is computed again how often."""

import normalized_networks as networks
import pytest
import torch
from saving_cases import IMAGES, accelerated, assert_same, chain, gradients
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.layers import recompute
from batchnorm.surgery.saving import bytes_for_backward


@pytest.fixture
def computed(monkeypatch) -> list[Tensor]:
    """The inputs of all outputs that were computed again."""
    seen: list[Tensor] = []
    normalize_with = recompute.normalize_with

    def counted(x, *args, **options):
        seen.append(x)
        return normalize_with(x, *args, **options)

    monkeypatch.setattr(recompute, "normalize_with", counted)
    return seen


@pytest.mark.parametrize(
    ("make", "shape", "share"),
    [
        (chain, IMAGES, 0.61),
        (lambda: chain(act=nn.ReLU), IMAGES, 0.61),
        (lambda: chain(act=nn.Sigmoid), IMAGES, 0.61),
        (networks.ResNet, networks.IMAGES, 0.72),
        (networks.Inception, networks.IMAGES, 0.9),
        (networks.UNet, networks.IMAGES, 0.8),
    ],
    ids=["chain, ReLU in place", "chain, ReLU", "chain, sigmoid", "ResNet", "Inception", "U-Net"],
)
def test_bytes_held_for_backward(make, shape, share):
    net, x = make().double(), torch.randn(shape, dtype=torch.float64)
    _, report = bn.accelerate(net, x, save_memory=True, channels_last=False)
    assert report.bytes_after <= share * report.bytes_before
    assert f"{report.bytes_after / report.bytes_before:.0%}" in str(report)


def test_bytes_are_those_that_can_be_counted_by_hand():
    net, x = chain(3), torch.randn(IMAGES, dtype=torch.float64)
    image = x.numel() * 8
    # Eager: the input of each normalization and the output of each ReLU; six channels' mean and deviation.
    assert bytes_for_backward(net, (x,), forget=False) == 6 * image + 3 * 2 * 6 * 8
    model = accelerated(net, x)
    # Ours: the inputs, and the last output, which the caller holds anyway.
    after = bytes_for_backward(model, (x,), forget=True)
    assert 3 * image < after < 3 * image + 3 * 10 * 6 * 8


def test_an_output_is_computed_once_however_many_want_it(computed):
    x = torch.randn(networks.IMAGES, dtype=torch.float64)
    model = accelerated(networks.Inception().double(), x)
    computed.clear()
    gradients(model, x)
    assert len({t.data_ptr() for t in computed}) == len(computed)
    # The stem is wanted by four branches; the branches' outputs by their own ReLU at most.
    assert 1 <= len(computed) <= 5


@pytest.fixture
def alive(monkeypatch) -> list[int]:
    """How many outputs that were computed again existed at once, noted at each computation."""
    outputs: list[recompute.StorageWeakRef] = []
    counts: list[int] = []
    normalize_with = recompute.normalize_with

    def counted(*args, **options):
        output = normalize_with(*args, **options)
        outputs.append(recompute.StorageWeakRef(output.untyped_storage()))
        counts.append(sum(not storage.expired() for storage in outputs))
        return output

    monkeypatch.setattr(recompute, "normalize_with", counted)
    counts.append(0)
    return counts


def test_chains_of_sums_are_cut(computed, alive):
    net = nn.Sequential(nn.Conv2d(3, 6, 3), *(networks.BasicBlock(6, 6) for _ in range(9))).double()
    x = torch.randn(networks.IMAGES, dtype=torch.float64)
    model, report = bn.accelerate(net, x, save_memory=True, channels_last=False)
    assert report.bytes_after < 0.65 * report.bytes_before
    computed.clear()
    alive.clear()
    assert_same(gradients(model, x), gradients(net, x))
    assert len(computed) <= 18
    assert max(alive) <= 3


def test_what_was_computed_again_is_dropped_also_when_the_graph_is_retained(alive):
    net, x = chain(), torch.randn(IMAGES, dtype=torch.float64)
    model = accelerated(net, x)
    alive.clear()
    out = model(x)
    out.sum().backward(retain_graph=True)
    assert max(alive) == 1


def test_running_statistics_move_once():
    x = torch.randn(IMAGES, dtype=torch.float64)
    model = accelerated(chain(), x)
    gradients(model, x)
    assert {m.num_batches_tracked.item() for m in model.modules() if isinstance(m, bn.BatchNorm2d)} == {1}
