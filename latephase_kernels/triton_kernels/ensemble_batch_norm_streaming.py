"""The streaming tier of ensemble batch norm in Triton: groups of any size, which one kernel reduces and one applies.

Shapes: K members, B rows a member, C channels, S = product of the spatial sizes, n = B·S values a statistic.
Per-member tensors are [K, C]; G = K·C of them are counted as groups, group = k·C + c.
Memory is seen as rows × columns, in the two layouts of `tiles.py`. There are no atomics.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .ensemble_batch_norm_formulas import (
    gated,
    input_gradient,
    output,
    parameters,
    store_mask,
    store_statistics,
    times_gain,
)
from .tiles import CHANNEL_BYTES, MAX_COLUMNS, Sizes, jit, member_tile, over_tile, reduction_part, warps_for

APPLY_TILE = 2048  # values

# ---------------------------------------------------------------------------------------------- statistics


@triton.jit
def _pivot(
    x, member, channels, batch, num_channels, spatial, n, valid, ROWS_OF_CHANNELS: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """The first value of each group, or 0 if not finite: statistics of x − pivot do not round the mean away."""
    if ROWS_OF_CHANNELS:
        offset = member * n * num_channels + channels
    else:
        offset = (member * batch * num_channels + channels) * spatial
    first = tl.load(x + offset, valid, other=0.0).to(ACC)
    return tl.where(tl.abs(first) < 3e38, first, 0.0)


@jit
def statistics_kernel(
    x, mean, var, rstd, running_mean, running_var, tracked, partials, momentum,
    batch, num_channels, spatial, n, groups, tiles, tiles_per_split, splits,
    EPS: tl.constexpr, ACC: tl.constexpr, ROWS_OF_CHANNELS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One (member, split, channel block): mean and centred squares a tile, merged by Chan's formula.

    Writes the statistics, or this split's (mean − pivot, centred squares, count) into partials [3, splits, G].
    """
    BLOCK_CHANNELS: tl.constexpr = BLOCK_C if ROWS_OF_CHANNELS else 1
    member, split, channels = reduction_part(num_channels, splits, BLOCK_CHANNELS)
    in_range = channels < num_channels
    columns = num_channels if ROWS_OF_CHANNELS else spatial

    pivot = _pivot(x, member, channels, batch, num_channels, spatial, n, in_range, ROWS_OF_CHANNELS, ACC)
    total = tl.full([1, 1], 0.0, ACC)
    center = tl.full([1, BLOCK_CHANNELS], 0.0, ACC)
    squares = tl.full([1, BLOCK_CHANNELS], 0.0, ACC)
    first = split * tiles_per_split
    for tile in range(first, tl.minimum(first + tiles_per_split, tiles)):
        row, column, valid, tile_count = member_tile(
            tile, member, channels, batch, num_channels, spatial, n, ROWS_OF_CHANNELS, BLOCK_R, BLOCK_C
        )
        count = tl.full([1, 1], 0.0, ACC) + tile_count.to(ACC)
        value = tl.load(x + row * columns + column, valid, other=0.0).to(ACC) - pivot
        value = tl.where(valid, value, 0.0)
        tile_center = over_tile(value, ROWS_OF_CHANNELS) / count
        centred = tl.where(valid, value - tile_center, 0.0)
        merged = total + count
        delta = tile_center - center
        center += delta * (count / merged)
        squares += over_tile(centred * centred, ROWS_OF_CHANNELS) + delta * (delta * (total * (count / merged)))
        total = merged

    if partials is None:
        store_statistics(
            mean, var, rstd, running_mean, running_var, tracked, member, channels, num_channels, in_range,
            pivot + center, squares, total, momentum, EPS,
        )  # fmt: skip
    else:
        group = member * num_channels + channels
        partial = partials + split * groups + group
        tl.store(partial, center, in_range)
        tl.store(partial + splits * groups, squares, in_range)
        tl.store(partial + 2 * splits * groups, total + tl.zeros_like(center), in_range)


