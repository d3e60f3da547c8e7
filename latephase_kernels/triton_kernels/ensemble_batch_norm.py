"""Ensemble batch norm in Triton: the registered ops, each by way of the on-chip tier where the groups fit.

Shapes: K members, B rows a member, C channels, S = product of the spatial sizes, n = B·S values a statistic.
Per-member tensors are [K, C]. Memory is seen as rows × columns, in the two layouts of `tiles.py`, which `mask_shape` of
ops/relu_mask.py tells apart. A member's bits depend on that member alone. There are no atomics.

    …_resident.py    on chip: one read, one launch        …_streaming.py   groups of any size
    …_formulas.py    the mathematics, once for both
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..ops.layout import contiguous, rows_of_channels
from ..ops.relu_mask import mask_shape
from ..reference.precision import accumulation_dtype
from .ensemble_batch_norm_resident import resident_backward_kernel, resident_forward_kernel, resident_plan
from .ensemble_batch_norm_streaming import (
    apply_kernel,
    apply_plan,
    backward_apply_kernel,
    backward_reduce_kernel,
    merge_statistics_kernel,
    statistics_kernel,
)
from .tiles import MERGE_GROUPS, Sizes, aligned, is_shared, merge_sums, new_partials, on_device, reduction


class _Running(NamedTuple):
    """Running statistics that a forward pass moves: mean, var [K, C], batches seen [K] or None."""

    mean: Tensor | None = None
    var: Tensor | None = None
    tracked: Tensor | None = None
    momentum: float = 0.0


def _sizes(input: Tensor, num_members: int) -> Sizes:
    spatial, batch = input.shape[2:].numel(), input.size(0) // num_members
    return Sizes(num_members, batch, input.size(1), spatial, rows_of_channels(input), input.dtype)


def _statistic(input: Tensor, num_members: int) -> Tensor:
    return input.new_empty((num_members, input.size(1)), dtype=accumulation_dtype(input.dtype))


def _affine_settings(weight: Tensor | None, bias: Tensor | None, activation: str) -> dict:
    return dict(WEIGHT_SHARED=is_shared(weight), BIAS_SHARED=is_shared(bias), ACTIVATION=activation)


def _forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float | None,
    num_members: int,
    activation: str,
    running: _Running,
    output_gain: Tensor | None = None,
    *,
    with_output: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return (mean, var, rstd, y, mask) by the batch's statistics; rstd is None where eps is, y where not asked for."""
    mean, var = _statistic(input, num_members), _statistic(input, num_members)
    rstd = None if eps is None else _statistic(input, num_members)
    sizes = _sizes(input, num_members)
    plan = resident_plan(sizes, 1) if input.numel() else None
    y = mask = None
    if with_output and plan is not None:
        y = torch.empty_like(input)
        mask = input.new_empty(mask_shape(input, residual, activation), dtype=torch.uint8)
    if input.numel() == 0:
        mean.zero_(), var.zero_()
        if rstd is not None:
            rstd.zero_()
    elif plan is None:
        _stream_statistics(input, sizes, mean, var, rstd, eps, running)
    else:
        with on_device(input):
            resident_forward_kernel[(num_members * plan.channel_blocks,)](
                aligned(input), aligned(residual), *(aligned(contiguous(t)) for t in (weight, bias, output_gain)),
                y, mask if mask is not None and mask.numel() else None, mean, var, rstd, *running,
                sizes.batch, sizes.channels, sizes.spatial, sizes.n,
                EPS=eps or 0.0, **_affine_settings(weight, bias, activation), GAIN_SHARED=is_shared(output_gain),
                ACC=sizes.acc, ROWS_OF_CHANNELS=sizes.rows_of_channels, BLOCK_R=plan.block_r, BLOCK_C=plan.block_c,
                num_warps=plan.num_warps,
            )  # fmt: skip
    if with_output and y is None:
        assert rstd is not None
        y, mask = ensemble_batch_norm_apply(
            input, mean, rstd, weight, bias, residual, num_members, activation, output_gain
        )
    return mean, var, rstd, y, mask


