"""Running statistics of ranks that trained apart become those of all their data: three processes."""

import gloo_ranks
import pytest
import torch
import torch.distributed as dist
from torch import nn

import batchnorm as bn

gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")


@pytest.fixture(scope="module")
def found():
    return gloo_ranks.run("pooled_ranks", 3)


@gloo
def test_ddp_and_timm_distribute_bn_rows_means_0_and_10_give_5_and_26(found):
    gloo_ranks.assert_passed(found, 3, "0 and 10")


@gloo
def test_ranks_weigh_by_the_samples_that_they_saw(found):
    gloo_ranks.assert_passed(found, 3, "samples")


@gloo
def test_pooled_statistics_are_those_of_recalibrating_on_the_whole(found):
    gloo_ranks.assert_passed(found, 3, "recalibrated")


@gloo
def test_frozen_layers_stay_and_one_collective_does_the_model(found):
    gloo_ranks.assert_passed(found, 3, "frozen")


REFUSED = {
    "channels": "rank 0 has '1' with 4 channels where rank 2 has '1' with 5 channels",
    "missing": "rank 0 has '2' with 3 channels where rank 1 has nothing more",
    "frozen": "rank 0 has '1' with 4 channels where rank 1 has '2' with 4 channels",
    "weights": "on rank 1 num_samples was given, on rank 0 num_samples was not given",
    "nothing": "num_samples is 0 on all ranks",
    "sick": "layer '2': running statistics that are not finite on rank 2",
}


@gloo
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_pooled_is_refused_on_all_ranks_by_name(case, found):
    for rank in range(3):
        assert isinstance(found["refused", rank], dict), found["refused", rank]
        assert REFUSED[case] in found["refused", rank][case]


def test_one_process_keeps_its_statistics():
    model = nn.Sequential(nn.BatchNorm1d(3))
    model[0].running_mean.fill_(3)
    report = bn.pool_statistics(model)
    assert (report.num_ranks, report.shares) == (1, (1.0,))
    assert torch.equal(model[0].running_mean, torch.full((3,), 3.0))


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"needs a torch\.nn\.Module, got int"):
        bn.pool_statistics(3)
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        bn.pool_statistics(nn.BatchNorm1d(3), num_samples=-1)
    with pytest.raises(ValueError, match="no batch normalization with statistics to pool"):
        bn.pool_statistics(nn.Linear(3, 3))
