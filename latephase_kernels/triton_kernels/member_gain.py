"""Member gain in Triton: forward, and a backward that writes dx while it adds up dgain and dbias.

    y = activation( x · gain_k + bias_k )
    dx = dz · gain_k,   dgain = Σ dz · x,   dbias = Σ dz,   dz = dy where the ReLU passed

Shapes: K members, C channels; in memory a member is B rows of C channels of S values each (the dimensions outside the
channels' one, and inside it). Memory is seen as rows × columns, in the two layouts of `tiles.py`: S = 1 is rows of
channels, whatever the input's dimensions are called.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.layout import contiguous
from ..reference.precision import accumulation_dtype
from .tiles import (
    Reduction,
    Sizes,
    aligned,
    is_shared,
    jit,
    member_tile,
    merge_sums,
    new_partials,
    on_device,
    over_tile,
    reduction,
    reduction_part,
)


@triton.jit
def _parameters(
    gain, bias, member, channels, num_channels, BIAS_SHARED: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """Gain and bias (0 where there is none) of a program's channels."""
    in_range = channels < num_channels
    group = member * num_channels + channels
    gain_value = tl.load(gain + group, in_range, other=0.0).to(ACC)
    bias_value = tl.zeros_like(gain_value)
    if bias is not None:
        bias_value = tl.load(bias + (channels if BIAS_SHARED else group), in_range, other=0.0).to(ACC)
    return gain_value, bias_value


