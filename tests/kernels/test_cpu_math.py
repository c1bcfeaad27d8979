"""Vectorizable activations against float64 truth, over all of their range."""

import math

import numpy as np
import pytest
import torch

from batchnorm.kernels.activations import TABLE

numba = pytest.importorskip("numba")
cpu_math = pytest.importorskip("batchnorm.kernels.cpu_math")

ROUNDOFF = {np.float32: 2**-24, np.float64: 2**-53}
# In float64 the truth is no better than what is judged.
ROUNDINGS = {np.float32: 8, np.float64: 24}


def mapped(function, z):
    @numba.njit(error_model="numpy")
    def over(z):
        out = np.empty_like(z)
        for i in range(z.size):
            out[i] = function(z[i])
        return out

    return over(z)


def grid(dtype):
    near = np.linspace(-12, 12, 4001)
    far = np.array([-1e30, -1e4, -95.0, -88.5, -50.0, 50.0, 88.5, 95.0, 1e4, 1e30])
    tiny = np.concatenate([s * np.logspace(-30, -1, 60) for s in (1, -1)])
    return np.concatenate([near, far, tiny, [0.0, -0.0]]).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", sorted(TABLE))
def test_values_and_slopes_are_right_to_a_few_roundings(name, dtype):
    z = grid(dtype)
    exact = torch.from_numpy(z.astype(np.float64))
    for made, truth in (
        (cpu_math.VALUE[name], TABLE[name].value),
        (cpu_math.SLOPE[name], TABLE[name].derivative),
    ):
        got, expected = mapped(made, z).astype(np.float64), truth(exact).numpy()
        # Relative to the value, or to 1 where values near 1 cancel (as in 1 − tanh²).
        scale = np.maximum(np.abs(expected), np.minimum(1.0, np.abs(z.astype(np.float64))) + 1e-3)
        assert np.max(np.abs(got - expected) / scale) < ROUNDINGS[dtype] * ROUNDOFF[dtype]


@pytest.mark.parametrize("name", ["elu", "gelu", "silu", "tanh"])
def test_near_zero_every_digit_of_the_value_counts(name):
    z = np.concatenate([s * np.logspace(-20, -1, 200) for s in (1, -1)]).astype(np.float32)
    truth = TABLE[name].value(torch.from_numpy(z.astype(np.float64))).numpy()
    got = mapped(cpu_math.VALUE[name], z)
    assert np.max(np.abs(got / truth - 1)) < 6 * ROUNDOFF[np.float32]


def test_the_lower_tail_of_the_normal_distribution_is_relatively_exact():
    z = np.linspace(-12.5, 0, 3001).astype(np.float32)
    truth = np.array([0.5 * math.erfc(-float(v) / math.sqrt(2)) for v in z])
    # exp(−z²/2) multiplies the rounding of z²/2 by its size.
    allowed = ROUNDOFF[np.float32] * (8 + 2 * z.astype(np.float64) ** 2)
    assert np.all(np.abs(mapped(cpu_math._lower_tail_float32, z) / truth - 1) < allowed)


@pytest.mark.parametrize("name", sorted(set(TABLE)))
def test_nan_goes_through(name):
    nan = np.array([np.nan], dtype=np.float32)
    assert np.isnan(mapped(cpu_math.VALUE[name], nan)).all()
