"""Gradients of ensemble batch norm: the eager path's functions, and the formula of the registered op."""

import torch
from torch import Tensor

from ..reference import ensemble_batch_norm as reference
from ..reference.activation import STANDALONE
from ..reference.precision import working_dtype
from . import registry
from .double_backward import aliases, differentiate, is_differentiated
from .layout import dense_like
from .relu_mask import unpack_mask


def affine_grad(grad: Tensor, parameter: Tensor) -> Tensor:
    """Turn a [K, C] sum into the gradient of a [K, C] or shared [C] parameter."""
    if parameter.dim() == 1:
        grad = grad.sum(0)
    return grad if grad.dtype is parameter.dtype else grad.to(parameter.dtype)


def _gradients(ctx, namespace: str, dy: Tensor) -> tuple:
    """Return the gradients of (input, weight, bias, residual, output_gain) for the context that _save filled."""
    input, weight, bias, output_gain, mean, rstd, mask = ctx.saved_tensors
    needs_input, needs_weight, needs_bias, needs_residual, needs_gain, *_ = ctx.needs
    if is_differentiated((dy, input, weight, bias, output_gain)):
        return _differentiable_gradients(ctx, dy)
    training, _, num_members, activation = ctx.settings
    if dy.stride() != input.stride():
        dy = dense_like(dy, input)
    write_dresidual = needs_residual and activation != "none"
    dx, dweight, dbias, dresidual = registry.op(namespace, "ensemble_batch_norm_backward")(
        dy, input, mean, rstd, weight, bias, mask, training, num_members, activation, write_dresidual, output_gain
    )
    dgain = None
    if output_gain is not None:
        dgain, dweight, dbias = through_gain(output_gain, weight, bias, dweight, dbias)
    return (
        dx if needs_input else None,
        affine_grad(dweight, weight) if needs_weight else None,
        affine_grad(dbias, bias) if needs_bias else None,
        (dresidual if write_dresidual else dy) if needs_residual else None,
        dgain if needs_gain else None,
    )


def through_gain(
    gain: Tensor, weight: Tensor | None, bias: Tensor | None, product: Tensor, total: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of gain and the [K, C] ones of weight and bias of y = activation(x̂ · weight + bias) · gain.

    With dz = dy where the ReLU let it pass:   dgain = weight · Σ dz·x̂ + bias · Σ dz

    Args:
        product, total: [K, C], Σ dz·x̂ and Σ dz, what the gradients would be with a gain of 1.
    """
    dgain = product if weight is None else product * weight
    if bias is not None:
        dgain = dgain + total * bias
    wide = gain.to(product.dtype)
    return affine_grad(dgain, gain), product * wide, total * wide


def _differentiable_gradients(ctx, dy: Tensor) -> tuple:
    """The same gradients by the reference formula, so that they can be differentiated again."""
    input, weight, bias, output_gain, mean, rstd, mask = aliases(ctx.saved_tensors)
    training, eps, num_members, activation = ctx.settings
    running_var = None if training else rstd.double().pow(-2).to(rstd.dtype) - eps
    y, _, _ = reference.ensemble_batch_norm(
        input, mean, running_var, weight, bias, None, training, eps, num_members, "none"
    )
    *needs, needs_residual, needs_gain = ctx.needs[:5]
    *gradients, dgain, dz = gradients_before(
        y, dy, mask, activation, (input, weight, bias, output_gain), (*needs, needs_gain), output_gain
    )
    return *gradients, dz if needs_residual else None, dgain


def gradients_before(
    y: Tensor,
    dy: Tensor,
    mask: Tensor,
    activation: str,
    tensors: tuple[Tensor | None, ...],
    needs: tuple[bool, ...],
    output_gain: Tensor | None = None,
) -> tuple:
    """Return differentiable gradients of the tensors, None where no need is, and that of the residual.

    Args:
        y: computed from tensors, before residual, activation and output_gain.
        dy: of what came after them.
        mask: of the ReLU, packed, if there was a residual.
        output_gain: one of tensors, or None.
    """
    if activation in STANDALONE:
        y = reference.finish(y.to(working_dtype(y)), activation, None, y.dtype)
        return *differentiate(y, tensors, needs, dy), None
    if mask.numel():
        passed = unpack_mask(mask, y)
    else:
        passed = ~(y.detach() <= 0) if activation == "relu" else torch.ones_like(dy, dtype=torch.bool)
    y, dz = reference.finish(y.to(working_dtype(y)), "none", output_gain, y.dtype), dy * passed
    return *differentiate(y, tensors, needs, dz), dz


def _save(ctx, saved: tuple, needs: tuple, settings: tuple) -> None:
    """Keep for the backward.

    saved: (input, weight, bias, output_gain, mean, rstd, mask); settings: (training, eps, K, activation).
    """
    ctx.save_for_backward(*saved)
    ctx.needs, ctx.settings = needs, settings
    ctx.set_materialize_grads(False)


class Normalize(torch.autograd.Function):
    """The eager path: less overhead a call than the registered op's generated autograd. Returns (y, mean, var)."""

    @staticmethod
    def forward(ctx, input, weight, bias, residual, output_gain, namespace, running, settings, move):
        with torch._C._AutoDispatchBelowAutograd():
            y, mean, rstd, var, mask = registry.op(namespace, "ensemble_batch_norm")(
                input, *running, weight, bias, residual, *settings, output_gain
            )
        _save(ctx, (input, weight, bias, output_gain, mean, rstd, mask), ctx.needs_input_grad, settings)
        ctx.namespace = namespace
        ctx.mark_non_differentiable(mean, var)
        if move is not None:
            move(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx, dy, *_):
        return (None,) * 9 if dy is None else (*_gradients(ctx, ctx.namespace, dy), *(None,) * 4)


class NormalizeAndUpdate(torch.autograd.Function):
    """The eager path of training: one op that moves the running statistics as well. Returns y."""

    @staticmethod
    def forward(ctx, input, weight, bias, residual, output_gain, call):
        namespace, running, momentum, settings = call
        _, eps, num_members, activation = settings
        y, mean, rstd, mask = registry.op(namespace, "ensemble_batch_norm_update")(
            input, *running, weight, bias, residual, momentum, eps, num_members, activation, output_gain
        )
        ctx.save_for_backward(input, weight, bias, output_gain, mean, rstd, mask)
        ctx.needs, ctx.settings, ctx.namespace = ctx.needs_input_grad, settings, namespace
        return y

    @staticmethod
    def backward(ctx, dy):
        return *_gradients(ctx, ctx.namespace, dy), None


def setup_context(ctx, inputs, output):
    input, _, _, weight, bias, residual, *settings, output_gain = inputs
    _, mean, rstd, var, mask = output
    ctx.mark_non_differentiable(mean, rstd, var, mask)
    needs = tuple(t is not None and t.requires_grad for t in (input, weight, bias, residual, output_gain))
    _save(ctx, (input, weight, bias, output_gain, mean, rstd, mask), needs, tuple(settings))


def backward(namespace, ctx, dy, *_):
    if dy is None:
        return (None,) * 11
    dx, dweight, dbias, dresidual, dgain = _gradients(ctx, namespace, dy)
    return dx, None, None, dweight, dbias, dresidual, None, None, None, None, dgain
