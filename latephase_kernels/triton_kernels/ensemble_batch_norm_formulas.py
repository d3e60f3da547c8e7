"""The mathematics of ensemble batch norm on a tile, once for every tier: the same bits wherever a value is computed.

    y = activation( (x − mean_k) · rstd_k · weight_k + bias_k + residual ) · gain_k,   rstd_k = 1 / √(var_k + eps)
    dx = gain_k · weight_k · rstd_k · (dz − Σdz / n − x̂ · Σ(dz · x̂) / n),   dz = dy · activation'(z)

Shapes: K members, B rows a member, C channels, S = product of the spatial sizes, n = B·S values a statistic.
Per-member tensors are [K, C]; G = K·C of them are counted as groups, group = k·C + c.
x → y is one explicit fma in every kernel: the backward that recomputes the ReLU finds the forward's bits.
"""

import triton
import triton.language as tl


@triton.jit
def _lerp(start, end, weight):
    """As torch.lerp: exact at both ends."""
    near = (weight < 0.5) & (weight > -0.5)
    return tl.where(near, tl.fma(weight, end - start, start), tl.fma(weight - 1.0, end - start, end))


@triton.jit
def store_statistics(
    mean, var, rstd, running_mean, running_var, tracked, member, channels, num_channels, valid,
    mean_value, squares, n, momentum, EPS: tl.constexpr,
):  # fmt: skip
    """Store the statistics of channels [1, ·] from their mean and centred squares; move the running ones if given.

    Returns rstd.
    """
    group = member * num_channels + channels
    var_value = squares / n
    rstd_value = 1.0 / tl.sqrt(var_value + EPS)
    tl.store(mean + group, mean_value, valid)
    tl.store(var + group, var_value, valid)
    if rstd is not None:
        tl.store(rstd + group, rstd_value, valid)
    if running_mean is not None:
        weight = tl.zeros_like(mean_value) + momentum
        old_mean, old_var = tl.load(running_mean + group, valid), tl.load(running_var + group, valid)
        tl.store(running_mean + group, _lerp(old_mean, mean_value, weight), valid)
        tl.store(running_var + group, _lerp(old_var, squares / (n - 1.0), weight), valid)
        if tracked is not None:
            first = valid & (channels == 0)
            counter = tracked + member + tl.zeros_like(channels)
            tl.store(counter, tl.load(counter, first, other=0) + 1, first)
    return rstd_value


