"""What the Triton kernels of every op share: how a reduction is cut into tiles, its walk, its end, and its launch.

Shapes: K members, B rows a member, C channels, S = product of the spatial sizes, n = B·S values a member and channel;
G = K·C of these groups, group = k·C + c. Memory is seen as rows × columns, in two layouts:

    rows of channels     channels_last, [K·B, C], S = 1:   row = (k·B + b)·S + s,   column = c
    rows of one channel  contiguous with S > 1:            row = (k·B + b)·C + c,   column = s

A member's bits depend on that member alone: tiles and splits follow from (n, C, dtype, layout), never from K; arguments
that know K are not specialized; bases are 16-byte aligned, so that the compiler's choices do not depend on an address.
"""

import contextlib
import functools
import os
from typing import NamedTuple, overload

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.precision import accumulation_dtype

REDUCTION_TILE = 4096  # values
CHANNEL_BYTES = 128  # width of a reduction's tile in rows of channels
MAX_COLUMNS = 1024
PROGRAMS = 512  # of a member that a reduction is split into, where it is large enough
MAX_SPLITS = 128
MERGE_GROUPS = 16
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_UNSPECIALIZED = [
    *("batch", "n", "rows", "groups", "count", "splits", "tiles", "tiles_per_split", "block_count"),
    *("members", "items", "items_per_group", "rows_per_split", "inner_units", "outer_units", "in_units", "out_units"),
    *("t", "steps", "unit_units"),
]


def jit(function):
    """triton.jit with the integers that K or B decide left out of specialization, and floating point contracted.

    The latter is Triton's default up to 3.9, which warns of the end of it, and not from 3.10 on.
    """
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    kernel = triton.jit(do_not_specialize=[name for name in _UNSPECIALIZED if name in names])(function)
    if not INTERPRETED:
        kernel.run = functools.partial(kernel.run, enable_fp_fusion=True)
    return kernel


@triton.jit
def reduction_part(num_channels, splits, BLOCK_CHANNELS: tl.constexpr):
    """This program's member, split and channels [1, ·]."""
    program = tl.program_id(0).to(tl.int64)
    channel_blocks = tl.cdiv(num_channels, BLOCK_CHANNELS)
    member = program // channel_blocks // splits
    channels = program % channel_blocks * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)[None, :]
    return member, program // channel_blocks % splits, channels


@triton.jit
def member_tile(
    tile, member, channels, batch, num_channels, spatial, n,
    ROWS_OF_CHANNELS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Tile number `tile` of one member's channels [1, ·]: its memory rows, columns, validity and count a channel."""
    if ROWS_OF_CHANNELS:
        index = tile * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        row = member * n + index
        column = channels
        valid = (index < n) & (channels < num_channels)
        count = tl.minimum(n - tile * BLOCK_R, BLOCK_R)
    else:
        tiles_across = tl.cdiv(spatial, BLOCK_C)
        first_row = tile // tiles_across * BLOCK_R
        first_column = tile % tiles_across * BLOCK_C
        index = first_row + tl.arange(0, BLOCK_R)[:, None]
        row = (member * batch + index) * num_channels + channels
        column = first_column + tl.arange(0, BLOCK_C)[None, :]
        valid = (index < batch) & (column < spatial)
        count = tl.minimum(batch - first_row, BLOCK_R) * tl.minimum(spatial - first_column, BLOCK_C)
    return row, column, valid, count


@triton.jit
def over_tile(values, ROWS_OF_CHANNELS: tl.constexpr):
    """Sum a tile for each of its channels: [1, channels]."""
    total = tl.sum(values, 0, keep_dims=True)
    if not ROWS_OF_CHANNELS:
        total = tl.sum(total, 1, keep_dims=True)
    return total


@jit
def merge_sums_kernel(first, second, partials, groups, splits, BLOCK_SPLITS: tl.constexpr, BLOCK_GROUPS: tl.constexpr):
    """Add the splits of partials [2, splits, G] into first and second [G]."""
    group = tl.program_id(0).to(tl.int64) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)
    split = tl.arange(0, BLOCK_SPLITS)[:, None]
    valid = (split < splits) & (group < groups)[None, :]
    partial = partials + split * groups + group[None, :]
    tl.store(first + group, tl.sum(tl.load(partial, valid, other=0.0), 0), group < groups)
    tl.store(second + group, tl.sum(tl.load(partial + splits * groups, valid, other=0.0), 0), group < groups)


# ---------------------------------------------------------------------------------------------- plans


class Sizes(NamedTuple):
    """How a dense input lies in memory."""

    members: int
    batch: int
    channels: int
    spatial: int
    rows_of_channels: bool
    dtype: torch.dtype

    @property
    def n(self) -> int:
        """Values a statistic."""
        return self.batch * self.spatial

    @property
    def rows(self) -> int:
        """Rows of memory."""
        return self.members * (self.n if self.rows_of_channels else self.batch * self.channels)

    @property
    def columns(self) -> int:
        """Columns of memory."""
        return self.channels if self.rows_of_channels else self.spatial

    @property
    def vectors(self) -> bool:
        """Whether rows can be read in vectors; else each value takes an address, and a thread gets fewer values."""
        return self.columns % 16 == 0

    @property
    def acc(self) -> tl.dtype:
        """The type of statistics and sums."""
        return tl.float64 if self.dtype == torch.float64 else tl.float32


