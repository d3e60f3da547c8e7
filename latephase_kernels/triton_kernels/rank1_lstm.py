"""The time loop of the rank-1 LSTM in Triton: one kernel a step each way, its product, gains and gates in one.

    z = gates_t + ((h_t−1 ∘ s_k) · Wᵀ) ∘ r_k,   i, f, o = σ(z),   g = tanh(z)
    c_t = f ∘ c_t−1 + i ∘ g,   h_t = o ∘ tanh(c_t)

Symbols: s = input_gain, r = output_gain, W = weight. Shapes: K members, B rows a member, T steps, H units; gates
[K, T, B, 4H], sequences [T, K·B, H]. A program has all four gates of its rows and units; the number of members has no
say in how. All steps go onto the stream at once, so that a loop can be captured in a CUDA graph.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.precision import accumulation_dtype
from .rank1_linear import Tile, gained_product, shrunk, tile_for
from .tiles import aligned, dot_types, jit, on_device, operand, unit


@triton.jit
def _tanh(x, ACC: tl.constexpr):
    e = tl.exp(-2.0 * tl.abs(x))
    result = (1.0 - e) / (1.0 + e)
    result = tl.where(x < 0.0, -result, result)
    if ACC == tl.float32:  # near 0 the difference loses digits
        square = x * x
        series = 1.0 + square * (
            -1.0 / 3.0 + square * (2.0 / 15.0 + square * (-17.0 / 315.0 + square * (62.0 / 2835.0)))
        )
        result = tl.where(tl.abs(x) < 0.25, x * series, result)
    return result


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _place(batch, units, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's member, its first row within it, and its first unit."""
    row_tiles, unit_tiles = tl.cdiv(batch, BLOCK_M), tl.cdiv(units, BLOCK_N)
    program = tl.program_id(0)
    member = (program // (row_tiles * unit_tiles)).to(tl.int64)
    return member, program % row_tiles * BLOCK_M, program // row_tiles % unit_tiles * BLOCK_N


@triton.jit
def _gate(gates, acc, output_gain, units, place, column, valid, in_units, Q: tl.constexpr, ACC: tl.constexpr):
    """Gate number Q before its activation; place: the tile of gate 0."""
    r = tl.load(output_gain + Q * units + column, in_units, other=0.0).to(ACC)
    z = tl.load(gates + Q * units + place, valid, other=0.0).to(ACC)
    return tl.fma(acc, tl.broadcast_to(r[None, :], acc.shape), z)


@jit
def _step_kernel(
    gates, h_before, c_before, weight, input_gain, output_gain, output, cells,
    t, members, steps, batch, unit_units, H_UNIT: tl.constexpr,
    ACC: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of step t; h_before and c_before: the sequences themselves, or at t = 0 the first states."""
    units = unit_units * H_UNIT
    member, first_row, first_unit = _place(batch, units, BLOCK_M, BLOCK_N)
    row, column, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    in_rows, in_units = row < batch - first_row, column < units - first_unit
    memory_row = member * batch + first_row
    step_rows = members.to(tl.int64) * batch
    before = tl.maximum(t - 1, 0) * step_rows + memory_row

    h_tile = h_before + before * units
    h_offset = tl.minimum(row, batch - 1 - first_row)[:, None] * units + k[None, :]
    gain_tile = input_gain + member * units
    weight_tile = weight + first_unit.to(tl.int64) * units
    gate_stride = units.to(tl.int64) * units
    weight_offset = column[None, :] * units + k[:, None]
    acc_i, acc_f = tl.zeros([BLOCK_M, BLOCK_N], ACC), tl.zeros([BLOCK_M, BLOCK_N], ACC)
    acc_g, acc_o = tl.zeros([BLOCK_M, BLOCK_N], ACC), tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for first_k in range(0, units, BLOCK_K):
        in_k = k < units - first_k
        there = in_k[:, None] & in_units[None, :]
        values = tl.load(h_tile + h_offset, in_k[None, :], other=0.0)
        gain = tl.load(gain_tile + k, in_k, other=0.0).to(ACC)
        scaled = operand((values.to(ACC) * gain[None, :]).to(values.dtype), OPERAND, PRECISION)
        w_i = operand(tl.load(weight_tile + weight_offset, there, other=0.0), OPERAND, PRECISION)
        w_f = operand(tl.load(weight_tile + gate_stride + weight_offset, there, other=0.0), OPERAND, PRECISION)
        w_g = operand(tl.load(weight_tile + 2 * gate_stride + weight_offset, there, other=0.0), OPERAND, PRECISION)
        w_o = operand(tl.load(weight_tile + 3 * gate_stride + weight_offset, there, other=0.0), OPERAND, PRECISION)
        acc_i = tl.dot(scaled, w_i, acc_i, input_precision=PRECISION, out_dtype=ACC)
        acc_f = tl.dot(scaled, w_f, acc_f, input_precision=PRECISION, out_dtype=ACC)
        acc_g = tl.dot(scaled, w_g, acc_g, input_precision=PRECISION, out_dtype=ACC)
        acc_o = tl.dot(scaled, w_o, acc_o, input_precision=PRECISION, out_dtype=ACC)
        h_tile += BLOCK_K
        gain_tile += BLOCK_K
        weight_tile += BLOCK_K

    valid = in_rows[:, None] & in_units[None, :]
    gates += ((member * steps + t) * batch + first_row) * 4 * units + first_unit
    gate_place = row[:, None] * (4 * units) + column[None, :]
    output_gain += member * 4 * units + first_unit
    i = _sigmoid(_gate(gates, acc_i, output_gain, units, gate_place, column, valid, in_units, 0, ACC))
    f = _sigmoid(_gate(gates, acc_f, output_gain, units, gate_place, column, valid, in_units, 1, ACC))
    g = _tanh(_gate(gates, acc_g, output_gain, units, gate_place, column, valid, in_units, 2, ACC), ACC)
    o = _sigmoid(_gate(gates, acc_o, output_gain, units, gate_place, column, valid, in_units, 3, ACC))
    place = row[:, None] * units + column[None, :]
    c = tl.load(c_before + before * units + first_unit + place, valid, other=0.0)
    c = f * c + i * g
    here = (t * step_rows + memory_row) * units + first_unit
    element = output.dtype.element_ty
    tl.store(gates + gate_place, i.to(element), valid)
    tl.store(gates + units + gate_place, f.to(element), valid)
    tl.store(gates + 2 * units + gate_place, g.to(element), valid)
    tl.store(gates + 3 * units + gate_place, o.to(element), valid)
    tl.store(cells + here + place, c, valid)
    tl.store(output + here + place, (o * _tanh(c, ACC)).to(element), valid)


@jit
def _step_backward_kernel(
    gates, cells, c_before, dy, dc, weight, input_gain, output_gain, dgates,
    t, members, steps, batch, unit_units, H_UNIT: tl.constexpr,
    ACC: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of dgates at step t, and of dc, which becomes the gradient of c one step before."""
    units = unit_units * H_UNIT
    member, first_row, first_unit = _place(batch, units, BLOCK_M, BLOCK_N)
    row, column, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    in_rows, in_units = row < batch - first_row, column < units - first_unit
    four_units = 4 * units
    memory_row = member * batch + first_row
    step_rows = members.to(tl.int64) * batch

    dh = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    if t + 1 < steps:
        dz_tile = dgates + ((member * steps + t + 1) * batch + first_row) * four_units
        dz_offset = tl.minimum(row, batch - 1 - first_row)[:, None] * four_units + k[None, :]
        gain_tile = output_gain + member * four_units
        weight_tile = weight + first_unit
        weight_offset = k[:, None] * units + column[None, :]
        for first_k in range(0, four_units, BLOCK_K):
            in_k = k < four_units - first_k
            values = tl.load(dz_tile + dz_offset, in_k[None, :], other=0.0)
            gain = tl.load(gain_tile + k, in_k, other=0.0).to(ACC)
            w = tl.load(weight_tile + weight_offset, in_k[:, None] & in_units[None, :], other=0.0)
            scaled = operand((values.to(ACC) * gain[None, :]).to(values.dtype), OPERAND, PRECISION)
            w = operand(w, OPERAND, PRECISION)
            dh = tl.dot(scaled, w, dh, input_precision=PRECISION, out_dtype=ACC)
            dz_tile += BLOCK_K
            gain_tile += BLOCK_K
            weight_tile += BLOCK_K * units
        s = tl.load(input_gain + member * units + first_unit + column, in_units, other=0.0).to(ACC)
        dh *= s[None, :]

    valid = in_rows[:, None] & in_units[None, :]
    place = row[:, None] * units + column[None, :]
    here = (t * step_rows + memory_row) * units + first_unit
    if dy is not None:
        dh += tl.load(dy + here + place, valid, other=0.0).to(ACC)
    of_step = ((member * steps + t) * batch + first_row) * four_units + first_unit
    gate_place = row[:, None] * four_units + column[None, :]
    gates += of_step
    i = tl.load(gates + gate_place, valid, other=0.0).to(ACC)
    f = tl.load(gates + units + gate_place, valid, other=0.0).to(ACC)
    g = tl.load(gates + 2 * units + gate_place, valid, other=0.0).to(ACC)
    o = tl.load(gates + 3 * units + gate_place, valid, other=0.0).to(ACC)
    tanh_c = _tanh(tl.load(cells + here + place, valid, other=0.0), ACC)
    before = (tl.maximum(t - 1, 0) * step_rows + memory_row) * units + first_unit
    c = tl.load(c_before + before + place, valid, other=0.0)
    dc += memory_row * units + first_unit
    dc_here = tl.load(dc + place, valid, other=0.0) + dh * o * (1.0 - tanh_c * tanh_c)
    dgates += of_step
    element = dgates.dtype.element_ty
    tl.store(dgates + gate_place, (dc_here * g * (i * (1.0 - i))).to(element), valid)
    tl.store(dgates + units + gate_place, (dc_here * c * (f * (1.0 - f))).to(element), valid)
    tl.store(dgates + 2 * units + gate_place, (dc_here * i * (1.0 - g * g)).to(element), valid)
    tl.store(dgates + 3 * units + gate_place, (dh * tanh_c * (o * (1.0 - o))).to(element), valid)
    tl.store(dc + place, dc_here * f, valid)


# ---------------------------------------------------------------------------------------------- launches

# As rank1_linear's tables, for four gates at once. Of rows a member, up to: the tile. Not yet measured.
_TILES = {
    "16 bits": {32: Tile(32, 32, 32, 4, 3), 1 << 62: Tile(64, 32, 32, 4, 3)},
    "tf32": {1 << 62: Tile(32, 32, 16, 4, 3)},
    "ieee": {1 << 62: Tile(32, 16, 16, 4, 2)},
    "narrow": {1 << 62: Tile(16, 32, 16, 4, 2)},
}


def step_tile(dtype: torch.dtype, precision: str, batch: int, units: int) -> Tile:
    """Return the tile of one step; K has no say."""
    return shrunk(tile_for(_TILES, dtype, precision, batch, units), batch, units, units)


def _launch_arguments(gates: Tensor) -> tuple[int, dict]:
    """Programs of a step, and what all its launches share."""
    num_members, steps, batch, four_units = gates.shape
    units = four_units // 4
    types, h_unit = dot_types(gates.dtype), unit(units)
    tile = step_tile(gates.dtype, types["PRECISION"], batch, units)
    return num_members * triton.cdiv(batch, tile.m) * triton.cdiv(units, tile.n), dict(
        members=num_members, steps=steps, batch=batch, unit_units=units // h_unit, H_UNIT=h_unit, **types,
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def _state(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return aligned(tensor.to(dtype).contiguous())


def rank1_lstm_steps(
    gates: Tensor,  # [K, T, B, 4H]
    h0: Tensor,  # [K·B, H]
    c0: Tensor,  # [K·B, H]
    weight: Tensor,  # [4H, H]
    input_gain: Tensor,  # [K, H]
    output_gain: Tensor,  # [K, 4H]
) -> tuple[Tensor, Tensor]:
    """Return every h and every c [T, K·B, H]; gates, the inputs' part, becomes the activated gates in place."""
    num_members, steps, batch, four_units = gates.shape
    output = gates.new_empty(steps, num_members * batch, four_units // 4)
    cells = torch.empty_like(output, dtype=accumulation_dtype(gates.dtype))
    programs, arguments = _launch_arguments(gates)
    if programs == 0:
        return output, cells
    h0, c0 = _state(h0, gates.dtype), _state(c0, cells.dtype)
    weight = _state(weight, gates.dtype)
    gains = aligned(input_gain.contiguous()), aligned(output_gain.contiguous())
    with on_device(gates):
        for t in range(steps):
            h_before, c_before = (output, cells) if t else (h0, c0)
            _step_kernel[(programs,)](
                gates, h_before, c_before, weight, *gains, output, cells, t=t, **arguments
            )  # fmt: skip
    return output, cells


def rank1_lstm_steps_backward(
    gates: Tensor,  # [K, T, B, 4H], activated
    cells: Tensor,  # [T, K·B, H]
    dy: Tensor | None,  # [T, K·B, H]
    dc_n: Tensor | None,  # [K·B, H]
    c0: Tensor,  # [K·B, H]
    weight: Tensor,  # [4H, H]
    input_gain: Tensor,  # [K, H]
    output_gain: Tensor,  # [K, 4H]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the gates before their activations, of h0 and of c0."""
    _, steps, _, _ = gates.shape
    dgates = torch.empty_like(gates)
    c0 = _state(c0, cells.dtype)
    dc = torch.zeros_like(c0) if dc_n is None else dc_n.to(cells.dtype, copy=True).contiguous()
    dy = None if dy is None else aligned(dy.contiguous())
    weight = _state(weight, gates.dtype)
    gains = aligned(input_gain.contiguous()), aligned(output_gain.contiguous())
    programs, arguments = _launch_arguments(gates)
    if programs > 0:
        with on_device(gates):
            for t in reversed(range(steps)):
                _step_backward_kernel[(programs,)](
                    gates, cells, cells if t else c0, dy, dc, weight, *gains, dgates, t=t, **arguments
                )  # fmt: skip
    input_gain, output_gain = gains
    dh0 = gained_product(aligned(dgates[:, 0].contiguous()), weight, output_gain, input_gain, None, transposed=False)
    return dgates, dh0.flatten(0, 1), dc