@triton.jit
def affine(
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
def parameters(
    mean, rstd, weight, bias, member, channel, num_channels, valid,
    WEIGHT_SHARED: tl.constexpr, BIAS_SHARED: tl.constexpr,
):  # fmt: skip
    """Load mean, rstd, weight · rstd and bias of the channels."""
    group = member * num_channels + channel
    mean_value = tl.load(mean + group, valid, other=0.0)
    rstd_value = tl.load(rstd + group, valid, other=0.0)
    scale, shift = affine(weight, bias, member, channel, num_channels, valid, rstd_value, WEIGHT_SHARED, BIAS_SHARED)
    return mean_value, rstd_value, scale, shift


@triton.jit
def times_gain(value, gain, member, channel, num_channels, valid, GAIN_SHARED: tl.constexpr):
    """value times the output gain of its channels, where there is one."""
    if gain is not None:
        index = channel if GAIN_SHARED else member * num_channels + channel
        value *= tl.load(gain + index, valid, other=0.0).to(value.dtype)
    return value


@triton.jit
def _hard_sigmoid(z):
    """min(max(z + 3, 0), 6) / 6; of NaN anything: its product with NaN is NaN."""
    return tl.minimum(tl.maximum(z + 3.0, 0.0), 6.0) * (1.0 / 6.0)


@triton.jit
def output(x, residual, mean, scale, shift, offset, valid, DTYPE: tl.constexpr, ACTIVATION: tl.constexpr):
    """y before the output gain from x, in x's type; a ReLU decides by its value as DTYPE."""
    z = tl.fma(x - mean, scale, shift)
    if residual is not None:
        z += tl.load(residual + offset, valid, other=0.0).to(x.dtype)
    if ACTIVATION == "relu" or ACTIVATION == "relu6":
        z = tl.where(z.to(DTYPE).to(x.dtype) <= 0.0, 0.0, z)
    if ACTIVATION == "relu6":
        z = tl.where(z > 6.0, 6.0, z)
    if ACTIVATION == "silu":
        z *= tl.sigmoid(z)
    if ACTIVATION == "hardswish":
        z *= _hard_sigmoid(z)
    return z


@triton.jit
def store_mask(
    mask, y, row, row_valid, first_column, columns, valid, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """The bits of a rectified tile, from a column that is a multiple of 8."""
    bits = (~(y <= 0.0) & valid).to(tl.int32) << (tl.arange(0, BLOCK_C)[None, :] % 8)
    bytes = tl.sum(tl.reshape(bits, [BLOCK_R, BLOCK_C // 8, 8]), 2).to(tl.uint8)
    mask_columns = tl.cdiv(columns, 8)
    byte = first_column // 8 + tl.arange(0, BLOCK_C // 8)[None, :]
    tl.store(mask + row * mask_columns + byte, bytes, row_valid & (byte < mask_columns))


@triton.jit
def load_mask(mask, row, row_valid, first_column, columns, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Whether the ReLU passed, of a tile from a column that is a multiple of 8: a byte is read once for its columns."""
    mask_columns = tl.cdiv(columns, 8)
    byte = first_column // 8 + tl.arange(0, BLOCK_C // 8)[None, :]
    bytes = tl.load(mask + row * mask_columns + byte, row_valid & (byte < mask_columns), other=0).to(tl.int32)
    bytes = tl.reshape(tl.broadcast_to(bytes[:, :, None], [BLOCK_R, BLOCK_C // 8, 8]), [BLOCK_R, BLOCK_C])
    return (bytes >> (tl.arange(0, BLOCK_C)[None, :] % 8)) & 1 != 0


@triton.jit
def gated(dy, centred, scale, shift, mask, row, column, columns, valid, DTYPE: tl.constexpr, ACTIVATION: tl.constexpr):
    """dz: a ReLU's by its bit, or by the output recomputed from x − mean and rounded as in forward."""
    dz = dy
    if mask is not None:
        byte = tl.load(mask + row * tl.cdiv(columns, 8) + column // 8, valid, other=0)
        dz = tl.where(((byte.to(tl.int32) >> (column % 8).to(tl.int32)) & 1) == 0, 0.0, dy)
    elif ACTIVATION == "relu":
        y = tl.fma(centred, scale, shift).to(DTYPE).to(dy.dtype)
        dz = tl.where(y <= 0.0, 0.0, dy)
    elif ACTIVATION == "relu6":
        y = tl.fma(centred, scale, shift).to(DTYPE).to(dy.dtype)
        dz = tl.where((y <= 0.0) | (y >= 6.0), 0.0, dy)
    elif ACTIVATION == "silu":
        z = tl.fma(centred, scale, shift)
        passed = tl.sigmoid(z)
        dz = dy * tl.fma(z * passed, 1.0 - passed, passed)
    elif ACTIVATION == "hardswish":
        z = tl.fma(centred, scale, shift)
        slope = tl.where(z >= 3.0, 1.0, z * (1.0 / 3.0) + 0.5)
        dz = dy * tl.where(z <= -3.0, 0.0, slope)
    return dz


@triton.jit
def input_gradient(dz, centred, factor, mean_dz, slope, BATCH_STATISTICS: tl.constexpr):
    """dx; centred = x − mean, slope = Σ(dz · x̂) · rstd / n, factor = weight · rstd · gain."""
    if BATCH_STATISTICS:
        dz = tl.fma(-centred, slope, dz - mean_dz)
    return dz * factor
