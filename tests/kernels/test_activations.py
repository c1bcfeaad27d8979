import pytest
import torch
import torch.nn.functional as F

from batchnorm.kernels.activations import TABLE, check_activation


@pytest.mark.parametrize("name", sorted(TABLE))
def test_value_is_torchs_and_derivative_is_its_gradient(name):
    z = torch.cat([torch.linspace(-8, 8, 1001), torch.tensor([-1e4, 1e4])]).double().requires_grad_()
    value = TABLE[name].value(z)
    if name != "identity":
        torch.testing.assert_close(value, getattr(F, name)(z), rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(value.sum(), z)
    torch.testing.assert_close(TABLE[name].derivative(z), gradient, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["elu", "gelu", "silu", "sigmoid", "tanh"])
def test_second_derivative_stays_finite_far_out(name):
    z = torch.tensor([-1e4, -90.0, 0.5, 90.0, 1e4]).requires_grad_()
    (second,) = torch.autograd.grad(TABLE[name].derivative(z).sum(), z)
    assert second.isfinite().all(), second


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=r"unknown activation 'rleu': use one of elu, gelu, .*tanh"):
        check_activation("rleu")
