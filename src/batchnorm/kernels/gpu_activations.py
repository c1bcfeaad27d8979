"""The activations of `kernels/activations.py` for Triton: values, and gradients carried through.

Written with operations that the compiler and the interpreter share, accurate in float32 and
float64. Constants always meet a tensor, from which they take their precision.
"""

import triton
import triton.language as tl

from batchnorm.kernels import activations

LEAKY_SLOPE = tl.constexpr(activations.LEAKY_SLOPE)
ELU_ALPHA = tl.constexpr(activations.ELU_ALPHA)
SQRT_HALF = tl.constexpr(0.5**0.5)
NORMAL_PEAK = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2π)

KNOWN = ("identity", "relu", "leaky_relu", "elu", "gelu", "silu", "sigmoid", "tanh", "hardswish")


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """The activation's value at ``z``; NaN stays NaN."""
    if ACTIVATION == "relu":
        z = tl.where(z <= 0, 0.0, z)
    elif ACTIVATION == "leaky_relu":
        z = tl.where(z > 0, z, z * LEAKY_SLOPE)
    elif ACTIVATION == "elu":
        half = tanh(tl.where(z > 0, 0.0, z) * 0.5)
        # exp(z) − 1 = 2t / (1 − t) with t = tanh(z/2), which keeps its digits near zero.
        z = tl.where(z > 0, z, 2.0 * half / (1.0 - half) * ELU_ALPHA)
    elif ACTIVATION == "gelu":
        z = 0.5 * z * (1.0 + tl.erf(z * SQRT_HALF))
    elif ACTIVATION == "silu":
        z = z * sigmoid(z)
    elif ACTIVATION == "sigmoid":
        z = sigmoid(z)
    elif ACTIVATION == "tanh":
        z = tanh(z)
    elif ACTIVATION == "hardswish":
        z = z * tl.minimum(tl.maximum(z + 3.0, 0.0), 6.0) / 6.0
    return z


@triton.jit
def chain(dy, z, ACTIVATION: tl.constexpr):
    """The gradient in ``z`` of a loss whose gradient in the activation's value is ``dy``.

    For the activations of `contract.SIGN_IS_ENOUGH`, ``z`` may be the activation's value.
    """
    if ACTIVATION == "relu":
        dy = tl.where(z > 0, dy, 0.0)
    elif ACTIVATION == "leaky_relu":
        dy = tl.where(z > 0, dy, dy * LEAKY_SLOPE)
    elif ACTIVATION == "elu":
        dy = tl.where(z > 0, dy, dy * (tl.exp(tl.where(z > 0, 0.0, z)) * ELU_ALPHA))
    elif ACTIVATION == "gelu":
        share = 0.5 * (1.0 + tl.erf(z * SQRT_HALF))
        dy = dy * (share + z * (tl.exp(-0.5 * z * z) * NORMAL_PEAK))
    elif ACTIVATION == "silu":
        dy = dy * (sigmoid(z) * (1.0 + z * sigmoid(-z)))
    elif ACTIVATION == "sigmoid":
        # 1 − sigmoid(z) without losing its digits where sigmoid(z) is near one.
        dy = dy * (sigmoid(z) * sigmoid(-z))
    elif ACTIVATION == "tanh":
        # 1 − tanh² = 4 s(2z) s(−2z), which keeps its digits where tanh is near one.
        dy = dy * (4.0 * sigmoid(2.0 * z) * sigmoid(-2.0 * z))
    elif ACTIVATION == "hardswish":
        middle = tl.where(z < 3, dy * (z / 3.0 + 0.5), dy)
        dy = tl.where(z > -3, middle, 0.0)
    return dy


@triton.jit
def sigmoid(z):
    """1 / (1 + exp(−z)), with no exponential that could overflow."""
    decay = tl.exp(-tl.abs(z))
    return tl.where(z < 0, decay, 1.0) / (1.0 + decay)


@triton.jit
def tanh(z):
    """The hyperbolic tangent: Lambert's continued fraction near zero, exponentials elsewhere."""
    size = tl.abs(z)
    square = tl.minimum(z * z, 0.25)
    above = 135135.0 + square * (17325.0 + square * (378.0 + square))
    below = 135135.0 + square * (62370.0 + square * (3150.0 + square * 28.0))
    decay = tl.exp(-2.0 * size)
    size = tl.where(size < 0.5, size * above / below, (1.0 - decay) / (1.0 + decay))
    return tl.where(z < 0, -size, size)
