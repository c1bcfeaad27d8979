"""Networks with synchronized layers train on three ranks, of which one is empty, as in one process."""

import gloo_ranks
import pytest
import torch.distributed as dist

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")


@pytest.fixture(scope="module")
def found():
    return gloo_ranks.run("synced_training", 3)


def test_five_steps_of_a_residual_network_under_ddp(found):
    gloo_ranks.assert_passed(found, 3, "five steps")


def test_checkpointing_repeats_collectives_and_moves_statistics_once(found):
    gloo_ranks.assert_passed(found, 3, "checkpointed")


def test_one_collective_forward_and_one_backward_of_the_size_computed(found):
    gloo_ranks.assert_passed(found, 3, "counted")


def test_no_collective_and_the_plain_layers_bits_where_nothing_is_shared(found):
    gloo_ranks.assert_passed(found, 3, "alone")


def test_a_single_sample_of_all_ranks_raises_on_all_of_them(found):
    for rank in range(3):
        message = str(found["single", rank])
        assert message.startswith("SyncedBatchNorm1d(3): a batch must hold more than one value"), message
        assert "those of all ranks together hold one" in message


def test_ranks_without_samples_are_fine_also_all_of_them(found):
    gloo_ranks.assert_passed(found, 3, "nothing")


def test_a_rank_with_infinity_moves_no_ranks_statistics(found):
    gloo_ranks.assert_passed(found, 3, "sick")


def test_second_gradients_equal_one_process(found):
    gloo_ranks.assert_passed(found, 3, "twice")


def test_commit_on_step_pools_the_batches_of_all_ranks(found):
    gloo_ranks.assert_passed(found, 3, "committed")


def test_accelerate_with_save_memory(found):
    gloo_ranks.assert_passed(found, 3, "memory")


def test_recalibration_needs_no_equal_numbers_of_batches(found):
    gloo_ranks.assert_passed(found, 3, "recalibrated")
