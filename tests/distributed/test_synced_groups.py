"""Subgroups of ranks, and `convert` to synchronized layers and back: four processes."""

import copy
import pickle

import gloo_ranks
import pytest
import torch
import torch.distributed as dist
from torch import nn

import batchnorm as bn
from batchnorm import layers

gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")


@pytest.fixture(scope="module")
def found():
    return gloo_ranks.run("synced_groups", 4)


@gloo
def test_groups_of_consecutive_ranks(found):
    gloo_ranks.assert_passed(found, 4, "subgroups")


@gloo
def test_any_group_of_ranks(found):
    gloo_ranks.assert_passed(found, 4, "chosen")


@gloo
def test_ranks_that_cannot_be_cut_evenly(found):
    for rank in range(4):
        message = str(found["indivisible", rank])
        assert message == (
            "4 ranks cannot be cut into groups of 3: use a group_size of 1, 2, 4, or start 6 ranks"
        )


@gloo
def test_torch_sync_batch_norm_row_fused_relu_and_ties_stay_and_it_reverts(found):
    gloo_ranks.assert_passed(found, 4, "converted")


@gloo
def test_synced_becomes_torchs(found):
    gloo_ranks.assert_passed(found, 4, "to torch")


@gloo
def test_torch_sync_batch_norm_row_becomes_synced_and_runs_on_a_cpu(found):
    gloo_ranks.assert_passed(found, 4, "from torch")


def network():
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.BatchNorm1d(64))


def test_without_a_process_group_synced_is_plain_to_the_bit():
    x = torch.randn(5, 2, 6, 6)
    plain, _ = bn.convert(network(), "plain")
    synced, report = bn.convert(plain, "synced", x)
    assert [c.what for c in report.changes] == [
        "now batchnorm.SyncedBatchNorm2d, over the ranks that there will be: here is one",
        "now batchnorm.SyncedBatchNorm1d, over the ranks that there will be: here is one",
    ]
    for model in (plain, synced):
        model(x).square().sum().backward()
    assert torch.equal(plain(x), synced(x))
    for (name, p), (other, q) in zip(plain.named_parameters(), synced.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(p.grad, q.grad)
    assert list(plain.state_dict()) == list(synced.state_dict())
    assert all(torch.equal(t, synced.state_dict()[name]) for name, t in plain.state_dict().items())


def test_frozen_and_per_activation_layers_convert_too():
    model = nn.Sequential(layers.BatchNormPerActivation((3, 2)), layers.BatchNorm1d(3, channel_dim=1))
    bn.freeze(model, "1")
    new, report = bn.convert(model, "synced", torch.randn(4, 3, 2))
    assert [type(m) for m in new] == [layers.SyncedBatchNormPerActivation, layers.SyncedBatchNorm1d]
    assert new[1].frozen
    assert not report.refusals
    back, _ = bn.convert(new, "plain", torch.randn(4, 3, 2))
    assert [type(m) for m in back] == [type(m) for m in model]


def test_a_subclass_of_a_synced_layer_is_left_alone():
    class Mine(layers.SyncedBatchNorm1d):
        pass

    _, report = bn.convert(nn.Sequential(Mine(3), nn.BatchNorm1d(3)), "plain")
    assert "Mine is a subclass of SyncedBatchNorm1d" in report.refusals[0].reason


def test_group_size_needs_a_process_group():
    with pytest.raises(
        ValueError, match=r"group_size=2 cuts the ranks .* call torch.distributed.init_process"
    ):
        bn.convert(network(), "synced", group_size=2)
    with pytest.raises(ValueError, match="group_size must be a positive number of ranks, got 0"):
        layers.SyncedBatchNorm1d(3, group_size=0)
    with pytest.raises(
        ValueError, match="to='plain' takes no options, got group_size, which is of to='synced'"
    ):
        bn.convert(network(), "plain", group_size=2)


def test_copies_and_pickles_keep_the_group_and_a_lost_group_is_named():
    layer = layers.SyncedBatchNorm2d(3, activation="relu")
    layer.group_name, layer.place = "7", "stem.norm"
    assert "synchronized over group 7" in repr(layer)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert (twin.group_name, twin.place, twin.activation) == ("7", "stem.norm", "relu")
    with pytest.raises(ValueError, match=r"process group named '7', which this process has not made"):
        bn.distributed.group_named("7")
