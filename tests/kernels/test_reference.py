"""The reference against the paper's equations carried out by hand, and against autograd."""

import pytest
import torch

from batchnorm.kernels import reference
from batchnorm.moments import Moments


def test_algorithm_1_by_hand():
    x = torch.tensor([[1.0], [2.0], [6.0]], dtype=torch.float64)
    gamma, beta, eps = torch.tensor([2.0]).double(), torch.tensor([-1.0]).double(), 0.5
    y, moments = reference.forward(x, gamma, beta, None, None, eps, "identity")
    # mean 3, deviations −2 −1 3, biased variance 14/3
    assert moments.mean.item() == 3
    assert moments.var.item() == pytest.approx(14 / 3, rel=1e-15)
    scale = 2 / (14 / 3 + 0.5) ** 0.5
    assert y.flatten().tolist() == pytest.approx([-2 * scale - 1, -scale - 1, 3 * scale - 1], rel=1e-14)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize(
    "activation", ["identity", "relu", "leaky_relu", "elu", "gelu", "silu", "sigmoid", "tanh"]
)
def test_backward_is_the_gradient_of_forward(activation, masked):
    x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    gamma = torch.rand(3, dtype=torch.float64, requires_grad=True)
    beta = torch.randn(3, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(4, 5) > 0.3 if masked else None
    y, moments = reference.forward(x, gamma, beta, residual, mask, 1e-3, activation)
    dy = torch.randn_like(y)
    expected = torch.autograd.grad(y, (x, gamma, beta, residual), dy)
    with torch.no_grad():
        found = reference.backward(dy, x, None, gamma, beta, residual, mask, moments, 1e-3, activation)
    for name, f, e in zip(("x", "gamma", "beta", "residual"), found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-11, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


def test_gradient_of_each_channel_is_orthogonal_to_ones_and_to_x_hat():
    # Adding a constant to a channel, or scaling it (eps = 0), does not change y: so no gradient that way.
    x = torch.randn(6, 3, 4, dtype=torch.float64) * 3 + 1
    y, moments = reference.forward(x, None, None, None, None, 0.0, "identity")
    dx, _, _, _ = reference.backward(
        torch.randn_like(y), x, None, None, None, None, None, moments, 0.0, "identity"
    )
    assert dx.sum((0, 2)).abs().max() < 1e-13
    assert (dx * y).sum((0, 2)).abs().max() < 1e-13


def test_gamma_sqrt_var_and_beta_mean_are_the_identity():
    x = torch.randn(8, 3, dtype=torch.float64) * 4 - 2
    moments = Moments.of(x)
    y, _ = reference.forward(x, (moments.var + 1e-5).sqrt(), moments.mean, None, None, 1e-5, "identity")
    torch.testing.assert_close(y, x, rtol=1e-13, atol=1e-13)