def _stream_statistics(
    input: Tensor, sizes: Sizes, mean: Tensor, var: Tensor, rstd: Tensor | None, eps: float | None, running: _Running
) -> None:
    plan = reduction(sizes)
    groups = mean.numel()
    partials = new_partials(input, 3, plan.splits, groups)
    extents = (sizes.batch, sizes.channels, sizes.spatial, sizes.n, groups)
    settings = dict(EPS=eps or 0.0, ACC=sizes.acc, ROWS_OF_CHANNELS=sizes.rows_of_channels)
    with on_device(input):
        input = aligned(input)
        tensors = (input, mean, var, rstd, *running[:3], partials, running.momentum)
        statistics_kernel[(sizes.members * plan.splits * plan.channel_blocks,)](
            *tensors, *extents, plan.tiles, plan.tiles_per_split, plan.splits,
            **settings, BLOCK_R=plan.block_r, BLOCK_C=plan.block_c, num_warps=plan.num_warps,
        )  # fmt: skip
        if partials is not None:
            merge_statistics_kernel[(triton.cdiv(groups, MERGE_GROUPS),)](
                *tensors, *extents, plan.splits,
                **settings, BLOCK_SPLITS=triton.next_power_of_2(plan.splits), BLOCK_GROUPS=MERGE_GROUPS,
            )  # fmt: skip