@jit
def merge_statistics_kernel(
    x, mean, var, rstd, running_mean, running_var, tracked, partials, momentum,
    batch, num_channels, spatial, n, groups, splits,
    EPS: tl.constexpr, ACC: tl.constexpr, ROWS_OF_CHANNELS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
):  # fmt: skip
    """Merge the splits of partials [3, splits, G] by Chan's formula."""
    group = tl.program_id(0).to(tl.int64) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)[None, :]
    split = tl.arange(0, BLOCK_SPLITS)[:, None]
    in_range = group < groups
    valid = (split < splits) & in_range
    partial = partials + split * groups + group
    center = tl.load(partial, valid, other=0.0)
    squares = tl.load(partial + splits * groups, valid, other=0.0)
    count = tl.load(partial + 2 * splits * groups, valid, other=0.0)
    total = tl.sum(count, 0, keep_dims=True)
    merged = tl.sum(center * (count / total), 0, keep_dims=True)
    delta = tl.where(valid, center - merged, 0.0)
    squares = tl.sum(squares + delta * (delta * count), 0, keep_dims=True)
    member, channels = group // num_channels, group % num_channels
    pivot = _pivot(x, member, channels, batch, num_channels, spatial, n, in_range, ROWS_OF_CHANNELS, ACC)
    store_statistics(
        mean, var, rstd, running_mean, running_var, tracked, member, channels, num_channels, in_range,
        pivot + merged, squares, total, momentum, EPS,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- apply


@triton.jit
def _apply_tile(
    batch, num_channels, spatial, n, rows,
    ROWS_OF_CHANNELS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """This program's tile of the whole tensor: memory rows, columns, validity; members, channels, their validity."""
    program = tl.program_id(0).to(tl.int64)
    if ROWS_OF_CHANNELS:
        tiles_across = tl.cdiv(num_channels, BLOCK_C)
        tiles_down = tl.cdiv(n, BLOCK_R)
        member = program // tiles_across // tiles_down
        index = program // tiles_across % tiles_down * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        row = member * n + index
        column = program % tiles_across * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
        channel = column
        parameter_valid = column < num_channels
        valid = (index < n) & parameter_valid
    else:
        tiles_across = tl.cdiv(spatial, BLOCK_C)
        first = program // tiles_across * BLOCK_R
        image = first // num_channels  # 64-bit divisions a program, 32-bit ones a row
        index = tl.arange(0, BLOCK_R)[:, None]
        row = first + index
        column = program % tiles_across * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
        channel = (first % num_channels).to(tl.int32) + index
        member = image // batch + ((image % batch).to(tl.int32) + channel // num_channels) // batch
        channel = channel % num_channels
        parameter_valid = row < rows
        valid = parameter_valid & (column < spatial)
    return row, column, valid, member, channel, parameter_valid


@jit
def apply_kernel(
    x, mean, rstd, weight, bias, gain, residual, y, mask, batch, num_channels, spatial, n, rows,
    WEIGHT_SHARED: tl.constexpr, BIAS_SHARED: tl.constexpr, GAIN_SHARED: tl.constexpr, ACTIVATION: tl.constexpr,
    ACC: tl.constexpr, ROWS_OF_CHANNELS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One tile of y, and of the ReLU's bits where mask is given."""
    row, column, valid, member, channel, parameter_valid = _apply_tile(
        batch, num_channels, spatial, n, rows, ROWS_OF_CHANNELS, BLOCK_R, BLOCK_C
    )
    columns = num_channels if ROWS_OF_CHANNELS else spatial
    mean_value, _, scale, shift = parameters(
        mean, rstd, weight, bias, member, channel, num_channels, parameter_valid, WEIGHT_SHARED, BIAS_SHARED
    )
    offset = row * columns + column
    value = tl.load(x + offset, valid, other=0.0).to(ACC)
    z = output(value, residual, mean_value, scale, shift, offset, valid, y.dtype.element_ty, ACTIVATION)
    if mask is not None:
        first_column = tl.program_id(0).to(tl.int64) % tl.cdiv(columns, BLOCK_C) * BLOCK_C
        row_valid = row < rows
        if ROWS_OF_CHANNELS:
            row_valid = row < member * n + n
        store_mask(mask, z, row, row_valid, first_column, columns, valid, BLOCK_R, BLOCK_C)
    z = times_gain(z, gain, member, channel, num_channels, parameter_valid, GAIN_SHARED)
    tl.store(y + offset, z.to(y.dtype.element_ty), valid)


# ---------------------------------------------------------------------------------------------- backward


@jit
def backward_reduce_kernel(
    dy, x, mean, rstd, weight, bias, mask, sum_dz, sum_dz_xhat, partials,
    batch, num_channels, spatial, n, groups, tiles, tiles_per_split, splits,
    WEIGHT_SHARED: tl.constexpr, BIAS_SHARED: tl.constexpr, ACTIVATION: tl.constexpr, ACC: tl.constexpr,
    ROWS_OF_CHANNELS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One (member, split, channel block) of Σdz and Σ(dz · x̂): writes the sums, or partials [2, splits, G]."""
    BLOCK_CHANNELS: tl.constexpr = BLOCK_C if ROWS_OF_CHANNELS else 1
    member, split, channels = reduction_part(num_channels, splits, BLOCK_CHANNELS)
    in_range = channels < num_channels
    columns = num_channels if ROWS_OF_CHANNELS else spatial
    group = member * num_channels + channels
    mean_value, rstd_value, scale, shift = parameters(
        mean, rstd, weight, bias, member, channels, num_channels, in_range, WEIGHT_SHARED, BIAS_SHARED
    )

    sum_value = tl.full([BLOCK_R, BLOCK_C], 0.0, ACC)
    dot_value = tl.full([BLOCK_R, BLOCK_C], 0.0, ACC)
    first = split * tiles_per_split
    for tile in range(first, tl.minimum(first + tiles_per_split, tiles)):
        row, column, valid, _ = member_tile(
            tile, member, channels, batch, num_channels, spatial, n, ROWS_OF_CHANNELS, BLOCK_R, BLOCK_C
        )
        offset = row * columns + column
        centred = tl.load(x + offset, valid, other=0.0).to(ACC) - mean_value
        dz = tl.load(dy + offset, valid, other=0.0).to(ACC)
        dz = gated(dz, centred, scale, shift, mask, row, column, columns, valid, x.dtype.element_ty, ACTIVATION)
        sum_value += dz
        dot_value = tl.fma(dz, centred, dot_value)

    total = over_tile(sum_value, ROWS_OF_CHANNELS)
    rstd_value = tl.load(rstd + group, in_range, other=0.0, volatile=True)  # again: not held in registers meanwhile
    dot = over_tile(dot_value, ROWS_OF_CHANNELS) * rstd_value
    if partials is None:
        tl.store(sum_dz + group, total, in_range)
        tl.store(sum_dz_xhat + group, dot, in_range)
    else:
        partial = partials + split * groups + group
        tl.store(partial, total, in_range)
        tl.store(partial + splits * groups, dot, in_range)


@jit
def backward_apply_kernel(
    dy, x, mean, rstd, weight, bias, gain, mask, sum_dz, sum_dz_xhat, dx, dresidual,
    batch, num_channels, spatial, n, rows, count,
    BATCH_STATISTICS: tl.constexpr, WEIGHT_SHARED: tl.constexpr, BIAS_SHARED: tl.constexpr, GAIN_SHARED: tl.constexpr,
    ACTIVATION: tl.constexpr, ACC: tl.constexpr, ROWS_OF_CHANNELS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One tile of dx, and of dresidual = dz where it is given."""
    row, column, valid, member, channel, parameter_valid = _apply_tile(
        batch, num_channels, spatial, n, rows, ROWS_OF_CHANNELS, BLOCK_R, BLOCK_C
    )
    columns = num_channels if ROWS_OF_CHANNELS else spatial
    group = member * num_channels + channel
    mean_value, rstd_value, scale, shift = parameters(
        mean, rstd, weight, bias, member, channel, num_channels, parameter_valid, WEIGHT_SHARED, BIAS_SHARED
    )
    offset = row * columns + column
    centred = tl.load(x + offset, valid, other=0.0).to(ACC) - mean_value
    dz = tl.load(dy + offset, valid, other=0.0).to(ACC)
    dz = gated(dz, centred, scale, shift, mask, row, column, columns, valid, x.dtype.element_ty, ACTIVATION)
    if dresidual is not None:
        tl.store(dresidual + offset, dz.to(dresidual.dtype.element_ty), valid)
    mean_dz, slope = 0.0, 0.0
    if BATCH_STATISTICS:
        mean_dz = tl.load(sum_dz + group, parameter_valid, other=0.0) / count.to(ACC)
        slope = tl.load(sum_dz_xhat + group, parameter_valid, other=0.0) * rstd_value / count.to(ACC)
    factor = times_gain(scale, gain, member, channel, num_channels, parameter_valid, GAIN_SHARED)
    gradient = input_gradient(dz, centred, factor, mean_dz, slope, BATCH_STATISTICS)
    tl.store(dx + offset, gradient.to(dx.dtype.element_ty), valid)


# ---------------------------------------------------------------------------------------------- plans


class Apply(NamedTuple):
    """Tiles of the kernels that write a tensor."""

    block_r: int
    block_c: int
    num_warps: int
    programs: int


def apply_plan(sizes: Sizes) -> Apply:
    """Cut a tensor into the tiles of the kernels that write one."""
    tile = APPLY_TILE if sizes.vectors else APPLY_TILE // 2
    if sizes.rows_of_channels:
        block_c = max(8, min(triton.next_power_of_2(sizes.channels), CHANNEL_BYTES))  # whole bytes of the ReLU's bits
        block_r = min(triton.next_power_of_2(sizes.n), tile // block_c)
        tiles_down = sizes.members * triton.cdiv(sizes.n, block_r)
    else:
        block_c = max(8, min(triton.next_power_of_2(sizes.spatial), MAX_COLUMNS))
        block_r = tile // block_c
        tiles_down = triton.cdiv(sizes.rows, block_r)
    num_warps = warps_for(block_r, block_c, 16 if sizes.vectors else 4)
    return Apply(block_r, block_c, num_warps, tiles_down * triton.cdiv(sizes.columns, block_c))
