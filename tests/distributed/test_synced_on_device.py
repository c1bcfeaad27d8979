"""On a device no one waits for a value: with fake tensors of a GPU, reading one is an error."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from batchnorm.distributed import collectives, operators
from batchnorm.kernels import use


@pytest.fixture
def two_fake_ranks(monkeypatch):
    """Collectives that exchange nothing, between two ranks that are not there."""
    monkeypatch.setattr(collectives, "group_named", lambda name: None)
    monkeypatch.setattr(collectives.dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(collectives, "run", lambda call, group, start: None)
    with FakeTensorMode() as mode:
        yield mode


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "mask"])
def test_forward_and_backward_read_no_value_on_the_host(masked, two_fake_ranks):
    x = torch.empty(4, 3, 5, device="cuda")
    gamma, beta = torch.empty(2, 3, device="cuda").unbind()
    mask = torch.empty(4, 5, device="cuda", dtype=torch.bool) if masked else None
    with pytest.raises(DataDependentOutputException):
        x.sum().item()
    with use("reference"):
        given = (x, gamma, beta, x.clone(), mask)
        y, mean, var, count = operators.normalize._init_fn(*given, 1e-5, "silu", "", "")
        given = (y, x, None, gamma, beta, x.clone(), mask, mean, var, count)
        dx, dgamma, _, dz = operators.normalize_backward._init_fn(*given, 1e-5, "silu", "", "")
    assert all(t.device.type == "cuda" for t in (y, mean, var, count, dx, dgamma, dz))
    assert count.dtype == torch.int64
