"""Layers over several processes equal one process that has the whole batch."""

import gloo_ranks
import pytest
import synced_kernels
import synced_layers
import torch.distributed as dist

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_ranks_equal_one_process(num_ranks):
    """Outputs, gradients of the input, sums of those of γ and β, running statistics."""
    found = gloo_ranks.run("synced_layers", num_ranks)
    gloo_ranks.assert_passed(found, num_ranks, *synced_layers.CASES)


def test_the_fused_kernels_work_on_two_ranks():
    found = gloo_ranks.run("synced_kernels", 2)
    gloo_ranks.assert_passed(found, 2, *synced_kernels.CASES)
