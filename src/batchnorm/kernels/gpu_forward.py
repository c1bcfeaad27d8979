"""Triton kernels of the forward pass: moments in one or two stages, then the transform.

A tensor whose channels are short goes through `reduce_forward` alone, which reads it from
memory once. A long one goes through `reduce_forward` (moments of each split), `merge_forward`
(of each channel, always in the same order) and `normalize`. Arguments: see `gpu.py`.
"""

import triton
import triton.language as tl

from batchnorm.kernels.gpu_activations import activate
from batchnorm.kernels.gpu_tiles import COUNTS, last_first, locate, moments_of_tiles, share_of, spread


@triton.jit
def scale_and_shift(gamma_ptr, beta_ptr, var, c, C, EPS: tl.constexpr, COMPUTE: tl.constexpr):
    """γ / sqrt(var + eps), and β."""
    scale = 1.0 / tl.sqrt(var + EPS)
    shift = tl.zeros_like(var)
    if gamma_ptr is not None:
        scale *= tl.load(gamma_ptr + c, mask=c < C, other=0.0).to(COMPUTE)
    if beta_ptr is not None:
        shift = tl.load(beta_ptr + c, mask=c < C, other=0.0).to(COMPUTE)
    return scale, shift


@triton.jit
def before_activation(deviation, scale, shift, residual_ptr, offsets, keep, COMPUTE: tl.constexpr):
    """The value z that the activation takes, from x − mean; the same in forward and backward."""
    z = deviation * spread(scale) + spread(shift)
    if residual_ptr is not None:
        z += tl.load(residual_ptr + offsets, mask=keep, other=0.0).to(COMPUTE)
    return z


@triton.jit
def transform_tiles(
    x_ptr,
    residual_ptr,
    mask_ptr,
    gamma_ptr,
    beta_ptr,
    y_ptr,
    mean,
    var,
    c,
    first,
    last,
    N,
    C,
    S,
    tiles_s,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    INDEX: tl.constexpr,
    COMPUTE: tl.constexpr,
    EPS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Write y for some tiles; zeros where the mask hides a sample."""
    scale, shift = scale_and_shift(gamma_ptr, beta_ptr, var, c, C, EPS, COMPUTE)
    for tile in range(first, last):
        offsets, inside, samples = locate(tile, c, mask_ptr, N, C, S, tiles_s, BLOCK_N, BLOCK_S, INDEX)
        keep = inside & samples
        # The deviation first: x·scale − mean·scale would lose what mean ≫ deviation leaves.
        deviation = tl.load(x_ptr + offsets, mask=keep, other=0.0).to(COMPUTE) - spread(mean)
        z = before_activation(deviation, scale, shift, residual_ptr, offsets, keep, COMPUTE)
        y = tl.where(samples, activate(z, ACTIVATION), 0.0)
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def reduce_forward(
    x_ptr,
    residual_ptr,
    mask_ptr,
    gamma_ptr,
    beta_ptr,
    y_ptr,
    mean_ptr,
    var_ptr,
    partial_ptr,
    N,
    C,
    runs,
    tiles_s,
    num_tiles,
    tiles_per_split,
    ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    INDEX: tl.constexpr,
    COMPUTE: tl.constexpr,
    EPS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Moments of this program's tiles; without ``partial_ptr`` they are final, and y follows."""
    S = runs * ALIGN
    c, split, first, last = share_of(tl.program_id(0), C, num_tiles, tiles_per_split, BLOCK_C)
    count, mean, squares = moments_of_tiles(
        x_ptr, mask_ptr, c, first, last, N, C, S, tiles_s, BLOCK_N, BLOCK_C, BLOCK_S, INDEX, COMPUTE
    )
    if partial_ptr is not None:
        row_ptr = partial_ptr + split * 3 * C + c
        tl.store(row_ptr, count, mask=c < C)
        tl.store(row_ptr + C, mean, mask=c < C)
        tl.store(row_ptr + 2 * C, squares, mask=c < C)
    else:
        var = squares / tl.maximum(count, 1.0)
        tl.store(mean_ptr + c, mean, mask=c < C)
        tl.store(var_ptr + c, var, mask=c < C)
        transform_tiles(
            x_ptr,
            residual_ptr,
            mask_ptr,
            gamma_ptr,
            beta_ptr,
            y_ptr,
            mean,
            var,
            c,
            first,
            last,
            N,
            C,
            S,
            tiles_s,
            BLOCK_N,
            BLOCK_S,
            INDEX,
            COMPUTE,
            EPS,
            ACTIVATION,
        )


@triton.jit(do_not_specialize=["num_splits"])
def merge_forward(
    partial_ptr, mean_ptr, var_ptr, C, num_splits, SPLITS: tl.constexpr, CHANNELS: tl.constexpr
):
    """Chan's law for all splits of a channel at once: around the mean of the means."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    split = tl.arange(0, SPLITS)[:, None]
    inside = (split < num_splits) & (c < C)[None, :]
    row_ptr = partial_ptr + split * 3 * C + c[None, :]
    count = tl.load(row_ptr, mask=inside, other=0.0)
    means = tl.load(row_ptr + C, mask=inside, other=0.0)
    squares = tl.load(row_ptr + 2 * C, mask=inside, other=0.0)

    divisor = tl.maximum(tl.sum(count, axis=0), 1.0)
    mean = tl.sum(means * count, axis=0) / divisor
    # The weighted mean is rounded at the size of the mean, its correction at that of the gaps.
    mean += tl.sum((means - mean[None, :]) * count, axis=0) / divisor
    gap = means - mean[None, :]
    var = tl.sum(squares + gap * gap * count, axis=0) / divisor
    tl.store(mean_ptr + c, mean, mask=c < C)
    tl.store(var_ptr + c, var, mask=c < C)


@triton.jit(do_not_specialize=COUNTS)
def normalize(
    x_ptr,
    residual_ptr,
    mask_ptr,
    gamma_ptr,
    beta_ptr,
    y_ptr,
    mean_ptr,
    var_ptr,
    N,
    C,
    runs,
    tiles_s,
    num_tiles,
    tiles_per_split,
    ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    INDEX: tl.constexpr,
    COMPUTE: tl.constexpr,
    EPS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """The transform by moments in memory: the last stage of training, or all of evaluation."""
    c, _, first, last = share_of(last_first(), C, num_tiles, tiles_per_split, BLOCK_C)
    mean = tl.load(mean_ptr + c, mask=c < C, other=0.0).to(COMPUTE)
    var = tl.load(var_ptr + c, mask=c < C, other=0.0).to(COMPUTE)
    transform_tiles(
        x_ptr,
        residual_ptr,
        mask_ptr,
        gamma_ptr,
        beta_ptr,
        y_ptr,
        mean,
        var,
        c,
        first,
        last,
        N,
        C,
        runs * ALIGN,
        tiles_s,
        BLOCK_N,
        BLOCK_S,
        INDEX,
        COMPUTE,
        EPS,
        ACTIVATION,
    )
