"""A linear layer with rank-1 gains in Triton: the plain layer's three products, with all gains inside.

    y_k = ((x_k ∘ s_k) · Wᵀ) ∘ r_k + bias        dx_k = ((dy_k ∘ r_k) · W) ∘ s_k
    dW = Σ_k (r_k s_kᵀ) ∘ H_k,   ds_k = colsum(r_k · H_k ∘ W),   dr_k = rowsum(H_k ∘ W · s_k),   H_k = dy_kᵀ x_k

Symbols: s = input_gain, r = output_gain, W = weight. Shapes: K members, R rows a member.
y and dx are one kernel. H_k never leaves the registers: a program has one tile of it after the other, adds each to its
tile of dW, and leaves its part of ds_k and dr_k; parts are added up by a second, small kernel.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.layout import contiguous
from ..reference.precision import accumulation_dtype
from .tiles import aligned, dot_types, is_shared, jit, on_device, operand, unit

PROGRAMS = 264  # two for each multiprocessor of a large GPU
ROWS_PER_SPLIT = 512  # at least
GROUPED_ROWS = 8  # tiles of rows whose programs run side by side, to meet in the L2 cache
MERGE_COLUMNS = 256


@jit
def _product_kernel(
    a, b, inner_gain, outer_gain, bias, out, rows, inner_units, outer_units,
    INNER_UNIT: tl.constexpr, OUTER_UNIT: tl.constexpr, TRANSPOSED: tl.constexpr,
    BIAS_SHARED: tl.constexpr, ACC: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    EVEN: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of one member's rows of ((a ∘ inner_gain) · b) ∘ outer_gain + bias.

    a [K, rows, inner]; b [inner, outer], TRANSPOSED: [outer, inner]; EVEN: BLOCK_K divides inner.
    """
    inner, outer = inner_units * INNER_UNIT, outer_units * OUTER_UNIT
    row_tiles, column_tiles = tl.cdiv(rows, BLOCK_M), tl.cdiv(outer, BLOCK_N)
    program = tl.program_id(0)
    member = (program // (row_tiles * column_tiles)).to(tl.int64)
    tile = program % (row_tiles * column_tiles)
    first = tile // (GROUP * column_tiles) * GROUP
    grouped = tl.minimum(row_tiles - first, GROUP)
    first_row = (first + tile % (GROUP * column_tiles) % grouped) * BLOCK_M
    first_column = tile % (GROUP * column_tiles) // grouped * BLOCK_N

    # A scalar base, which moves, and offsets within a tile: a row that is not there reads another's, and stores none.
    row, column, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    in_rows, in_columns = row < rows - first_row, column < outer - first_column
    a += (member * rows + first_row) * inner
    a_offset = tl.minimum(row, rows - 1 - first_row)[:, None] * inner + k[None, :]
    if TRANSPOSED:
        b += first_column.to(tl.int64) * inner
        b_offset = column[None, :] * inner + k[:, None]
        b_step = BLOCK_K
    else:
        b += first_column
        b_offset = k[:, None] * outer + column[None, :]
        b_step = BLOCK_K * outer
    inner_gain += member * inner
    acc = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for first_k in range(0, inner, BLOCK_K):
        if EVEN:
            values = tl.load(a + a_offset)
            gain = tl.load(inner_gain + k)
            factor = tl.load(b + b_offset, in_columns[None, :], other=0.0)
        else:
            valid = k < inner - first_k
            values = tl.load(a + a_offset, valid[None, :], other=0.0)
            gain = tl.load(inner_gain + k, valid, other=0.0)
            factor = tl.load(b + b_offset, valid[:, None] & in_columns[None, :], other=0.0)
        scaled = (values.to(ACC) * gain.to(ACC)[None, :]).to(values.dtype)
        scaled, factor = operand(scaled, OPERAND, PRECISION), operand(factor, OPERAND, PRECISION)
        acc = tl.dot(scaled, factor, acc, input_precision=PRECISION, out_dtype=ACC)
        a += BLOCK_K
        b += b_step
        inner_gain += BLOCK_K

    outer_offset = member * outer + first_column
    gain = tl.load(outer_gain + outer_offset + column, in_columns, other=0.0).to(ACC)
    shift = tl.zeros_like(gain)
    if bias is not None:
        bias += first_column if BIAS_SHARED else outer_offset
        shift = tl.load(bias + column, in_columns, other=0.0).to(ACC)
    result = tl.fma(acc, tl.broadcast_to(gain[None, :], acc.shape), tl.broadcast_to(shift[None, :], acc.shape))
    out += (member * rows + first_row) * outer + first_column
    place = row[:, None] * outer + column[None, :]
    tl.store(out + place, result.to(out.dtype.element_ty), in_rows[:, None] & in_columns[None, :])


@triton.jit
def _outer_product(
    dy, x, rows, in_j, in_i, out_features, in_features, WITH_SUMS: tl.constexpr, ACC: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """dyᵀ x of the first `rows` rows, and the column sums of dy."""
    row = tl.arange(0, BLOCK_M)[:, None]
    dy_offset = row * out_features + tl.arange(0, BLOCK_O)[None, :]
    x_offset = row * in_features + tl.arange(0, BLOCK_I)[None, :]
    h, sums = tl.zeros([BLOCK_O, BLOCK_I], ACC), tl.zeros([BLOCK_O, 16], ACC)
    for first in range(0, rows, BLOCK_M):
        valid = row < rows - first
        dy_tile = tl.load(dy + dy_offset, valid & in_j[None, :], other=0.0)
        x_tile = tl.load(x + x_offset, valid & in_i[None, :], other=0.0)
        left = tl.trans(dy_tile).to(OPERAND)
        rounded, x_tile = operand(left, OPERAND, PRECISION), operand(x_tile, OPERAND, PRECISION)
        h = tl.dot(rounded, x_tile, h, input_precision=PRECISION, out_dtype=ACC)
        if WITH_SUMS:
            ones = tl.full([BLOCK_M, 16], 1.0, OPERAND)
            sums = tl.dot(left, ones, sums, input_precision="ieee", out_dtype=ACC)
        dy += BLOCK_M * out_features
        x += BLOCK_M * in_features
    return h, tl.max(sums, 1)


@jit
def _weight_gradient_kernel(
    dy, x, weight, input_gain, output_gain, dweight, ds, dr, dbias,
    members, rows, in_units, out_units, splits, rows_per_split, items, items_per_group,
    IN_UNIT: tl.constexpr, OUT_UNIT: tl.constexpr,
    ACC: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One tile of one group's dweight [groups, out, in], from the group's items; an item is a split of a member's rows.

    Each item leaves its tile's parts: of ds [out tiles · splits, K, in], dr [in tiles · splits, K, out] and, from the
    first tile of inputs, dbias [splits, K, out]. What is None is not computed.
    """
    in_features, out_features = in_units * IN_UNIT, out_units * OUT_UNIT
    in_tiles, out_tiles = tl.cdiv(in_features, BLOCK_I), tl.cdiv(out_features, BLOCK_O)
    in_tiles, out_tiles = tl.maximum(in_tiles, 1), tl.maximum(out_tiles, 1)
    program = tl.program_id(0)
    in_tile, out_tile = program % in_tiles, program // in_tiles % out_tiles
    group = program // in_tiles // out_tiles
    i, j = tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_O)
    first_i, first_j = in_tile * BLOCK_I, out_tile * BLOCK_O
    in_i, in_j = i < in_features - first_i, j < out_features - first_j
    corner = first_j.to(tl.int64) * in_features + first_i
    place = j[:, None] * in_features + i[None, :]
    valid = in_j[:, None] & in_i[None, :]
    total = tl.zeros([BLOCK_O, BLOCK_I], ACC)
    for item in range(group * items_per_group, tl.minimum((group + 1) * items_per_group, items)):
        member, split = (item // splits).to(tl.int64), item % splits
        first = split * rows_per_split
        count = tl.minimum(rows_per_split, rows - first)
        own_dy = dy + (member * rows + first) * out_features + first_j
        own_x = x + (member * rows + first) * in_features + first_i
        own_i, own_j = member * in_features + first_i + i, member * out_features + first_j + j
        s = tl.load(input_gain + own_i, in_i, other=0.0).to(ACC)[None, :]
        r = tl.load(output_gain + own_j, in_j, other=0.0).to(ACC)[:, None]
        if dbias is None or in_tile > 0:
            h, sums = _outer_product(
                own_dy, own_x, count, in_j, in_i, out_features, in_features, False,
                ACC, OPERAND, PRECISION, BLOCK_O, BLOCK_I, BLOCK_M,
            )  # fmt: skip
        else:
            h, sums = _outer_product(
                own_dy, own_x, count, in_j, in_i, out_features, in_features, True,
                ACC, OPERAND, PRECISION, BLOCK_O, BLOCK_I, BLOCK_M,
            )  # fmt: skip
            tl.store(dbias + split.to(tl.int64) * members * out_features + own_j, sums, in_j)
        if dweight is not None:
            total += h * (r * s)
        if ds is not None or dr is not None:
            h *= tl.load(weight + corner + place, valid, other=0.0).to(ACC)
            if ds is not None:
                part = (out_tile * splits + split).to(tl.int64) * members
                tl.store(ds + part * in_features + own_i, tl.sum(h * r, 0), in_i)
            if dr is not None:
                part = (in_tile * splits + split).to(tl.int64) * members
                tl.store(dr + part * out_features + own_j, tl.sum(h * s, 1), in_j)
    if dweight is not None:
        dweight += group.to(tl.int64) * out_features * in_features + corner
        tl.store(dweight + place, total, valid)


@jit
def _merge_kernel(total, parts, count, columns, ACC: tl.constexpr, BLOCK_C: tl.constexpr):
    """total [columns] ← the sum of parts [count, columns]."""
    column = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = column < columns
    acc = tl.zeros([BLOCK_C], ACC)
    part = parts + column
    for _ in range(0, count):
        acc += tl.load(part, valid, other=0.0)
        part += columns
    tl.store(total + column, acc, valid)


# ---------------------------------------------------------------------------------------------- plans


class Tile(NamedTuple):
    """A tile of a product: rows × columns of the result, the length of one step of the sum, warps and stages."""

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int


# By how operands are multiplied: as they are, rounded to TF32, or exactly (which no matrix unit does for float32);
# narrow: rows that vectors of 8 bytes do not keep to. Of rows a member, up to: the tile. Not yet measured.
_PRODUCT_TILES = {
    "16 bits": {32: Tile(32, 64, 128, 4, 4), 64: Tile(64, 128, 64, 4, 4), 1 << 62: Tile(128, 128, 64, 8, 3)},
    "tf32": {32: Tile(32, 64, 32, 4, 4), 64: Tile(64, 64, 32, 4, 4), 1 << 62: Tile(128, 128, 32, 8, 3)},
    "ieee": {32: Tile(32, 32, 32, 4, 2), 1 << 62: Tile(64, 64, 16, 8, 2)},
    "narrow": {1 << 62: Tile(32, 64, 32, 4, 2)},
}
_GRADIENT_TILES = {  # m: of out, n: of in
    "16 bits": Tile(64, 64, 32, 8, 4),
    "tf32": Tile(64, 64, 16, 8, 3),
    "ieee": Tile(64, 64, 16, 8, 2),
    "narrow": Tile(32, 32, 16, 8, 3),
}
_SMALLEST = 16  # that a matrix unit takes


def _kind(dtype: torch.dtype, precision: str, *columns: int) -> str:
    """Return which tiles products of rows of so many columns have."""
    if dtype.itemsize * min(map(unit, columns)) < 8:
        return "narrow"
    return "16 bits" if dtype.itemsize == 2 else precision


def tile_for(table: dict[str, dict[int, Tile]], dtype: torch.dtype, precision: str, rows: int, *columns: int) -> Tile:
    """Return a table's tile for so many rows a member and rows of so many columns."""
    return next(tile for most, tile in table[_kind(dtype, precision, *columns)].items() if rows <= most)


def shrunk(tile: Tile, m: int, n: int, k: int) -> Tile:
    """Return tile, no larger than a result of m × n values and a sum of length k need."""
    m, n, k = (max(_SMALLEST, min(side, triton.next_power_of_2(size))) for side, size in zip(tile, (m, n, k)))
    return Tile(m, n, k, tile.num_warps, tile.num_stages)


def product_tile(dtype: torch.dtype, precision: str, rows: int, inner: int, outer: int) -> Tile:
    """Return the tile of a product of `rows` rows a member; K has no say."""
    return shrunk(tile_for(_PRODUCT_TILES, dtype, precision, rows, inner, outer), rows, outer, inner)


class GradientPlan(NamedTuple):
    """How H_k is cut: tiles, and splits of a member's rows."""

    tile: Tile
    in_tiles: int
    out_tiles: int
    splits: int
    rows_per_split: int


def gradient_plan(dtype: torch.dtype, precision: str, rows: int, in_features: int, out_features: int) -> GradientPlan:
    """Cut one member's H_k; K has no say."""
    tile = _GRADIENT_TILES[_kind(dtype, precision, in_features, out_features)]
    tile = shrunk(tile, out_features, in_features, rows)
    in_tiles, out_tiles = max(1, triton.cdiv(in_features, tile.n)), max(1, triton.cdiv(out_features, tile.m))
    splits = max(1, min(triton.cdiv(PROGRAMS, in_tiles * out_tiles), rows // ROWS_PER_SPLIT))
    rows_per_split = triton.cdiv(triton.cdiv(rows, splits), tile.k) * tile.k
    return GradientPlan(tile, in_tiles, out_tiles, max(1, triton.cdiv(rows, max(1, rows_per_split))), rows_per_split)


# ---------------------------------------------------------------------------------------------- launches


def _rows(tensor: Tensor, num_members: int) -> Tensor:
    """[K·B, *, C] to a contiguous, aligned [K, R, C]."""
    *leading, channels = tensor.shape
    rows = torch.Size(leading).numel() // num_members
    return aligned(tensor.reshape(num_members, rows, channels).contiguous())


def gained_product(
    a: Tensor,  # [K, R, inner]
    weight: Tensor,  # a's type
    inner_gain: Tensor,  # [K, inner]
    outer_gain: Tensor,  # [K, outer]
    bias: Tensor | None,
    *,
    transposed: bool,  # weight is [outer, inner]; else [inner, outer]
) -> Tensor:
    """Return ((a ∘ inner_gain) · weight) ∘ outer_gain + bias, [K, R, outer]."""
    num_members, rows, inner = a.shape
    outer = outer_gain.size(1)
    out = a.new_empty(num_members, rows, outer)
    types, inner_unit, outer_unit = dot_types(a.dtype), unit(inner), unit(outer)
    tile = product_tile(a.dtype, types["PRECISION"], rows, inner, outer)
    programs = num_members * triton.cdiv(rows, tile.m) * triton.cdiv(outer, tile.n)
    if programs == 0:
        return out
    with on_device(a):
        _product_kernel[(programs,)](
            a, weight, aligned(inner_gain.contiguous()), aligned(outer_gain.contiguous()), aligned(contiguous(bias)),
            out,
            rows, inner // inner_unit, outer // outer_unit, INNER_UNIT=inner_unit, OUTER_UNIT=outer_unit, **types,
            TRANSPOSED=transposed, BIAS_SHARED=is_shared(bias), EVEN=inner % tile.k == 0, GROUP=GROUPED_ROWS,
            BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return out


def _merged(parts: Tensor | None) -> Tensor | None:
    """Return the sum of parts [count, *] over its first dimension, in order."""
    if parts is None or parts.size(0) == 1:
        return None if parts is None else parts[0]
    total = torch.empty_like(parts[0])
    columns = total.numel()
    if columns > 0:
        with on_device(parts):
            _merge_kernel[(triton.cdiv(columns, MERGE_COLUMNS),)](
                total, parts, parts.size(0), columns,
                ACC=tl.float64 if parts.dtype == torch.float64 else tl.float32, BLOCK_C=MERGE_COLUMNS,
            )  # fmt: skip
    return total


def _weight_gradients(
    dy: Tensor,  # [K, R, out]
    x: Tensor,  # [K, R, in]
    weight: Tensor,  # [out, in], any type
    input_gain: Tensor,
    output_gain: Tensor,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Return dW [out, in], ds [K, in], dr [K, out] and dbias [K, out], each where it is needed, in sums' type."""
    num_members, rows, in_features = x.shape
    out_features = dy.size(2)
    types, in_unit, out_unit = dot_types(x.dtype), unit(in_features), unit(out_features)
    plan = gradient_plan(x.dtype, types["PRECISION"], rows, in_features, out_features)
    tiles, items = plan.in_tiles * plan.out_tiles, num_members * plan.splits
    items_per_group = triton.cdiv(items, min(items, triton.cdiv(PROGRAMS, tiles)))
    groups = triton.cdiv(items, items_per_group)
    shapes = (
        (groups, out_features, in_features),
        (plan.out_tiles * plan.splits, num_members, in_features),
        (plan.in_tiles * plan.splits, num_members, out_features),
        (plan.splits, num_members, out_features),
    )
    accumulate = accumulation_dtype(x.dtype)
    parts = [x.new_empty(shape, dtype=accumulate) if need else None for shape, need in zip(shapes, needs)]
    with on_device(x):
        _weight_gradient_kernel[(groups * tiles,)](
            dy, x, aligned(weight.contiguous()), aligned(input_gain.contiguous()), aligned(output_gain.contiguous()),
            *parts,
            num_members, rows, in_features // in_unit, out_features // out_unit, plan.splits, plan.rows_per_split,
            items, items_per_group, IN_UNIT=in_unit, OUT_UNIT=out_unit, **types,
            BLOCK_O=plan.tile.m, BLOCK_I=plan.tile.n, BLOCK_M=plan.tile.k,
            num_warps=plan.tile.num_warps, num_stages=plan.tile.num_stages,
        )  # fmt: skip
    return [_merged(part) for part in parts]


def rank1_linear(
    input: Tensor,  # [K·B, *, in]
    weight: Tensor,  # [out, in]
    input_gain: Tensor,  # [K, in]
    output_gain: Tensor,  # [K, out]
    bias: Tensor | None,  # [K, out] or [out]
    keep: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return y in input's type, and an empty tensor: backward needs the arguments alone."""
    x = _rows(input, input_gain.size(0))
    y = gained_product(x, aligned(weight.to(x.dtype).contiguous()), input_gain, output_gain, bias, transposed=True)
    return y.view(*input.shape[:-1], weight.size(0)), input.new_empty(0)


def rank1_linear_backward(
    dy: Tensor,  # [K·B, *, out]
    input: Tensor,  # [K·B, *, in]
    weight: Tensor,  # [out, in]
    input_gain: Tensor,  # [K, in]
    output_gain: Tensor,  # [K, out]
    bias: Tensor | None,  # [K, out] or [out]
    product: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Return the gradients of the five arguments of rank1_linear, empty tensors for those that need none."""
    num_members = input_gain.size(0)
    x, dy = _rows(input, num_members), _rows(dy, num_members)
    gradients: list[Tensor | None] = [None] * 5
    if needs[0]:
        own = aligned(weight.to(x.dtype).contiguous())
        gradients[0] = gained_product(dy, own, output_gain, input_gain, None, transposed=False)
    if any(needs[1:4]):
        gradients[1:] = _weight_gradients(dy, x, weight, input_gain, output_gain, needs[1:])
    elif needs[4]:
        gradients[4] = dy.sum(1, dtype=accumulation_dtype(dy.dtype))
    dbias = gradients[4]
    if dbias is not None and is_shared(bias):
        gradients[4] = dbias.sum(0)
    arguments = (input, weight, input_gain, output_gain, bias)
    return [
        input.new_empty(0)
        if gradient is None or argument is None or not need
        else gradient.view(argument.shape).to(argument.dtype)
        for gradient, argument, need in zip(gradients, arguments, needs)
    ]
