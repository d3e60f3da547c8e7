"""A linear layer with rank-1 gains: one weight, shared by the members, and gains of each member's own.

    y_k = ((x_k ∘ s_k) · Wᵀ) ∘ r_k + bias,   that is   x_k · W_kᵀ + bias with W_k = W ∘ (r_k s_kᵀ)

Symbols: s = input_gain, r = output_gain, W = weight. Shapes: K members, R rows a member (all leading dimensions).

Three ways to the same numbers; none divides by a gain. With many rows a member the gains go into the weight, K times,
and no pass over rows is left; with fewer, on a CPU, into the products themselves; else over the rows, and all members
share one product. The first two keep nothing for backward but the arguments, the last the product before its gain.

Registered ops: `rank1_linear` and `rank1_linear_backward`: natively made of other operators, the same on every device;
in Triton products with the gains inside. `product` is what the first keeps for the second, [K, R, out], or empty;
without it the second computes it again.
"""

import math
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ..reference import rank1_linear as reference
from ..reference.precision import accumulation_dtype
from . import rank1_linear_by_rows as by_rows
from . import rank1_linear_folded as folded
from . import rank1_linear_tiled as tiled
from . import registry
from .autocast import without_autocast
from .double_backward import aliases
from .rank1_linear_checks import check_arguments

# ---------------------------------------------------------------------------------------------- which way

_PASSES_OVER_WEIGHT = 1.5
_TILED_ROWS = 64
_SMALL_WEIGHT = 1 << 14


def _way(x: Tensor, weight: Tensor) -> ModuleType:
    """The module that runs x [K, R, in]: folded when R · (in + out) ≥ 1.5 · in · out, tiled or by_rows otherwise.

    Folded passes over [out, in] a member, by_rows over [R, in] and [R, out] as often; the factor is where both were
    measured to last equally long on a CPU. Tiled passes over [out, in] a member once, which few rows do not repay
    unless the weight is small; then its few calls count. K has no say: a member's result must not depend on how many
    others there are.
    """
    rows, (out_features, in_features) = x.size(1), weight.shape
    if rows * (in_features + out_features) >= _PASSES_OVER_WEIGHT * in_features * out_features:
        return folded
    one_type = x.dtype in (torch.float32, torch.float64)  # parameters then have it, too
    pays = rows >= _TILED_ROWS or weight.numel() <= _SMALL_WEIGHT
    return tiled if x.device.type == "cpu" and one_type and pays else by_rows


# ---------------------------------------------------------------------------------------------- the native op


def _rows(tensor: Tensor, num_members: int) -> Tensor:
    """[K·B, *, C] to a contiguous [K, R, C]."""
    *leading, channels = tensor.shape
    return tensor.reshape(num_members, math.prod(leading) // num_members, channels).contiguous()


def _forward(input, weight, input_gain, output_gain, bias) -> tuple[Tensor, Tensor]:
    """Return y and the product before its gain, empty where nobody needs it again."""
    x = _rows(input, input_gain.size(0))
    with without_autocast(x.device):
        way = _way(x, weight)
        if way is by_rows:
            y, product = by_rows.forward(x, weight, input_gain, output_gain, bias)
        else:
            y, product = way.forward(x, weight, input_gain, output_gain, bias), x.new_empty(0)
    return y.view(*input.shape[:-1], weight.size(0)), product


def _backward(dy, input, weight, input_gain, output_gain, bias, product, needs: Sequence[bool]) -> list[Tensor]:
    """Return the gradients of the five arguments of `_forward`, empty tensors for those that need none."""
    num_members = input_gain.size(0)
    x, dy = _rows(input, num_members), _rows(dy, num_members)
    with without_autocast(x.device):
        way = _way(x, weight)
        if way is by_rows:
            gradients = by_rows.backward(dy, x, weight, input_gain, output_gain, product, needs)
        else:
            gradients = way.backward(dy, x, weight, input_gain, output_gain, needs)
    if needs[4]:
        dbias = dy.sum(1, dtype=accumulation_dtype(dy.dtype)) if gradients[4] is None else gradients[4]
        gradients[4] = dbias if bias.dim() == 2 else dbias.sum(0)
    arguments = (input, weight, input_gain, output_gain, bias)
    return [
        input.new_empty(0) if gradient is None or not need else gradient.view(argument.shape).to(argument.dtype)
        for gradient, argument, need in zip(gradients, arguments, needs)
    ]


# ---------------------------------------------------------------------------------------------- registration


def _fake_forward(input, weight, input_gain, output_gain, bias):
    y = input.new_empty(*input.shape[:-1], weight.size(0))
    x = _rows(input, input_gain.size(0))
    return y, input.new_empty(*x.shape[:2], weight.size(0)) if _way(x, weight) is by_rows else input.new_empty(0)


def _fake_triton_forward(input, weight, input_gain, output_gain, bias):
    return input.new_empty(*input.shape[:-1], weight.size(0)), input.new_empty(0)


def _fake_backward(dy, input, weight, input_gain, output_gain, bias, product, needs):
    arguments = (input, weight, input_gain, output_gain, bias)
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format) if need else input.new_empty(0)
        for t, need in zip(arguments, needs)
    ]


