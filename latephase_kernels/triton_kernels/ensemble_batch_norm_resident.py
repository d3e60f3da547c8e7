"""The on-chip tier of ensemble batch norm in Triton: a program reads its groups once, and keeps them in registers.

Shapes: K members, B rows a member, C channels, S = product of the spatial sizes, n = B·S values a statistic.
A program has one member's channel, or in rows of channels a block of them, and all n values of each.
"""

import triton
import triton.language as tl

from .ensemble_batch_norm_formulas import (
    affine,
    gated,
    input_gradient,
    load_mask,
    output,
    parameters,
    store_mask,
    store_statistics,
    times_gain,
)
from .tiles import CHANNEL_BYTES, Reduction, Sizes, jit, member_tile, over_tile, reduction_part

RESIDENT_TILE = 16384  # values of a program: of x, or of x and dy together
SECTOR_BYTES = 32  # of a row of channels that a program reads, at least
MAX_WARPS = 16


@triton.jit
def _mask_place(
    batch, num_channels, n, ROWS_OF_CHANNELS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Of a program's part of the ReLU's bits: which of its rows [·, 1] exist, and its first column."""
    row_valid = tl.arange(0, BLOCK_R)[:, None] < (n if ROWS_OF_CHANNELS else batch)
    first_column = tl.program_id(0).to(tl.int64) % tl.cdiv(num_channels, BLOCK_C) * BLOCK_C
    return row_valid, first_column if ROWS_OF_CHANNELS else first_column * 0


@jit
def resident_forward_kernel(
    x, residual, weight, bias, gain, y, mask, mean, var, rstd, running_mean, running_var, tracked,
    momentum, batch, num_channels, spatial, n,
    EPS: tl.constexpr, WEIGHT_SHARED: tl.constexpr, BIAS_SHARED: tl.constexpr, GAIN_SHARED: tl.constexpr,
    ACTIVATION: tl.constexpr, ACC: tl.constexpr, ROWS_OF_CHANNELS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One (member, channel block): its mean, then the squares around it, and y and the ReLU's bits if asked for."""
    BLOCK_CHANNELS: tl.constexpr = BLOCK_C if ROWS_OF_CHANNELS else 1
    member, _, channels = reduction_part(num_channels, 1, BLOCK_CHANNELS)
    in_range = channels < num_channels
    columns = num_channels if ROWS_OF_CHANNELS else spatial
    row, column, valid, _ = member_tile(
        0, member, channels, batch, num_channels, spatial, n, ROWS_OF_CHANNELS, BLOCK_R, BLOCK_C
    )
    offset = row * columns + column
    value = tl.load(x + offset, valid, other=0.0).to(ACC)

    count = n.to(ACC)
    mean_value = over_tile(value, ROWS_OF_CHANNELS) / count
    centred = tl.where(valid, value - mean_value, 0.0)
    squares = over_tile(centred * centred, ROWS_OF_CHANNELS)
    shift = over_tile(centred, ROWS_OF_CHANNELS) / count  # what the mean lost by rounding
    finite = squares < float("inf")  # the correction would turn infinities into NaN
    squares = tl.where(finite, tl.maximum(squares - shift * (shift * count), 0.0), squares)
    mean_value = tl.where(finite, mean_value + shift, mean_value)
    rstd_value = store_statistics(
        mean, var, rstd, running_mean, running_var, tracked, member, channels, num_channels, in_range,
        mean_value, squares, count, momentum, EPS,
    )  # fmt: skip

    if y is not None:
        scale, bias_value = affine(
            weight, bias, member, channels, num_channels, in_range, rstd_value, WEIGHT_SHARED, BIAS_SHARED
        )
        z = output(value, residual, mean_value, scale, bias_value, offset, valid, y.dtype.element_ty, ACTIVATION)
        if mask is not None:
            row_valid, first_column = _mask_place(batch, num_channels, n, ROWS_OF_CHANNELS, BLOCK_R, BLOCK_C)
            store_mask(mask, z, row, row_valid, first_column, columns, valid, BLOCK_R, BLOCK_C)
        z = times_gain(z, gain, member, channels, num_channels, in_range, GAIN_SHARED)
        tl.store(y + offset, z.to(y.dtype.element_ty), valid)


@jit
def resident_backward_kernel(
    dy, x, mean, rstd, weight, bias, gain, mask, sum_dz, sum_dz_xhat, dx, dresidual,
    batch, num_channels, spatial, n,
    BATCH_STATISTICS: tl.constexpr, WEIGHT_SHARED: tl.constexpr, BIAS_SHARED: tl.constexpr, GAIN_SHARED: tl.constexpr,
    ACTIVATION: tl.constexpr, ACC: tl.constexpr, ROWS_OF_CHANNELS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One (member, channel block): Σdz and Σ(dz · x̂), and dx and dresidual if asked for."""
    BLOCK_CHANNELS: tl.constexpr = BLOCK_C if ROWS_OF_CHANNELS else 1
    member, _, channels = reduction_part(num_channels, 1, BLOCK_CHANNELS)
    in_range = channels < num_channels
    columns = num_channels if ROWS_OF_CHANNELS else spatial
    group = member * num_channels + channels
    mean_value, rstd_value, scale, shift = parameters(
        mean, rstd, weight, bias, member, channels, num_channels, in_range, WEIGHT_SHARED, BIAS_SHARED
    )
    row, column, valid, _ = member_tile(
        0, member, channels, batch, num_channels, spatial, n, ROWS_OF_CHANNELS, BLOCK_R, BLOCK_C
    )
    offset = row * columns + column
    centred = tl.load(x + offset, valid, other=0.0).to(ACC) - mean_value
    dz = tl.load(dy + offset, valid, other=0.0).to(ACC)
    if mask is not None:
        row_valid, first_column = _mask_place(batch, num_channels, n, ROWS_OF_CHANNELS, BLOCK_R, BLOCK_C)
        dz = tl.where(load_mask(mask, row, row_valid, first_column, columns, BLOCK_R, BLOCK_C), dz, 0.0)
    else:
        dz = gated(dz, centred, scale, shift, mask, row, column, columns, valid, x.dtype.element_ty, ACTIVATION)
    total = over_tile(dz, ROWS_OF_CHANNELS)
    dot = over_tile(dz * centred, ROWS_OF_CHANNELS) * rstd_value
    tl.store(sum_dz + group, total, in_range)
    tl.store(sum_dz_xhat + group, dot, in_range)
    if dx is not None:
        count = n.to(ACC)
        slope = dot * rstd_value / count
        factor = times_gain(scale, gain, member, channels, num_channels, in_range, GAIN_SHARED)
        gradient = input_gradient(dz, centred, factor, total / count, slope, BATCH_STATISTICS)
        tl.store(dx + offset, gradient.to(dx.dtype.element_ty), valid)
        if dresidual is not None:
            tl.store(dresidual + offset, dz.to(dresidual.dtype.element_ty), valid)


def resident_plan(sizes: Sizes, operands: int) -> Reduction | None:
    """Return the tile of a program that keeps whole groups of so many operands in registers; None: they do not fit.

    Like every plan, a function of (n, C, dtype, layout) alone.
    """
    limit = RESIDENT_TILE // operands // (1 if sizes.vectors else 2)
    if sizes.rows_of_channels:
        block_r = triton.next_power_of_2(sizes.n)
        block_c = max(8, min(triton.next_power_of_2(sizes.channels), CHANNEL_BYTES // sizes.dtype.itemsize))
        while block_r * block_c > limit and block_c > max(8, SECTOR_BYTES // sizes.dtype.itemsize):
            block_c //= 2
        channel_blocks = triton.cdiv(sizes.channels, block_c)
    else:
        block_r, block_c = triton.next_power_of_2(sizes.batch), max(8, triton.next_power_of_2(sizes.spatial))
        channel_blocks = sizes.channels
    if block_r * block_c > limit:
        return None
    num_warps = max(1, min(MAX_WARPS, block_r * block_c // (32 * (16 if sizes.vectors else 8))))
    return Reduction(block_r, block_c, num_warps, 1, 1, 1, channel_blocks)
