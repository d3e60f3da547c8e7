"""Ensemble batch norm in Triton: statistics, apply, backward reduce, backward apply, and the two whole ops.

    y = activation( (x − mean_k) · rstd_k · weight_k + bias_k + residual ),   rstd_k = 1 / √(var_k + eps)
    dx = weight_k · rstd_k · (dz − Σdz / n − x̂ · Σ(dz · x̂) / n),   dz = dy where the ReLU passed

Shapes: K members, B rows a member, C channels, S = product of the spatial sizes, n = B·S values a statistic.
Per-member tensors are [K, C]; G = K·C of them are counted as groups, group = k·C + c.
Memory is seen as rows × columns, in the two layouts of `tiles.py`, which `mask_shape` of ops/ensemble_batch_norm.py
tells apart. A member's bits depend on that member alone: besides what `tiles.py` does for it, x → y is one explicit fma
wherever it is computed. There are no atomics.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.precision import accumulation_dtype
from .tiles import (
    CHANNEL_BYTES,
    MAX_COLUMNS,
    MERGE_GROUPS,
    Sizes,
    aligned,
    contiguous,
    is_shared,
    jit,
    member_tile,
    merge_sums,
    new_partials,
    on_device,
    over_tile,
    reduction,
    warps_for,
)

APPLY_TILE = 2048  # values

# ---------------------------------------------------------------------------------------------- tiles


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


@triton.jit
def _affine(
    weight, bias, member, channel, num_channels, valid, rstd,
    WEIGHT_SHARED: tl.constexpr, BIAS_SHARED: tl.constexpr,
):  # fmt: skip
    """Load weight · rstd and bias, in rstd's type."""
    scale = rstd
    shift = tl.zeros_like(rstd)
    if weight is not None:
        index = channel if WEIGHT_SHARED else member * num_channels + channel
        scale = tl.load(weight + index, valid, other=0.0).to(rstd.dtype) * rstd
    if bias is not None:
        index = channel if BIAS_SHARED else member * num_channels + channel
        shift = tl.load(bias + index, valid, other=0.0).to(rstd.dtype)
    return scale, shift


