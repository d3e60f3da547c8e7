"""Ensemble batch norm of z = u · gain_k + shift_k, by the batch's statistics, without computing z.

With v the variance of u:   q = 1 / √(gain² v + eps),   y = activation( (u − ū) · gain q · weight + bias + residual )
    mean z = gain · ū + shift,   var z = gain² · v
    dgain = weight · eps · q³ · Σ dz' (u − ū),   dshift = 0;   dz' = dy · activation'

With an output gain s, y is s times that, and dz' is s · dy.

The gain's place is in the statistics, rstd = gain · q: no pass over memory, and right where a gain is 0. The backward
is that of ensemble_batch_norm with this rstd; the forward is one op on the CPU, elsewhere the two halves.
Shapes: K members, C channels; u [K·B, C, *], gain [K, C], shift [K, C] or [C].
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..reference import ensemble_batch_norm as reference
from ..reference import member_gain as gain_reference
from . import registry
from .double_backward import aliases, is_differentiated
from .ensemble_batch_norm_autograd import affine_grad, gradients_before, through_gain
from .layout import contiguous, dense, dense_like


def forward_in_halves(
    namespace, input, gain, weight, bias, residual, eps, num_members, activation, output_gain=None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return y, mean and variance of input [K, C], rstd = gain · q [K, C], and the mask of the ReLU."""
    mean, var = registry.op(namespace, "ensemble_batch_norm_statistics")(input, num_members)
    gain = gain.to(mean.dtype)
    rstd = gain * _deviation(gain, var, eps)
    scale = rstd if weight is None else rstd * weight
    y, mask = registry.op(namespace, "ensemble_batch_norm_apply")(
        input, mean, torch.ones_like(rstd), scale, bias, residual, num_members, activation, output_gain
    )
    return y, mean, var, rstd, mask


def _deviation(gain: Tensor, var: Tensor, eps: float) -> Tensor:
    """q, from a gain in var's type."""
    return (gain.square() * var + eps).rsqrt()


class _GainBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, namespace, input, gain, shift, weight, bias, residual, output_gain, eps, num_members, activation, move
    ):
        whole = registry.op(namespace, "ensemble_batch_norm_with_gain")
        run = whole if namespace == registry.NATIVE else partial(forward_in_halves, namespace)
        y, mean, var, rstd, mask = run(input, gain, weight, bias, residual, eps, num_members, activation, output_gain)
        ctx.save_for_backward(input, mean, var, rstd, bias, mask, gain, shift, weight, output_gain)
        ctx.settings, ctx.namespace, ctx.eps = (num_members, activation), namespace, eps
        wide = gain.to(mean.dtype)
        mean_z = mean * wide if shift is None else torch.addcmul(shift.to(mean.dtype), mean, wide)
        var_z = var * wide.square()
        ctx.mark_non_differentiable(mean_z, var_z)
        if move is not None:
            move(mean_z, var_z)
        return y, mean_z, var_z

    @staticmethod
    def backward(ctx, dy, *_):
        input, mean, var, rstd, bias, mask, gain, shift, weight, output_gain = ctx.saved_tensors
        if is_differentiated((dy, input, gain, weight, bias, output_gain)):
            return _differentiable_gradients(ctx, dy)
        dy = dense_like(dy, input)
        _, _, needs_gain, needs_shift, needs_weight, needs_bias, needs_residual, needs_output, *_ = ctx.needs_input_grad
        write_dresidual = needs_residual and ctx.settings[1] != "none"
        zero = rstd == 0  # of a gain of 0, whose gradient needs the sum before rstd: 1 for rstd, and 0 for weight
        divisor = torch.where(zero, 1, rstd)
        factor = torch.where(zero, 0, torch.ones_like(rstd) if weight is None else weight.to(rstd.dtype))
        num_members, activation = ctx.settings
        dx, product, total, dresidual = registry.op(ctx.namespace, "ensemble_batch_norm_backward")(
            dy, input, mean, divisor, factor, bias, mask, True, num_members, activation, write_dresidual, output_gain
        )
        product = product / divisor
        doutput = None
        if output_gain is not None:
            scale = rstd if weight is None else rstd * weight
            doutput, product, total = through_gain(output_gain, scale, bias, product, total)
        dgain = None
        if needs_gain:
            dgain = ctx.eps * _deviation(gain.to(var.dtype), var, ctx.eps).pow(3) * product
            dgain = affine_grad(dgain if weight is None else dgain * weight, gain)
        return (
            None,
            dx,
            dgain,
            torch.zeros_like(shift) if needs_shift else None,
            affine_grad(rstd * product, weight) if needs_weight else None,
            affine_grad(total, bias) if needs_bias else None,
            (dresidual if write_dresidual else dy) if needs_residual else None,
            doutput if needs_output else None,
            *(None,) * 4,
        )


def _differentiable_gradients(ctx, dy: Tensor) -> tuple:
    """The same gradients by the reference formula, so that they can be differentiated again."""
    input, _, _, _, bias, mask, gain, shift, weight, output_gain = ctx.saved_tensors
    input, gain, weight, bias, output_gain = aliases((input, gain, weight, bias, output_gain))
    num_members, activation = ctx.settings
    z = gain_reference.member_gain(input, gain, None, 1, "none")
    y, _, _ = reference.ensemble_batch_norm(z, None, None, weight, bias, None, True, ctx.eps, num_members, "none")
    _, needs_input, needs_gain, needs_shift, *needs_affine, needs_residual, needs_output = ctx.needs_input_grad[:8]
    dx, dgain, dweight, dbias, doutput, dz = gradients_before(
        y, dy, mask, activation, (input, gain, weight, bias, output_gain),
        (needs_input, needs_gain, *needs_affine, needs_output), output_gain,
    )  # fmt: skip
    dshift = torch.zeros_like(shift) if needs_shift else None
    return None, dx, dgain, dshift, dweight, dbias, dz if needs_residual else None, doutput, *(None,) * 4


def normalize_with_gain(
    input: Tensor,
    gain: Tensor,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    num_members: int,
    activation: str,
    output_gain: Tensor | None = None,
    move: Callable[[Tensor, Tensor], None] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y, mean, biased variance) of z = input · gain + shift; arguments unchecked.

    move is called with mean and variance, detached, before they normalize.

    Saved for backward: input, a few [K, C] and, with residual and ReLU, one bit a value.
    """
    namespace = registry.namespace_for(input, "ensemble_batch_norm")
    settings = (eps, num_members, activation)
    if namespace is None or torch._C._are_functorch_transforms_active():
        z = gain_reference.member_gain(input, gain, shift, 1, "none")
        return reference.ensemble_batch_norm(z, None, None, weight, bias, residual, True, *settings, output_gain, move)
    input = dense(input)
    residual = None if residual is None else dense_like(residual, input)
    weight, bias, output_gain = contiguous(weight), contiguous(bias), contiguous(output_gain)
    gain = gain.contiguous()
    return _GainBatchNorm.apply(namespace, input, gain, shift, weight, bias, residual, output_gain, *settings, move)
