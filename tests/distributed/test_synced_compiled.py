"""`torch.compile` in one graph, collectives included; and what the operators promise."""

import socket

import gloo_ranks
import pytest
import torch
import torch.distributed as dist
from torch.library import opcheck

from batchnorm.distributed import operators

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")


@pytest.fixture(scope="module")
def found():
    return gloo_ranks.run("synced_compiled", 2)


def test_one_graph_equals_eager_with_the_same_collectives(found):
    gloo_ranks.assert_passed(found, 2, "compiled")


def test_evaluation_compiles_without_collectives(found):
    gloo_ranks.assert_passed(found, 2, "evaluated")


def test_sums_over_ranks_keep_their_contract(one_rank):
    opcheck(torch.ops.batchnorm.sum_over_ranks.default, (torch.randn(3, requires_grad=True), "", "here"))


@pytest.fixture
def one_rank():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


CASES = {
    "plain": {},
    "features only": {"shape": (6, 3)},
    "mask": {"mask": True},
    "residual": {"residual": True},
    "not affine": {"affine": False},
    "channels last": {"channels_last": True, "residual": True},
    "bfloat16": {"dtype": torch.bfloat16},
    "empty": {"shape": (0, 3, 4)},
}


def arguments(
    shape=(4, 3, 5), *, mask=False, residual=False, affine=True, channels_last=False, dtype=torch.float32
):
    x = torch.randn(*shape, 2) if channels_last else torch.randn(shape)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    x = x.to(dtype).requires_grad_()
    gamma, beta = torch.rand(3).requires_grad_(), torch.randn(3).requires_grad_()
    if not affine:
        gamma = beta = None
    extra = torch.randn_like(x, requires_grad=True) if residual else None
    shown = torch.rand(x.shape[:1] + x.shape[2:]) > 0.3 if mask else None
    return x, gamma, beta, extra, shown, 1e-5, "silu", "", "here"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_normalize_keeps_its_contract(case, one_rank):
    opcheck(torch.ops.batchnorm.synced_normalize.default, arguments(**case))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_normalize_backward_keeps_its_contract(case, one_rank):
    x, gamma, beta, residual, mask, *settings = arguments(**case)
    y, mean, var, count = operators.normalize(x, gamma, beta, residual, mask, *settings)
    dy = torch.randn_like(y).requires_grad_()
    inputs = (dy, x, None, gamma, beta, residual, mask, mean, var, count, *settings)
    opcheck(torch.ops.batchnorm.synced_normalize_backward.default, inputs)