@triton.jit
def _dz(dy, x, mean, scale, shift, mask, row, column, columns, valid, DTYPE: tl.constexpr, RELU: tl.constexpr):
    """dy where the ReLU passed: by its bit, or by the output recomputed and rounded as the forward did."""
    dz = dy
    if RELU:
        if mask is not None:
            byte = tl.load(mask + row * tl.cdiv(columns, 8) + column // 8, valid, other=0)
            dz = tl.where(((byte.to(tl.int32) >> (column % 8).to(tl.int32)) & 1) == 0, 0.0, dy)
        else:
            y = tl.fma(x - mean, scale, shift).to(DTYPE).to(dy.dtype)
            dz = tl.where(y <= 0.0, 0.0, dy)
    return dz


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


@triton.jit
def _store_statistics(mean, var, rstd, group, valid, mean_value, squares, n, EPS: tl.constexpr):
    var_value = squares / n
    tl.store(mean + group, mean_value, valid)
    tl.store(var + group, var_value, valid)
    if rstd is not None:
        tl.store(rstd + group, 1.0 / tl.sqrt(var_value + EPS), valid)


# ---------------------------------------------------------------------------------------------- statistics


@jit
def _statistics_kernel(
    x, mean, var, rstd, partials, batch, num_channels, spatial, n, groups, tiles, tiles_per_split, splits,
    EPS: tl.constexpr, ACC: tl.constexpr, ROWS_OF_CHANNELS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One (member, split, channel block): mean and centred squares a tile, merged by Chan's formula.

    Writes the statistics, or this split's (mean − pivot, centred squares, count) into partials [3, splits, G].
    """
    BLOCK_CHANNELS: tl.constexpr = BLOCK_C if ROWS_OF_CHANNELS else 1
    program = tl.program_id(0).to(tl.int64)
    channel_blocks = tl.cdiv(num_channels, BLOCK_CHANNELS)
    split = program // channel_blocks % splits
    member = program // channel_blocks // splits
    channels = program % channel_blocks * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)[None, :]
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

    group = member * num_channels + channels
    if partials is None:
        _store_statistics(mean, var, rstd, group, in_range, pivot + center, squares, total, EPS)
    else:
        partial = partials + split * groups + group
        tl.store(partial, center, in_range)
        tl.store(partial + splits * groups, squares, in_range)
        tl.store(partial + 2 * splits * groups, total + tl.zeros_like(center), in_range)


@jit
def _merge_statistics_kernel(
    x, mean, var, rstd, partials, batch, num_channels, spatial, n, groups, splits,
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
    member = group // num_channels
    pivot = _pivot(x, member, group % num_channels, batch, num_channels, spatial, n, in_range, ROWS_OF_CHANNELS, ACC)
    _store_statistics(mean, var, rstd, group, in_range, pivot + merged, squares, total, EPS)


# ---------------------------------------------------------------------------------------------- apply


@jit
def _apply_kernel(
    x, mean, rstd, weight, bias, residual, y, mask, batch, num_channels, spatial, n, rows,
    WEIGHT_SHARED: tl.constexpr, BIAS_SHARED: tl.constexpr, RELU: tl.constexpr, ACC: tl.constexpr,
    ROWS_OF_CHANNELS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One tile of y, and of the ReLU's bits where mask is given."""
    row, column, valid, member, channel, parameter_valid = _apply_tile(
        batch, num_channels, spatial, n, rows, ROWS_OF_CHANNELS, BLOCK_R, BLOCK_C
    )
    columns = num_channels if ROWS_OF_CHANNELS else spatial
    group = member * num_channels + channel
    mean_value = tl.load(mean + group, parameter_valid, other=0.0)
    rstd_value = tl.load(rstd + group, parameter_valid, other=0.0)
    scale, shift = _affine(
        weight, bias, member, channel, num_channels, parameter_valid, rstd_value, WEIGHT_SHARED, BIAS_SHARED
    )
    offset = row * columns + column
    z = tl.fma(tl.load(x + offset, valid, other=0.0).to(ACC) - mean_value, scale, shift)
    if residual is not None:
        z += tl.load(residual + offset, valid, other=0.0).to(ACC)
    z = z.to(y.dtype.element_ty).to(ACC)
    if RELU:
        stopped = z <= 0.0
        z = tl.where(stopped, 0.0, z)
        if mask is not None:
            bits = (~stopped & valid).to(tl.int32) << (tl.arange(0, BLOCK_C)[None, :] % 8)
            bytes = tl.sum(tl.reshape(bits, [BLOCK_R, BLOCK_C // 8, 8]), 2).to(tl.uint8)
            mask_columns = tl.cdiv(columns, 8)
            tile_across = tl.program_id(0).to(tl.int64) % tl.cdiv(columns, BLOCK_C)
            byte = tile_across * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)[None, :]
            row_valid = row < rows
            if ROWS_OF_CHANNELS:
                row_valid = row < member * n + n
            tl.store(mask + row * mask_columns + byte, bytes, row_valid & (byte < mask_columns))
    tl.store(y + offset, z.to(y.dtype.element_ty), valid)


# ---------------------------------------------------------------------------------------------- backward


@jit
def _backward_reduce_kernel(
    dy, x, mean, rstd, weight, bias, mask, sum_dz, sum_dz_xhat, partials,
    batch, num_channels, spatial, n, groups, tiles, tiles_per_split, splits,
    WEIGHT_SHARED: tl.constexpr, BIAS_SHARED: tl.constexpr, RELU: tl.constexpr, ACC: tl.constexpr,
    ROWS_OF_CHANNELS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One (member, split, channel block) of Σdz and Σ(dz · x̂): writes the sums, or partials [2, splits, G]."""
    BLOCK_CHANNELS: tl.constexpr = BLOCK_C if ROWS_OF_CHANNELS else 1
    program = tl.program_id(0).to(tl.int64)
    channel_blocks = tl.cdiv(num_channels, BLOCK_CHANNELS)
    split = program // channel_blocks % splits
    member = program // channel_blocks // splits
    channels = program % channel_blocks * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)[None, :]
    in_range = channels < num_channels
    columns = num_channels if ROWS_OF_CHANNELS else spatial
    group = member * num_channels + channels
    mean_value = tl.load(mean + group, in_range, other=0.0)
    rstd_value = tl.load(rstd + group, in_range, other=0.0)
    scale, shift = _affine(
        weight, bias, member, channels, num_channels, in_range, rstd_value, WEIGHT_SHARED, BIAS_SHARED
    )

    sum_value = tl.full([BLOCK_R, BLOCK_C], 0.0, ACC)
    dot_value = tl.full([BLOCK_R, BLOCK_C], 0.0, ACC)
    first = split * tiles_per_split
    for tile in range(first, tl.minimum(first + tiles_per_split, tiles)):
        row, column, valid, _ = member_tile(
            tile, member, channels, batch, num_channels, spatial, n, ROWS_OF_CHANNELS, BLOCK_R, BLOCK_C
        )
        offset = row * columns + column
        value = tl.load(x + offset, valid, other=0.0).to(ACC)
        dz = tl.load(dy + offset, valid, other=0.0).to(ACC)
        dz = _dz(dz, value, mean_value, scale, shift, mask, row, column, columns, valid, x.dtype.element_ty, RELU)
        sum_value += dz
        dot_value = tl.fma(dz, value - mean_value, dot_value)

    total = over_tile(sum_value, ROWS_OF_CHANNELS)
    dot = over_tile(dot_value, ROWS_OF_CHANNELS) * rstd_value
    if partials is None:
        tl.store(sum_dz + group, total, in_range)
        tl.store(sum_dz_xhat + group, dot, in_range)
    else:
        partial = partials + split * groups + group
        tl.store(partial, total, in_range)
        tl.store(partial + splits * groups, dot, in_range)


@jit
def _backward_apply_kernel(
    dy, x, mean, rstd, weight, bias, mask, sum_dz, sum_dz_xhat, dx, dresidual,
    batch, num_channels, spatial, n, rows, count,
    BATCH_STATISTICS: tl.constexpr, WEIGHT_SHARED: tl.constexpr, BIAS_SHARED: tl.constexpr, RELU: tl.constexpr,
    ACC: tl.constexpr, ROWS_OF_CHANNELS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One tile of dx, and of dresidual = dz where it is given."""
    row, column, valid, member, channel, parameter_valid = _apply_tile(
        batch, num_channels, spatial, n, rows, ROWS_OF_CHANNELS, BLOCK_R, BLOCK_C
    )
    columns = num_channels if ROWS_OF_CHANNELS else spatial
    group = member * num_channels + channel
    mean_value = tl.load(mean + group, parameter_valid, other=0.0)
    rstd_value = tl.load(rstd + group, parameter_valid, other=0.0)
    scale, shift = _affine(
        weight, bias, member, channel, num_channels, parameter_valid, rstd_value, WEIGHT_SHARED, BIAS_SHARED
    )
    offset = row * columns + column
    value = tl.load(x + offset, valid, other=0.0).to(ACC)
    dz = tl.load(dy + offset, valid, other=0.0).to(ACC)
    dz = _dz(dz, value, mean_value, scale, shift, mask, row, column, columns, valid, x.dtype.element_ty, RELU)
    if dresidual is not None:
        tl.store(dresidual + offset, dz.to(dresidual.dtype.element_ty), valid)
    if BATCH_STATISTICS:
        shared = tl.load(sum_dz + group, parameter_valid, other=0.0) / count.to(ACC)
        slope = tl.load(sum_dz_xhat + group, parameter_valid, other=0.0) * rstd_value / count.to(ACC)
        dz = tl.fma(mean_value - value, slope, dz - shared)
    tl.store(dx + offset, (dz * scale).to(dx.dtype.element_ty), valid)


# ---------------------------------------------------------------------------------------------- plans


class _Apply(NamedTuple):
    """Tiles of the kernels that write a tensor."""

    block_r: int
    block_c: int
    num_warps: int
    programs: int


def _sizes(input: Tensor, num_members: int) -> Sizes:
    spatial = input[0, 0].numel()
    rows_of_channels = spatial == 1 or not input.is_contiguous()
    return Sizes(num_members, input.size(0) // num_members, input.size(1), spatial, rows_of_channels, input.dtype)


def _apply(sizes: Sizes) -> _Apply:
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
    return _Apply(block_r, block_c, num_warps, tiles_down * triton.cdiv(sizes.columns, block_c))


def _statistic(input: Tensor, num_members: int) -> Tensor:
    return input.new_empty((num_members, input.size(1)), dtype=accumulation_dtype(input.dtype))


def _launch_statistics(input: Tensor, num_members: int, eps: float | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (mean, var, rstd), each [K, C]; rstd is None where eps is."""
    mean, var = _statistic(input, num_members), _statistic(input, num_members)
    rstd = None if eps is None else _statistic(input, num_members)
    if input.numel() == 0:
        return mean.zero_(), var.zero_(), None if rstd is None else rstd.zero_()
    sizes = _sizes(input, num_members)
    plan = reduction(sizes)
    groups = mean.numel()
    partials = new_partials(input, 3, plan.splits, groups)
    extents = (sizes.batch, sizes.channels, sizes.spatial, sizes.n, groups)
    settings = dict(EPS=eps or 0.0, ACC=sizes.acc, ROWS_OF_CHANNELS=sizes.rows_of_channels)
    with on_device(input):
        input = aligned(input)
        _statistics_kernel[(num_members * plan.splits * plan.channel_blocks,)](
            input, mean, var, rstd, partials, *extents, plan.tiles, plan.tiles_per_split, plan.splits,
            **settings, BLOCK_R=plan.block_r, BLOCK_C=plan.block_c, num_warps=plan.num_warps,
        )  # fmt: skip
        if partials is not None:
            _merge_statistics_kernel[(triton.cdiv(groups, MERGE_GROUPS),)](
                input, mean, var, rstd, partials, *extents, plan.splits,
                **settings, BLOCK_SPLITS=triton.next_power_of_2(plan.splits), BLOCK_GROUPS=MERGE_GROUPS,
            )  # fmt: skip
    return mean, var, rstd


def _mask_shape(input: Tensor, residual: Tensor | None, activation: str) -> list[int]:
    from ..ops.ensemble_batch_norm import mask_shape  # imported late: ops is what imports this file

    return mask_shape(input, residual, activation)


# ---------------------------------------------------------------------------------------------- ops


def ensemble_batch_norm_statistics(input: Tensor, num_members: int) -> tuple[Tensor, Tensor]:
    """Return (mean, biased variance), each [K, C], in float32 (float64 for float64)."""
    mean, var, _ = _launch_statistics(input, num_members, None)
    return mean, var


def ensemble_batch_norm_apply(
    input: Tensor,  # [K·B, C, *]
    mean: Tensor,  # [K, C]
    rstd: Tensor,  # [K, C]
    weight: Tensor | None,  # [K, C] or [C]
    bias: Tensor | None,  # [K, C] or [C]
    residual: Tensor | None,  # [K·B, C, *]
    num_members: int,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Return y in input's layout and the packed bits of the ReLU ([0] where the backward recomputes them)."""
    y = torch.empty_like(input)
    mask = input.new_empty(_mask_shape(input, residual, activation), dtype=torch.uint8)
    if input.numel() == 0:
        return y, mask
    sizes = _sizes(input, num_members)
    plan = _apply(sizes)
    with on_device(input):
        _apply_kernel[(plan.programs,)](
            aligned(input), mean.contiguous(), rstd.contiguous(), contiguous(weight), contiguous(bias),
            aligned(residual), y, mask if mask.numel() else None,
            sizes.batch, sizes.channels, sizes.spatial, sizes.n, sizes.rows,
            WEIGHT_SHARED=is_shared(weight), BIAS_SHARED=is_shared(bias), RELU=activation == "relu", ACC=sizes.acc,
            ROWS_OF_CHANNELS=sizes.rows_of_channels, BLOCK_R=plan.block_r, BLOCK_C=plan.block_c,
            num_warps=plan.num_warps,
        )  # fmt: skip
    return y, mask


def ensemble_batch_norm_backward_reduce(
    dy: Tensor,  # [K·B, C, *]
    input: Tensor,  # [K·B, C, *]
    mean: Tensor,  # [K, C]
    rstd: Tensor,  # [K, C]
    weight: Tensor | None,  # [K, C] or [C]
    bias: Tensor | None,  # [K, C] or [C]
    mask: Tensor,  # mask_shape
    num_members: int,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Return (Σdz, Σ(dz · x̂)), each [K, C]: the gradients of bias and weight."""
    sum_dz, sum_dz_xhat = _statistic(input, num_members), _statistic(input, num_members)
    if input.numel() == 0:
        return sum_dz.zero_(), sum_dz_xhat.zero_()
    sizes = _sizes(input, num_members)
    plan = reduction(sizes)
    groups = sum_dz.numel()
    partials = new_partials(input, 2, plan.splits, groups)
    with on_device(input):
        _backward_reduce_kernel[(num_members * plan.splits * plan.channel_blocks,)](
            aligned(dy), aligned(input), aligned(mean.contiguous()), aligned(rstd.contiguous()),
            aligned(contiguous(weight)), aligned(contiguous(bias)), mask if mask.numel() else None,
            sum_dz, sum_dz_xhat, partials, sizes.batch, sizes.channels, sizes.spatial, sizes.n, groups,
            plan.tiles, plan.tiles_per_split, plan.splits,
            WEIGHT_SHARED=is_shared(weight), BIAS_SHARED=is_shared(bias), RELU=activation == "relu", ACC=sizes.acc,
            ROWS_OF_CHANNELS=sizes.rows_of_channels, BLOCK_R=plan.block_r, BLOCK_C=plan.block_c,
            num_warps=plan.num_warps,
        )  # fmt: skip
        if partials is not None:
            merge_sums(sum_dz, sum_dz_xhat, partials)
    return sum_dz, sum_dz_xhat


def ensemble_batch_norm_backward_apply(
    dy: Tensor,  # [K·B, C, *]
    input: Tensor,  # [K·B, C, *]
    mean: Tensor,  # [K, C]
    rstd: Tensor,  # [K, C]
    weight: Tensor | None,  # [K, C] or [C]
    bias: Tensor | None,  # [K, C] or [C]
    mask: Tensor,  # mask_shape
    sum_dz: Tensor,  # [K, C]
    sum_dz_xhat: Tensor,  # [K, C]
    count: float,
    num_members: int,
    activation: str,
    residual_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Return (dx, dresidual); `count` values stand behind each sum, infinitely many where statistics are constants."""
    dx = torch.empty_like(input)
    dresidual = torch.empty_like(input) if residual_grad else input.new_empty([0])
    if input.numel() == 0:
        return dx, dresidual
    sizes = _sizes(input, num_members)
    plan = _apply(sizes)
    batch_statistics = count != float("inf")
    with on_device(input):
        _backward_apply_kernel[(plan.programs,)](
            aligned(dy), aligned(input), mean.contiguous(), rstd.contiguous(), contiguous(weight), contiguous(bias),
            mask if mask.numel() else None, sum_dz.contiguous(), sum_dz_xhat.contiguous(),
            dx, dresidual if residual_grad else None,
            sizes.batch, sizes.channels, sizes.spatial, sizes.n, sizes.rows, int(count) if batch_statistics else 0,
            BATCH_STATISTICS=batch_statistics, WEIGHT_SHARED=is_shared(weight), BIAS_SHARED=is_shared(bias),
            RELU=activation == "relu", ACC=sizes.acc, ROWS_OF_CHANNELS=sizes.rows_of_channels,
            BLOCK_R=plan.block_r, BLOCK_C=plan.block_c, num_warps=plan.num_warps,
        )  # fmt: skip
    return dx, dresidual


def ensemble_batch_norm(
    input: Tensor,  # [K·B, C, *]
    running_mean: Tensor | None,  # [K, C]
    running_var: Tensor | None,  # [K, C]
    weight: Tensor | None,  # [K, C] or [C]
    bias: Tensor | None,  # [K, C] or [C]
    residual: Tensor | None,  # [K·B, C, *]
    training: bool,
    eps: float,
    num_members: int,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (y, mean, rstd, biased variance, mask)."""
    if training:
        mean, var, rstd = _launch_statistics(input, num_members, eps)
        assert rstd is not None
    else:
        assert running_mean is not None and running_var is not None
        mean, var = (t.to(accumulation_dtype(input.dtype), copy=True).contiguous() for t in (running_mean, running_var))
        rstd = (var + eps).rsqrt()
    y, mask = ensemble_batch_norm_apply(input, mean, rstd, weight, bias, residual, num_members, activation)
    return y, mean, rstd, var, mask


def ensemble_batch_norm_backward(
    dy: Tensor,  # [K·B, C, *]
    input: Tensor,  # [K·B, C, *]
    mean: Tensor,  # [K, C]
    rstd: Tensor,  # [K, C]
    weight: Tensor | None,  # [K, C] or [C]
    bias: Tensor | None,  # [K, C] or [C]
    mask: Tensor,  # mask_shape
    training: bool,
    num_members: int,
    activation: str,
    residual_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (dx, dweight [K, C], dbias [K, C], dresidual)."""
    saved = (dy, input, mean, rstd, weight, bias, mask)
    dbias, dweight = ensemble_batch_norm_backward_reduce(*saved, num_members, activation)
    count = float(input.numel() // max(mean.numel(), 1)) if training else float("inf")
    dx, dresidual = ensemble_batch_norm_backward_apply(
        *saved, dbias, dweight, count, num_members, activation, residual_grad
    )
    return dx, dweight, dbias, dresidual


def ensemble_batch_norm_update(
    input: Tensor,  # [K·B, C, *]
    running_mean: Tensor,  # [K, C]
    running_var: Tensor,  # [K, C]
    num_batches_tracked: Tensor | None,  # [K]
    weight: Tensor | None,  # [K, C] or [C]
    bias: Tensor | None,  # [K, C] or [C]
    residual: Tensor | None,  # [K·B, C, *]
    momentum: float,
    eps: float,
    num_members: int,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (y, mean, rstd, biased variance, mask) of the batch, and move the running statistics."""
    found = ensemble_batch_norm(input, None, None, weight, bias, residual, True, eps, num_members, activation)
    _, mean, _, var, _ = found
    n = input.numel() // mean.numel()
    running_mean.lerp_(mean, momentum)
    running_var.lerp_(var * (n / (n - 1)), momentum)
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    return found