class Reduction(NamedTuple):
    """Tiles and splits of a reduction: functions of (n, C, dtype, layout) alone."""

    block_r: int
    block_c: int
    num_warps: int
    tiles: int
    tiles_per_split: int
    splits: int
    channel_blocks: int


def reduction(sizes: Sizes) -> Reduction:
    """Cut a reduction over each group of `sizes` into tiles and splits."""
    tile = REDUCTION_TILE if sizes.vectors else REDUCTION_TILE // 2
    if sizes.rows_of_channels:
        block_c = min(triton.next_power_of_2(sizes.channels), CHANNEL_BYTES // sizes.dtype.itemsize)
        block_r = min(triton.next_power_of_2(sizes.n), tile // block_c)
        tiles = triton.cdiv(sizes.n, block_r)
        channel_blocks = triton.cdiv(sizes.channels, block_c)
    else:
        block_c = min(triton.next_power_of_2(sizes.spatial), MAX_COLUMNS)
        block_r = min(triton.next_power_of_2(sizes.batch), tile // block_c)
        tiles = triton.cdiv(sizes.batch, block_r) * triton.cdiv(sizes.spatial, block_c)
        channel_blocks = sizes.channels
    splits = max(1, min(tiles // 4, triton.cdiv(PROGRAMS, channel_blocks), MAX_SPLITS))
    tiles_per_split = triton.cdiv(tiles, splits)
    splits = triton.cdiv(tiles, tiles_per_split)
    num_warps = warps_for(block_r, block_c, 16 if sizes.vectors else 8)
    return Reduction(block_r, block_c, num_warps, tiles, tiles_per_split, splits, channel_blocks)


def warps_for(block_r: int, block_c: int, values: int) -> int:
    """Warps of a tile, at so many values a thread."""
    return max(1, min(8, block_r * block_c // (32 * values)))


def dot_types(dtype: torch.dtype) -> dict:
    """The types of a product's operands and sums, and its precision in float32: what torch's own products have.

    Operands enter as they are, but for the interpreter, whose product cannot read bfloat16 and knows no TF32.
    """
    acc = tl.float64 if dtype == torch.float64 else tl.float32
    element = {torch.float16: tl.float16, torch.bfloat16: tl.float32 if INTERPRETED else tl.bfloat16}.get(dtype, acc)
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" and not INTERPRETED
    return dict(ACC=acc, OPERAND=element, PRECISION="tf32" if tf32 else "ieee")


@triton.jit
def operand(value, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """value as a product takes it: in its type, and for TF32 rounded, where tl.dot drops the bits that are too many."""
    value = value.to(OPERAND)
    if PRECISION == "tf32":
        value = tl.inline_asm_elementwise(
            "cvt.rna.tf32.f32 $0, $1;", "=r,r", [value], dtype=tl.float32, is_pure=True, pack=1
        )
    return value


def unit(extent: int) -> int:
    """Return the largest power of two, up to 16, that divides an extent.

    Kernels are given an extent in such units: the compiler, which asks of an argument only whether 16 divides it, then
    knows how far apart rows are, and reads them in the widest vectors that stay aligned.
    """
    return min(16, extent & -extent or 16)


@overload
def aligned(tensor: Tensor) -> Tensor: ...
@overload
def aligned(tensor: Tensor | None) -> Tensor | None: ...
def aligned(tensor):
    """Return tensor, or its copy at an address that is a multiple of 16."""
    return tensor if tensor is None or tensor.data_ptr() % 16 == 0 else tensor.clone()


def is_shared(parameter: Tensor | None) -> bool:
    """Whether a parameter is [C], one for all members."""
    return parameter is not None and parameter.dim() == 1


def on_device(tensor: Tensor):
    """Make the device of tensor the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def new_partials(input: Tensor, planes: int, splits: int, groups: int) -> Tensor | None:
    """Room for what each split of a reduction found; None where there is one split."""
    return input.new_empty((planes, splits, groups), dtype=accumulation_dtype(input.dtype)) if splits > 1 else None


def merge_sums(first: Tensor, second: Tensor, partials: Tensor) -> None:
    """first, second [K, C] ← the splits of partials [2, splits, G], added up."""
    _, splits, groups = partials.shape
    merge_sums_kernel[(triton.cdiv(groups, MERGE_GROUPS),)](
        first, second, partials, groups, splits,
        BLOCK_SPLITS=triton.next_power_of_2(splits), BLOCK_GROUPS=MERGE_GROUPS,
    )  # fmt: skip
