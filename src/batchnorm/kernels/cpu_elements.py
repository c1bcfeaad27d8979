"""What is done to one element, forward and backward, put together for one kind of numbers."""

from typing import Any

from numba import float32, uint8, uint16
from numba.extending import register_jitable

from batchnorm.kernels.contract import SIGN_IS_ENOUGH
from batchnorm.kernels.cpu_math import SLOPE, VALUE
from batchnorm.kernels.cpu_memory import load, narrow, widen

inline = register_jitable(error_model="numpy", fastmath={"contract"}, forceinline=True)
"""Compile into the caller; products and sums may fuse, nothing else may be rearranged."""


def widened(kind: Any) -> Any:
    """The type that numbers stored as ``kind`` are computed in (uint16 holds the bits of bfloat16)."""
    return float32 if kind == uint16 else kind


def deviation_of(kind: Any) -> Any:
    """The function giving the distance of element ``i`` from a centre."""

    @inline
    def deviation(x, i, centre):
        # Here, where sums may not be rearranged: (total − centre) + x would lose what x − centre keeps.
        return widen(load(x, i, kind)) - centre

    return deviation


def transform_of(kind: Any, activation: str, has_residual: bool, has_mask: bool) -> Any:
    """The function giving element ``i`` of y, as stored."""
    wide, value = widened(kind), VALUE[activation]

    @inline
    def transform(x, residual, mask, i, mean, scale, shift):
        # Never x·scale + (shift − mean·scale): those two cancel where |mean| >> std.
        z = (widen(load(x, i, kind)) - mean) * scale + shift
        if has_residual:
            z = z + widen(load(residual, i, kind))
        y = value(z)
        if has_mask:
            y = y if load(mask, i, uint8) != 0 else wide(0)
        return narrow(y, kind)

    return transform


def gradient_of(kind: Any, activation: str, has_residual: bool, has_mask: bool) -> Any:
    """The function giving ∂z of element ``i``, z being the value before the activation, and x − mean.

    With a residual, ``extra`` is y where its sign is enough to know the slope, else the residual.
    """
    wide, slope = widened(kind), SLOPE[activation]
    from_y = has_residual and activation in SIGN_IS_ENOUGH

    @inline
    def gradient(dy, x, extra, mask, i, mean, scale, shift):
        deviation = widen(load(x, i, kind)) - mean
        if from_y:
            z = widen(load(extra, i, kind))
        elif has_residual:
            z = deviation * scale + shift + widen(load(extra, i, kind))
        else:
            z = deviation * scale + shift
        dz = widen(load(dy, i, kind)) * slope(z)
        if has_mask:
            shown = load(mask, i, uint8) != 0
            return (dz if shown else wide(0)), (deviation if shown else wide(0))
        return dz, deviation

    return gradient
