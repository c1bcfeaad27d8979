"""Activations and their slopes for one number, in forms that compilers turn into vector code.

LLVM has no vector exponential of its own, so for float32 nothing here calls a library. For
float64, where exactness matters more than speed, the C library is called. NaN goes through.
"""

import math
from typing import Any

from numba import float32, int32
from numba.extending import overload, register_jitable

from batchnorm.kernels.activations import LEAKY_SLOPE
from batchnorm.kernels.cpu_memory import as_bits

_inline = register_jitable(error_model="numpy", fastmath={"contract"}, forceinline=True)

_LN2_HIGH, _LN2_LOW = float32(0.693359375), float32(-2.12194440e-4)  # the first has 9 bits: n·it is exact
_LOG2_E = float32(1 / math.log(2))
_ROUNDER = float32(1.5 * 2**23)  # a sum with it is rounded to an integer, held in its low bits
_ROUNDER_BITS = int32(0x4B400000)
_TAIL_SLOPE = float32(0.3)
_INV_SQRT_2 = math.sqrt(0.5)
_INV_SQRT_TAU = 1 / math.sqrt(2 * math.pi)


@_inline
def _powers_float32(v):
    """2ⁿ and exp(r) − 1, where exp(v) = 2ⁿ·exp(r)."""
    # For |r| ≤ ln2/2 the seventh power of Taylor leaves 5e-9.
    v = float32(-87.0) if v < float32(-87.0) else v
    v = float32(88.0) if v > float32(88.0) else v
    shifted = v * _LOG2_E + _ROUNDER
    n = shifted - _ROUNDER
    r = (v - n * _LN2_HIGH) - n * _LN2_LOW
    p = float32(1 / 5040)
    p = p * r + float32(1 / 720)
    p = p * r + float32(1 / 120)
    p = p * r + float32(1 / 24)
    p = p * r + float32(1 / 6)
    p = p * r + float32(1 / 2)
    p = r + r * r * p
    power = as_bits(int32((as_bits(shifted) - _ROUNDER_BITS + int32(127)) << int32(23)))
    return power, p


@_inline
def _exp_float32(v):
    power, p = _powers_float32(v)
    return power + power * p


@_inline
def _expm1_float32(v):
    power, p = _powers_float32(v)
    return power * p + (power - float32(1.0))


@_inline
def _lower_tail_float32(v):
    # exp(−v²/2)·t·P(t) with t = 1/(1 + 0.3·|v|): P is a least-maximum fit on |v| ≤ 14, relative error 4e-9.
    t = float32(1.0) / (float32(1.0) - _TAIL_SLOPE * v)
    p = float32(-0.020612881)
    p = p * t + float32(0.112376061)
    p = p * t + float32(-0.228068185)
    p = p * t + float32(0.191582595)
    p = p * t + float32(-0.0792480914)
    p = p * t + float32(0.0960582329)
    p = p * t + float32(0.0784254406)
    p = p * t + float32(0.110227354)
    p = p * t + float32(0.119572838)
    p = p * t + float32(0.119686634)
    return t * p * _exp_float32(float32(-0.5) * v * v)


def _exp(v):
    return math.exp(v)


def _expm1(v):
    return math.expm1(v)


def _lower_tail(v):
    """The normal distribution's Φ(v) for v ≤ 0, relatively exact far out."""
    return 0.5 * math.erfc(-v * _INV_SQRT_2)


@overload(_exp, jit_options={"error_model": "numpy"})
def _(v):
    return (lambda v: _exp_float32(v)) if v == float32 else (lambda v: math.exp(v))


@overload(_expm1, jit_options={"error_model": "numpy"})
def _(v):
    return (lambda v: _expm1_float32(v)) if v == float32 else (lambda v: math.expm1(v))


@overload(_lower_tail, jit_options={"error_model": "numpy"})
def _(v):
    if v == float32:
        return lambda v: _lower_tail_float32(v)
    return lambda v: 0.5 * math.erfc(-v * _INV_SQRT_2)


# Constants take the type of z (`type(z)` of one of these is float32 or float64), so that nothing widens.


@_inline
def _identity(z):
    return z


@_inline
def _one(z):
    return type(z)(1.0)


@_inline
def _relu(z):
    return type(z)(0.0) if z <= type(z)(0.0) else z


@_inline
def _relu_slope(z):
    return type(z)(1.0) if z > type(z)(0.0) else type(z)(0.0)


@_inline
def _leaky_relu(z):
    return z if z > type(z)(0.0) else type(z)(LEAKY_SLOPE) * z


@_inline
def _leaky_relu_slope(z):
    return type(z)(1.0) if z > type(z)(0.0) else type(z)(LEAKY_SLOPE)


@_inline
def _elu(z):
    return z if z > type(z)(0.0) else _expm1(z)


@_inline
def _elu_slope(z):
    return type(z)(1.0) if z > type(z)(0.0) else _exp(z)


@_inline
def _phi(z):
    tail = _lower_tail(-abs(z))
    return type(z)(1.0) - tail if z > type(z)(0.0) else tail


@_inline
def _gelu(z):
    return z * _phi(z)


@_inline
def _gelu_slope(z):
    density = _exp(type(z)(-0.5) * z * z) * type(z)(_INV_SQRT_TAU)
    return _phi(z) + z * density


@_inline
def _sigmoid(z):
    return type(z)(1.0) / (type(z)(1.0) + _exp(-z))


@_inline
def _sigmoid_slope(z):
    # From −|z|, where nothing overflows: the slope is even.
    e = _exp(-abs(z))
    return e / ((type(z)(1.0) + e) * (type(z)(1.0) + e))


@_inline
def _silu(z):
    return z * _sigmoid(z)


@_inline
def _silu_slope(z):
    # The gate and what it lacks to 1, each to its own digits: 1 − gate would be left with none.
    e = _exp(-abs(z))
    most = type(z)(1.0) / (type(z)(1.0) + e)
    least = e * most
    return most * (type(z)(1.0) + z * least) if z > type(z)(0.0) else least * (type(z)(1.0) + z * most)


@_inline
def _tanh(z):
    e = _expm1(type(z)(-2.0) * abs(z))
    size = -e / (e + type(z)(2.0))
    return size if z > type(z)(0.0) else -size


@_inline
def _tanh_slope(z):
    value = _tanh(z)
    return type(z)(1.0) - value * value


@_inline
def _hardswish(z):
    gate = z * type(z)(1 / 6) + type(z)(0.5)
    gate = type(z)(0.0) if gate < type(z)(0.0) else gate
    return z * (type(z)(1.0) if gate > type(z)(1.0) else gate)


@_inline
def _hardswish_slope(z):
    middle = z * type(z)(1 / 3) + type(z)(0.5) if z < type(z)(3.0) else type(z)(1.0)
    return middle if z > type(z)(-3.0) else type(z)(0.0)


VALUE: dict[str, Any] = {
    "identity": _identity,
    "relu": _relu,
    "leaky_relu": _leaky_relu,
    "elu": _elu,
    "gelu": _gelu,
    "silu": _silu,
    "sigmoid": _sigmoid,
    "tanh": _tanh,
    "hardswish": _hardswish,
}
"""Activations by name."""

SLOPE: dict[str, Any] = {
    "identity": _one,
    "relu": _relu_slope,
    "leaky_relu": _leaky_relu_slope,
    "elu": _elu_slope,
    "gelu": _gelu_slope,
    "silu": _silu_slope,
    "sigmoid": _sigmoid_slope,
    "tanh": _tanh_slope,
    "hardswish": _hardswish_slope,
}
"""Their derivatives."""