@jit
def _forward_kernel(
    x, gain, bias, y, batch, num_channels, spatial, n, tiles, tiles_per_split, splits,
    BIAS_SHARED: tl.constexpr, RELU: tl.constexpr, ACC: tl.constexpr,
    ROWS_OF_CHANNELS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One (member, split, channel block) of y."""
    member, split, channels = reduction_part(num_channels, splits, BLOCK_C if ROWS_OF_CHANNELS else 1)
    gain_value, bias_value = _parameters(gain, bias, member, channels, num_channels, BIAS_SHARED, ACC)
    columns = num_channels if ROWS_OF_CHANNELS else spatial
    first = split * tiles_per_split
    for tile in range(first, tl.minimum(first + tiles_per_split, tiles)):
        row, column, valid, _ = member_tile(
            tile, member, channels, batch, num_channels, spatial, n, ROWS_OF_CHANNELS, BLOCK_R, BLOCK_C
        )
        offset = row * columns + column
        z = tl.fma(tl.load(x + offset, valid, other=0.0).to(ACC), gain_value, bias_value)
        z = z.to(y.dtype.element_ty).to(ACC)
        if RELU:
            z = tl.where(z <= 0.0, 0.0, z)
        tl.store(y + offset, z.to(y.dtype.element_ty), valid)


@jit
def _backward_kernel(
    dy, x, gain, bias, dx, dgain, dbias, partials,
    batch, num_channels, spatial, n, groups, tiles, tiles_per_split, splits,
    BIAS_SHARED: tl.constexpr, RELU: tl.constexpr, ACC: tl.constexpr,
    ROWS_OF_CHANNELS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One (member, split, channel block) of dx, and its sums: dgain and dbias, or partials [2, splits, G]."""
    member, split, channels = reduction_part(num_channels, splits, BLOCK_C if ROWS_OF_CHANNELS else 1)
    gain_value, bias_value = _parameters(gain, bias, member, channels, num_channels, BIAS_SHARED, ACC)
    columns = num_channels if ROWS_OF_CHANNELS else spatial
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
        if RELU:  # by the output, rounded as the forward did
            y = tl.fma(value, gain_value, bias_value).to(x.dtype.element_ty).to(ACC)
            dz = tl.where(y <= 0.0, 0.0, dz)
        tl.store(dx + offset, (dz * gain_value).to(dx.dtype.element_ty), valid)
        sum_value += dz
        dot_value = tl.fma(dz, value, dot_value)

    group = member * num_channels + channels
    in_range = channels < num_channels
    total, dot = over_tile(sum_value, ROWS_OF_CHANNELS), over_tile(dot_value, ROWS_OF_CHANNELS)
    if partials is None:
        tl.store(dgain + group, dot, in_range)
        tl.store(dbias + group, total, in_range)
    else:
        partial = partials + split * groups + group
        tl.store(partial, dot, in_range)
        tl.store(partial + splits * groups, total, in_range)


# ---------------------------------------------------------------------------------------------- launches


def _sizes(input: Tensor, gain: Tensor, channel_dim: int) -> Sizes:
    """Sizes in memory: batch counts the rows of a member, spatial the values of a channel in a row."""
    num_members, channels = gain.shape
    if input.is_contiguous():
        spatial = input.shape[channel_dim + 1 :].numel()
    else:  # channels_last
        spatial = 1 if channel_dim == 1 else input.size(1) * input.shape[channel_dim + 1 :].numel()
    batch = input.numel() // (num_members * channels * spatial)
    return Sizes(num_members, batch, channels, spatial, spatial == 1, input.dtype)


def _launch_arguments(sizes: Sizes, plan: Reduction, bias: Tensor | None, activation: str) -> dict:
    """The arguments that both kernels are launched with, by name."""
    return dict(
        batch=sizes.batch, num_channels=sizes.channels, spatial=sizes.spatial, n=sizes.n,
        tiles=plan.tiles, tiles_per_split=plan.tiles_per_split, splits=plan.splits,
        BIAS_SHARED=is_shared(bias), RELU=activation == "relu", ACC=sizes.acc,
        ROWS_OF_CHANNELS=sizes.rows_of_channels, BLOCK_R=plan.block_r, BLOCK_C=plan.block_c, num_warps=plan.num_warps,
    )  # fmt: skip


def member_gain(
    input: Tensor,  # [K·B, *, C, *]
    gain: Tensor,  # [K, C]
    bias: Tensor | None,  # [K, C] or [C]
    channel_dim: int,
    activation: str,
) -> Tensor:
    """Return y in input's layout."""
    y = torch.empty_like(input)
    member_gain_into(input, gain, bias, channel_dim, activation, y)
    return y


def member_gain_into(
    input: Tensor, gain: Tensor, bias: Tensor | None, channel_dim: int, activation: str, out: Tensor
) -> None:
    """Write y into out, which may be input itself."""
    if input.numel() == 0:
        return
    sizes = _sizes(input, gain, channel_dim)
    plan = reduction(sizes)
    with on_device(input):
        _forward_kernel[(sizes.members * plan.splits * plan.channel_blocks,)](
            aligned(input), aligned(gain.contiguous()), aligned(contiguous(bias)), out,
            **_launch_arguments(sizes, plan, bias, activation),
        )  # fmt: skip


def member_gain_backward(
    dy: Tensor,  # [K·B, *, C, *]
    input: Tensor,  # [K·B, *, C, *]
    gain: Tensor,  # [K, C]
    bias: Tensor | None,  # [K, C] or [C]
    channel_dim: int,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dx, dgain, dbias); the last two [K, C] in float32 (float64 for float64)."""
    dx = torch.empty_like(input)
    return dx, *member_gain_backward_into(dy, input, gain, bias, channel_dim, activation, dx)


def member_gain_backward_into(
    dy: Tensor, input: Tensor, gain: Tensor, bias: Tensor | None, channel_dim: int, activation: str, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Write dx into out, which may be dy itself; return (dgain, dbias)."""
    dgain = input.new_empty(gain.shape, dtype=accumulation_dtype(input.dtype))
    dbias = torch.empty_like(dgain)
    if input.numel() == 0:
        return dgain.zero_(), dbias.zero_()
    sizes = _sizes(input, gain, channel_dim)
    plan = reduction(sizes)
    groups = dgain.numel()
    partials = new_partials(input, 2, plan.splits, groups)
    with on_device(input):
        _backward_kernel[(sizes.members * plan.splits * plan.channel_blocks,)](
            aligned(dy), aligned(input), aligned(gain.contiguous()), aligned(contiguous(bias)), out, dgain, dbias,
            partials, groups=groups, **_launch_arguments(sizes, plan, bias, activation),
        )  # fmt: skip
        if partials is not None:
            merge_sums(dgain, dbias, partials)
    return dgain, dbias