_ARGUMENTS = "Tensor input, Tensor weight, Tensor input_gain, Tensor output_gain, Tensor? bias"
registry.define(
    "rank1_linear",
    f"({_ARGUMENTS}) -> (Tensor output, Tensor product)",
    _fake_forward,
    op_file="rank1_linear",
    composite=_forward,
    triton_fake=_fake_triton_forward,
)
registry.define(
    "rank1_linear_backward",
    f"(Tensor dy, {_ARGUMENTS}, Tensor? product, bool[] needs) -> Tensor[]",
    _fake_backward,
    op_file="rank1_linear",
    composite=_backward,
)

# ---------------------------------------------------------------------------------------------- autograd


def _setup_context(ctx, inputs, output):
    _, product = output
    ctx.save_for_backward(*inputs, product if product.numel() and ctx.needs_input_grad[-2] else None)
    ctx.mark_non_differentiable(product)
    ctx.set_materialize_grads(False)


def _gradients(ctx, dy: Tensor | None, backward) -> tuple:
    """Return the gradients of the five arguments; backward: the op, or its implementation."""
    *arguments, product = ctx.saved_tensors
    if dy is None:
        return (None,) * len(arguments)
    needs = [bool(need) for need in ctx.needs_input_grad[-len(arguments) :]]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (dy, *arguments)):
        return _differentiable_gradients(dy, arguments, needs)
    return tuple(gradient if need else None for gradient, need in zip(backward(dy, *arguments, product, needs), needs))


def _differentiable_gradients(dy: Tensor, arguments, needs: Sequence[bool]) -> tuple:
    """The same gradients by the reference formula, so that they can be differentiated again."""
    arguments = aliases(arguments)
    needed = [argument for argument, need in zip(arguments, needs) if need]
    with without_autocast(dy.device):
        found = iter(torch.autograd.grad(reference.rank1_linear(*arguments), needed, dy, create_graph=True))
    return tuple(next(found) if need else None for need in needs)


class _Rank1Linear(torch.autograd.Function):
    """The eager path: less overhead a call than the registered op's generated autograd."""

    @staticmethod
    def forward(ctx, namespace, *arguments):
        if namespace == registry.NATIVE:
            found = _forward(*arguments)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                found = registry.op(namespace, "rank1_linear")(*arguments)
        _setup_context(ctx, arguments, found)
        ctx.namespace = namespace
        return found

    @staticmethod
    def backward(ctx, dy, _):
        backward = _backward if ctx.namespace == registry.NATIVE else registry.op(ctx.namespace, _BACKWARD)
        return None, *_gradients(ctx, dy, backward)


def _registered_gradients(namespace, ctx, dy, _):
    return _gradients(ctx, dy, registry.op(namespace, _BACKWARD))


_BACKWARD = "rank1_linear_backward"
registry.register_autograd("rank1_linear", _registered_gradients, _setup_context)

# ---------------------------------------------------------------------------------------------- public


def rank1_linear(
    input: Tensor,  # [K·B, …, in]
    weight: Tensor,  # [out, in]
    input_gain: Tensor,  # [K, in]
    output_gain: Tensor,  # [K, out]
    bias: Tensor | None = None,  # [K, out] or [out]
) -> Tensor:
    """Apply a linear layer to each member's rows with that member's own weight W ∘ (r_k s_kᵀ).

        y_k = ((x_k ∘ s_k) · Wᵀ) ∘ r_k + bias

    Equals `F.linear(x_k, weight * output_gain[k][:, None] * input_gain[k], bias)` on each member's slice.

    Args:
        input: member-major (row i is member i // B's); float32, bfloat16, float16 or float64, any strides. Under
            autocast it joins autocast's type, as in F.linear.
        weight: shared by the members; float32 or input's type, as everything that follows.
        input_gain, output_gain: s and r, any sign or zero.
        bias: [out] shared by the members, or one for each, or None.

    Returns:
        [K·B, …, out], input's type.

    Raises:
        ValueError: a shape does not fit.
        TypeError: an argument has the wrong Python type.
        NotImplementedError: a dtype or tensor layout that is not supported.

    Cost:
        The plain layer's products and, natively: with many rows a member (R · (in + out) ≥ 1.5 · in · out), some ten
        passes over [out, in] a member; with fewer, on a CPU in float32, three, if there are 64 or the weight is small;
        else two passes over rows forward and three backward, and saved beside the arguments the product before its
        gain, as large as the output. In Triton no pass beside the products. Gradients to be differentiated again come
        from the plain formula.

    Source: von Oswald et al., ICLR 2021, section 2 (rank-1 late-phase weights, as in BatchEnsemble: Wen et al., 2020).
    """
    arguments = _autocast(input, weight, input_gain, output_gain, bias)
    check_arguments(*arguments)
    if torch._C._are_functorch_transforms_active():
        with without_autocast(input.device):
            return reference.rank1_linear(*arguments)
    namespace = registry.namespace_for(input, "rank1_linear") or registry.NATIVE
    if torch.compiler.is_compiling():
        return registry.op(namespace, "rank1_linear")(*arguments)[0]
    return _Rank1Linear.apply(namespace, *arguments)[0]


def _autocast(input, *parameters):
    """Under autocast: input in autocast's type, parameters in it or in float32, whose digits are of use."""
    if not isinstance(input, Tensor) or input.dtype == torch.float64:
        return input, *parameters
    device = input.device.type
    if not torch.is_autocast_enabled(device):
        return input, *parameters
    dtype = torch.get_autocast_dtype(device)
    halves = (torch.bfloat16, torch.float16)
    cast = (t.to(dtype) if isinstance(t, Tensor) and t.dtype in halves else t for t in parameters)
    return input.to(dtype), *cast
