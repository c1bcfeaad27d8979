"""Triton kernels of the backward pass: two sums for each channel, then ∂x.

With dz the gradient before the activation and d = x − mean, ∂β = Σ dz, ∂γ = Σ dz·d / std and

    ∂x = γ / std · (dz − ∂β/m − d/std · ∂γ/m)

(Ioffe & Szegedy (2015), section 3, with ∂σ² and ∂μ put in). What comes before the activation
is computed again from x, so that nothing but x, and with a residual y or the residual, has
to be kept. Short channels need `reduce_backward` alone; long ones `merge_backward` and
`input_gradient` too. Arguments: see `gpu.py`.
"""

import triton
import triton.language as tl

from batchnorm.kernels.gpu_activations import chain
from batchnorm.kernels.gpu_forward import before_activation, scale_and_shift
from batchnorm.kernels.gpu_tiles import COUNTS, last_first, locate, share_of, spread, total


@triton.jit
def before_activation_gradient(
    dy_ptr,
    y_ptr,
    residual_ptr,
    deviation,
    scale,
    shift,
    offsets,
    keep,
    ACTIVATION: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """dz of a tile; zeros where ``keep`` is false."""
    dz = tl.load(dy_ptr + offsets, mask=keep, other=0.0).to(COMPUTE)
    if ACTIVATION != "identity":
        if y_ptr is not None:
            z = tl.load(y_ptr + offsets, mask=keep, other=0.0).to(COMPUTE)
        else:
            z = before_activation(deviation, scale, shift, residual_ptr, offsets, keep, COMPUTE)
        dz = tl.where(keep, chain(dz, z, ACTIVATION), 0.0)
    return dz


@triton.jit
def write_input_gradient(
    dx_ptr, dz, deviation, scale, inv_std, dgamma, dbeta, num_samples, offsets, inside, samples
):
    """∂x of a tile, given both sums of its channels."""
    from_mean = dbeta / num_samples
    from_std = dgamma * inv_std / num_samples
    dx = spread(scale) * (dz - spread(from_mean) - deviation * spread(from_std))
    dx = tl.where(samples, dx, 0.0)
    tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def count_samples(count_ptr, N, S, COMPUTE: tl.constexpr):
    """Samples of each channel: the mask's count, which never leaves the device, or N·S."""
    if count_ptr is not None:
        num_samples = tl.maximum(tl.load(count_ptr), 1)
    else:
        num_samples = tl.cast(N, tl.int64) * S
    return num_samples.to(COMPUTE)


@triton.jit(do_not_specialize=COUNTS)
def reduce_backward(
    dy_ptr,
    x_ptr,
    y_ptr,
    residual_ptr,
    mask_ptr,
    count_ptr,
    gamma_ptr,
    beta_ptr,
    mean_ptr,
    var_ptr,
    dx_ptr,
    dz_ptr,
    dgamma_ptr,
    dbeta_ptr,
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
    GIVEN: tl.constexpr,
):
    """Σ dz and Σ dz·(x − mean) of this program's tiles.

    Writes dz where ``dz_ptr`` is given. By ``GIVEN`` statistics ∂x needs no sum and is written
    on the way. Without ``partial_ptr`` the sums are final: ∂γ, ∂β and ∂x follow.
    """
    S = runs * ALIGN
    c, split, first, last = share_of(tl.program_id(0), C, num_tiles, tiles_per_split, BLOCK_C)
    mean = tl.load(mean_ptr + c, mask=c < C, other=0.0).to(COMPUTE)
    var = tl.load(var_ptr + c, mask=c < C, other=0.0).to(COMPUTE)
    scale, shift = scale_and_shift(gamma_ptr, beta_ptr, var, c, C, EPS, COMPUTE)

    # Sums are linear: each thread keeps its own until the last tile, and only then do they meet.
    sum_dz = tl.zeros([BLOCK_N, BLOCK_C, BLOCK_S], COMPUTE)
    sum_dz_deviation = tl.zeros([BLOCK_N, BLOCK_C, BLOCK_S], COMPUTE)
    for tile in range(first, last):
        offsets, inside, samples = locate(tile, c, mask_ptr, N, C, S, tiles_s, BLOCK_N, BLOCK_S, INDEX)
        keep = inside & samples
        deviation = tl.load(x_ptr + offsets, mask=keep, other=0.0).to(COMPUTE) - spread(mean)
        dz = before_activation_gradient(
            dy_ptr, y_ptr, residual_ptr, deviation, scale, shift, offsets, keep, ACTIVATION, COMPUTE
        )
        sum_dz += dz
        sum_dz_deviation += dz * deviation
        if dz_ptr is not None:
            tl.store(dz_ptr + offsets, dz.to(dz_ptr.dtype.element_ty), mask=inside)
        if GIVEN:
            tl.store(dx_ptr + offsets, (dz * spread(scale)).to(dx_ptr.dtype.element_ty), mask=inside)

    dbeta, dgamma_std = total(sum_dz), total(sum_dz_deviation)
    if partial_ptr is not None:
        row_ptr = partial_ptr + split * 2 * C + c
        tl.store(row_ptr, dbeta, mask=c < C)
        tl.store(row_ptr + C, dgamma_std, mask=c < C)
    else:
        inv_std = 1.0 / tl.sqrt(var + EPS)
        dgamma = dgamma_std * inv_std
        tl.store(dgamma_ptr + c, dgamma, mask=c < C)
        tl.store(dbeta_ptr + c, dbeta, mask=c < C)
        if not GIVEN:
            num_samples = count_samples(count_ptr, N, S, COMPUTE)
            for tile in range(first, last):
                offsets, inside, samples = locate(
                    tile, c, mask_ptr, N, C, S, tiles_s, BLOCK_N, BLOCK_S, INDEX
                )
                keep = inside & samples
                deviation = tl.load(x_ptr + offsets, mask=keep, other=0.0).to(COMPUTE) - spread(mean)
                dz = before_activation_gradient(
                    dy_ptr, y_ptr, residual_ptr, deviation, scale, shift, offsets, keep, ACTIVATION, COMPUTE
                )
                write_input_gradient(
                    dx_ptr,
                    dz,
                    deviation,
                    scale,
                    inv_std,
                    dgamma,
                    dbeta,
                    num_samples,
                    offsets,
                    inside,
                    samples,
                )


@triton.jit(do_not_specialize=["num_splits"])
def merge_backward(
    partial_ptr,
    var_ptr,
    dgamma_ptr,
    dbeta_ptr,
    C,
    num_splits,
    EPS: tl.constexpr,
    SPLITS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """∂γ and ∂β from the sums of all splits."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    split = tl.arange(0, SPLITS)[:, None]
    inside = (split < num_splits) & (c < C)[None, :]
    row_ptr = partial_ptr + split * 2 * C + c[None, :]
    dbeta = tl.sum(tl.load(row_ptr, mask=inside, other=0.0), axis=0)
    dgamma_std = tl.sum(tl.load(row_ptr + C, mask=inside, other=0.0), axis=0)
    var = tl.load(var_ptr + c, mask=c < C, other=0.0).to(dbeta.dtype)
    tl.store(dgamma_ptr + c, dgamma_std / tl.sqrt(var + EPS), mask=c < C)
    tl.store(dbeta_ptr + c, dbeta, mask=c < C)


@triton.jit(do_not_specialize=COUNTS)
def input_gradient(
    dy_ptr,
    x_ptr,
    y_ptr,
    residual_ptr,
    mask_ptr,
    count_ptr,
    gamma_ptr,
    beta_ptr,
    mean_ptr,
    var_ptr,
    dx_ptr,
    dgamma_ptr,
    dbeta_ptr,
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
    """∂x by the sums in memory: the last stage of the backward pass of long channels."""
    S = runs * ALIGN
    c, _, first, last = share_of(last_first(), C, num_tiles, tiles_per_split, BLOCK_C)
    mean = tl.load(mean_ptr + c, mask=c < C, other=0.0).to(COMPUTE)
    var = tl.load(var_ptr + c, mask=c < C, other=0.0).to(COMPUTE)
    dgamma = tl.load(dgamma_ptr + c, mask=c < C, other=0.0)
    dbeta = tl.load(dbeta_ptr + c, mask=c < C, other=0.0)
    scale, shift = scale_and_shift(gamma_ptr, beta_ptr, var, c, C, EPS, COMPUTE)
    inv_std = 1.0 / tl.sqrt(var + EPS)
    num_samples = count_samples(count_ptr, N, S, COMPUTE)
    for tile in range(first, last):
        offsets, inside, samples = locate(tile, c, mask_ptr, N, C, S, tiles_s, BLOCK_N, BLOCK_S, INDEX)
        keep = inside & samples
        deviation = tl.load(x_ptr + offsets, mask=keep, other=0.0).to(COMPUTE) - spread(mean)
        dz = before_activation_gradient(
            dy_ptr, y_ptr, residual_ptr, deviation, scale, shift, offsets, keep, ACTIVATION, COMPUTE
        )
        write_input_gradient(
            dx_ptr, dz, deviation, scale, inv_std, dgamma, dbeta, num_samples, offsets, inside, samples
        )