def _backward(
    dy: Tensor,
    input: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor,
    training: bool,
    num_members: int,
    activation: str,
    residual_grad: bool,
    output_gain: Tensor | None = None,
    *,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return (Σdz, Σ(dz · x̂), dx, dresidual); the last two are None where not asked for."""
    sum_dz, sum_dz_xhat = _statistic(input, num_members), _statistic(input, num_members)
    sizes = _sizes(input, num_members)
    plan = resident_plan(sizes, 2) if input.numel() else None
    dx = dresidual = None
    if with_gradient and plan is not None:
        dx = torch.empty_like(input)
        dresidual = torch.empty_like(input) if residual_grad else None
    saved = [
        aligned(t) for t in (dy, input, mean.contiguous(), rstd.contiguous(), contiguous(weight), contiguous(bias))
    ]
    bits = mask if mask.numel() else None
    settings = dict(**_affine_settings(weight, bias, activation), ACC=sizes.acc)
    extents = (sizes.batch, sizes.channels, sizes.spatial, sizes.n)
    if input.numel() == 0:
        sum_dz.zero_(), sum_dz_xhat.zero_()
    elif plan is None:
        plan = reduction(sizes)
        partials = new_partials(input, 2, plan.splits, sum_dz.numel())
        with on_device(input):
            backward_reduce_kernel[(num_members * plan.splits * plan.channel_blocks,)](
                *saved, bits, sum_dz, sum_dz_xhat, partials, *extents, sum_dz.numel(),
                plan.tiles, plan.tiles_per_split, plan.splits, **settings,
                ROWS_OF_CHANNELS=sizes.rows_of_channels, BLOCK_R=plan.block_r, BLOCK_C=plan.block_c,
                num_warps=plan.num_warps,
            )  # fmt: skip
            if partials is not None:
                merge_sums(sum_dz, sum_dz_xhat, partials)
    else:
        with on_device(input):
            resident_backward_kernel[(num_members * plan.channel_blocks,)](
                *saved, aligned(contiguous(output_gain)), bits, sum_dz, sum_dz_xhat, dx, dresidual, *extents,
                BATCH_STATISTICS=training, GAIN_SHARED=is_shared(output_gain), **settings,
                ROWS_OF_CHANNELS=sizes.rows_of_channels, BLOCK_R=plan.block_r, BLOCK_C=plan.block_c,
                num_warps=plan.num_warps,
            )  # fmt: skip
    return sum_dz, sum_dz_xhat, dx, dresidual


# ---------------------------------------------------------------------------------------------- ops


def ensemble_batch_norm_statistics(input: Tensor, num_members: int) -> tuple[Tensor, Tensor]:
    """Return (mean, biased variance), each [K, C], in float32 (float64 for float64)."""
    mean, var, *_ = _forward(input, None, None, None, None, num_members, "none", _Running(), with_output=False)
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
    output_gain: Tensor | None = None,  # [K, C] or [C]
) -> tuple[Tensor, Tensor]:
    """Return y in input's layout and the packed bits of the ReLU ([0] where the backward recomputes them)."""
    y = torch.empty_like(input)
    mask = input.new_empty(mask_shape(input, residual, activation), dtype=torch.uint8)
    if input.numel() == 0:
        return y, mask
    sizes = _sizes(input, num_members)
    plan = apply_plan(sizes)
    with on_device(input):
        apply_kernel[(plan.programs,)](
            aligned(input), mean.contiguous(), rstd.contiguous(),
            contiguous(weight), contiguous(bias), contiguous(output_gain), aligned(residual), y,
            mask if mask.numel() else None,
            sizes.batch, sizes.channels, sizes.spatial, sizes.n, sizes.rows,
            **_affine_settings(weight, bias, activation), GAIN_SHARED=is_shared(output_gain), ACC=sizes.acc,
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
    saved = (dy, input, mean, rstd, weight, bias, mask)
    sum_dz, sum_dz_xhat, *_ = _backward(*saved, True, num_members, activation, False, with_gradient=False)
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
    output_gain: Tensor | None = None,  # [K, C] or [C]
) -> tuple[Tensor, Tensor]:
    """Return (dx, dresidual); `count` values stand behind each sum, infinitely many where statistics are constants."""
    dx = torch.empty_like(input)
    dresidual = torch.empty_like(input) if residual_grad else input.new_empty([0])
    if input.numel() == 0:
        return dx, dresidual
    sizes = _sizes(input, num_members)
    plan = apply_plan(sizes)
    batch_statistics = count != float("inf")
    with on_device(input):
        backward_apply_kernel[(plan.programs,)](
            aligned(dy), aligned(input), mean.contiguous(), rstd.contiguous(),
            contiguous(weight), contiguous(bias), contiguous(output_gain), mask if mask.numel() else None,
            sum_dz.contiguous(), sum_dz_xhat.contiguous(),
            dx, dresidual if residual_grad else None,
            sizes.batch, sizes.channels, sizes.spatial, sizes.n, sizes.rows, int(count) if batch_statistics else 0,
            BATCH_STATISTICS=batch_statistics, **_affine_settings(weight, bias, activation),
            GAIN_SHARED=is_shared(output_gain), ACC=sizes.acc, ROWS_OF_CHANNELS=sizes.rows_of_channels,
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
    output_gain: Tensor | None = None,  # [K, C] or [C]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (y, mean, rstd, biased variance, mask)."""
    if training:
        arguments = (input, weight, bias, residual, eps, num_members, activation)
        mean, var, rstd, y, mask = _forward(*arguments, _Running(), output_gain, with_output=True)
    else:
        assert running_mean is not None and running_var is not None
        mean, var = (t.to(accumulation_dtype(input.dtype), copy=True).contiguous() for t in (running_mean, running_var))
        rstd = (var + eps).rsqrt()
        y, mask = ensemble_batch_norm_apply(
            input, mean, rstd, weight, bias, residual, num_members, activation, output_gain
        )
    assert rstd is not None and y is not None and mask is not None
    return y, mean, rstd, var, mask


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
    output_gain: Tensor | None = None,  # [K, C] or [C]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (y, mean, rstd, mask) of the batch, and move the running statistics."""
    running = _Running(running_mean, running_var, num_batches_tracked, momentum)
    arguments = (input, weight, bias, residual, eps, num_members, activation)
    mean, _, rstd, y, mask = _forward(*arguments, running, output_gain, with_output=True)
    assert rstd is not None and y is not None and mask is not None
    return y, mean, rstd, mask


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
    output_gain: Tensor | None = None,  # [K, C] or [C]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (dx, dweight [K, C], dbias [K, C], dresidual); dweight and dbias of what output_gain multiplies."""
    saved = (dy, input, mean, rstd, weight, bias, mask)
    settings = (num_members, activation, residual_grad, output_gain)
    dbias, dweight, dx, dresidual = _backward(*saved, training, *settings, with_gradient=True)
    if dx is None:
        count = float(input.numel() // max(mean.numel(), 1)) if training else float("inf")
        dx, dresidual = ensemble_batch_norm_backward_apply(*saved, dbias, dweight, count, *settings)
    return dx, dweight, dbias, input.new_empty([0]) if dresidual is None else dresidual
