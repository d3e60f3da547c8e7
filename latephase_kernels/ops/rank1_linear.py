"""A linear layer with rank-1 gains: one weight, shared by the members, and gains of each member's own.

    y_k = ((x_k ∘ s_k) · Wᵀ) ∘ r_k + bias,   that is   x_k · W_kᵀ + bias with W_k = W ∘ (r_k s_kᵀ)

Symbols: s = input_gain, r = output_gain, W = weight. Shapes: K members, R rows a member (all leading dimensions).

Four ways to the same numbers; none divides by a gain. With many rows a member the gains go into the weight, K times,
and no pass over rows is left. With fewer all members share one product, the gains inside it where that has kernels (on
a CPU), else over the rows. For backward nothing is kept but the arguments and, with few rows, the product before its
gain.

Registered ops: `rank1_linear` and `rank1_linear_backward`: natively made of other operators, the same on every device;
in Triton products with the gains inside. `product` is what the first keeps for the second, like the output, or empty
(always without `keep`, so that a graph holds for any number of rows); without it the second computes it again.
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
from . import rank1_linear_tiled_rows as tiled_rows
from . import registry
from .autocast import autocast_dtype, without_autocast
from .double_backward import aliases, differentiate, is_batched, is_differentiated
from .rank1_linear_checks import check_arguments

# ---------------------------------------------------------------------------------------------- which way

# A way is a module of two functions, forward and backward, with the same arguments as the others. KEEPS_PRODUCT says
# whether forward, asked to keep it, returns the product before its gain beside y; else there is an empty tensor.
_PASSES_OVER_WEIGHT = 1.5
_TILED_ROWS = 80
_SMALL_WEIGHT = 1 << 14


def _way(x: Tensor, weight: Tensor, num_members: int, dtype: torch.dtype | None = None) -> ModuleType:
    """The module that runs x [K·B, …, in], or what it is in another type.

    Folded, when R · (in + out) ≥ 1.5 · in · out: it passes over [out, in] a member, by_rows over [R, in] and [R, out]
    as often; the factor is where both were measured to last equally long on a CPU. Else the tiled ways, where they have
    kernels: tiled passes over [out, in] a member once, which few rows do not repay unless the weight is small; then its
    few calls count. K has no say: a member's result must not depend on how many others there are.
    """
    out_features, in_features = weight.shape
    rows = math.prod(x.shape[:-1]) // num_members
    if rows * (in_features + out_features) >= _PASSES_OVER_WEIGHT * in_features * out_features:
        return folded
    if (
        x.device.type != "cpu"
        or (dtype or x.dtype) not in (torch.float32, torch.float64)  # parameters then have that type, too
        or registry.namespace_for(x, "rank1_product") is None
    ):
        return by_rows
    return tiled if rows >= _TILED_ROWS or weight.numel() <= _SMALL_WEIGHT else tiled_rows


def passes_over_rows(input: Tensor, weight: Tensor, num_members: int) -> bool:
    """Whether a call with this input [K·B, …, in] has passes over rows for its gains, natively; no when exporting."""
    if torch.compiler.is_exporting():  # what holds for any number of rows
        return False
    return _way(input, weight, num_members, autocast_dtype(input)) is by_rows


# ---------------------------------------------------------------------------------------------- the native op


def _forward(input, weight, input_gain, output_gain, bias, keep: bool = True) -> tuple[Tensor, Tensor]:
    """Return y and the product before its gain, empty where nobody needs it again (not keep) or the way does not."""
    x = input.contiguous()
    with without_autocast(x.device):
        return _way(x, weight, input_gain.size(0)).forward(x, weight, input_gain, output_gain, bias, keep)


def _backward(dy, input, weight, input_gain, output_gain, bias, product, needs: Sequence[bool]) -> list[Tensor]:
    """Return the gradients of the five arguments of `_forward`, empty tensors for those that need none."""
    x, dy = input.contiguous(), dy.contiguous()
    with without_autocast(x.device):
        way = _way(x, weight, input_gain.size(0))
        gradients = way.backward(dy, x, weight, input_gain, output_gain, bias, product, needs)
    if needs[4]:
        dbias = gradients[4]
        if dbias is None:
            dbias = folded.by_member(dy, input_gain).sum(1, dtype=accumulation_dtype(dy.dtype))
        gradients[4] = dbias.sum(0) if dbias.dim() > bias.dim() else dbias
    for i, (gradient, argument, need) in enumerate(
        zip(gradients, (input, weight, input_gain, output_gain, bias), needs)
    ):
        if gradient is None or not need:
            gradients[i] = input.new_empty(0)
        elif gradient.dtype != argument.dtype or gradient.shape != argument.shape:
            gradients[i] = gradient.view(argument.shape).to(argument.dtype)
    return gradients


# ---------------------------------------------------------------------------------------------- registration


def _fake_forward(input, weight, input_gain, output_gain, bias, keep=True):
    y = input.new_empty(*input.shape[:-1], weight.size(0))
    return y, input.new_empty(y.shape if keep and _way(input, weight, input_gain.size(0)).KEEPS_PRODUCT else 0)


def _fake_triton_forward(input, weight, input_gain, output_gain, bias, keep=True):
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
    f"({_ARGUMENTS}, bool keep=True) -> (Tensor output, Tensor product)",
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


def _save(ctx, arguments, found, needs: Sequence[bool]) -> None:
    """needs: of the five arguments."""
    _, product = found
    ctx.needs = [bool(need) for need in needs]
    ctx.save_for_backward(*arguments, product if product.numel() and ctx.needs[3] else None)
    ctx.mark_non_differentiable(product)
    ctx.set_materialize_grads(False)


def _setup_context(ctx, inputs, output):
    _save(ctx, inputs[:5], output, ctx.needs_input_grad[:5])


def _gradients(ctx, dy: Tensor | None, backward) -> tuple:
    """Return the gradients of the five arguments; backward: the op, or its implementation."""
    *arguments, product = ctx.saved_tensors
    if dy is None:
        return (None,) * len(arguments)
    if is_differentiated((dy, *arguments)) or is_batched(dy):
        return _formula_gradients(dy, arguments, ctx.needs)
    gradients = backward(dy, *arguments, product, ctx.needs)
    return tuple(gradient if need else None for gradient, need in zip(gradients, ctx.needs))


def _formula_gradients(dy: Tensor, arguments, needs: Sequence[bool]) -> tuple:
    """The same gradients by the reference formula, so that they can be differentiated again, or batched."""
    again = torch.is_grad_enabled()
    with torch.enable_grad(), without_autocast(dy.device):
        arguments = aliases(arguments)
        return differentiate(reference.rank1_linear(*arguments), arguments, needs, dy, again=again)


class _Rank1Linear(torch.autograd.Function):
    """The eager path: less overhead a call than the registered op's generated autograd."""

    @staticmethod
    def forward(ctx, namespace, *arguments):
        if namespace == registry.NATIVE:
            input, weight, input_gain, output_gain, bias = arguments
            found = _forward(input, weight, input_gain, output_gain, bias, ctx.needs_input_grad[-2])
        else:
            with torch._C._AutoDispatchBelowAutograd():
                found = registry.op(namespace, "rank1_linear")(*arguments)
        _save(ctx, arguments, found, ctx.needs_input_grad[1:])
        ctx.namespace = namespace
        return found

    @staticmethod
    def backward(ctx, dy, _):
        backward = _backward if ctx.namespace == registry.NATIVE else registry.op(ctx.namespace, _BACKWARD)
        return None, *_gradients(ctx, dy, backward)


def _registered_gradients(namespace, ctx, dy, _):
    return *_gradients(ctx, dy, registry.op(namespace, _BACKWARD)), None


_BACKWARD = "rank1_linear_backward"
registry.register_autograd("rank1_linear", _registered_gradients, _setup_context)

# ---------------------------------------------------------------------------------------------- public


def rank1_linear(
    input: Tensor, weight: Tensor, input_gain: Tensor, output_gain: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Apply a linear layer to each member's rows with that member's own weight W ∘ (r_k s_kᵀ).

        y_k = ((x_k ∘ s_k) · Wᵀ) ∘ r_k + bias

    Equals `F.linear(x_k, weight * output_gain[k][:, None] * input_gain[k], bias)` on each member's slice.

    Args:
        input: [K·B, …, in], member-major (row i is member i // B's); float32, bfloat16, float16 or float64, any
            strides. Under autocast it joins autocast's type, as in F.linear.
        weight: [out, in], shared by the members; float32 or input's type, as everything that follows.
        input_gain, output_gain: s [K, in] and r [K, out], any sign or zero.
        bias: [K, out], or [out] shared by the members, or None.

    Returns:
        [K·B, …, out], input's type.

    Raises:
        ValueError: a shape does not fit.
        TypeError: an argument has the wrong Python type.
        NotImplementedError: a dtype or tensor layout that is not supported.

    Cost:
        The plain layer's products and, natively: with many rows a member (R · (in + out) ≥ 1.5 · in · out), some ten
        passes over [out, in] a member; with fewer, on a CPU in float32, three, if there are 80 or the weight is small.
        With fewer still the product before its gain is saved beside the arguments, as large as the output, and else
        two passes over rows are added forward and three backward, on a CPU in float32 none. In Triton no pass beside
        the products. Gradients to be differentiated again come from the plain formula.

    Source: von Oswald et al., ICLR 2021, section 2 (rank-1 late-phase weights, as in BatchEnsemble: Wen et al., 2020).
    """
    arguments = _autocast(input, weight, input_gain, output_gain, bias)
    check_arguments(*arguments)
    transformed = torch._C._are_functorch_transforms_active()
    namespace = None if transformed else registry.namespace_for(input, "rank1_linear")
    if transformed or (namespace is None and registry.is_exporting()):
        with without_autocast(input.device):
            return reference.rank1_linear(*arguments)
    namespace = namespace or registry.NATIVE
    if torch.compiler.is_compiling():
        keep = output_gain.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_exporting()
        return registry.op(namespace, "rank1_linear")(*arguments, keep)[0]
    return _Rank1Linear.apply(namespace, *arguments)[0]


def _autocast(input, *parameters):
    """Under autocast: input in autocast's type, parameters in it or in float32, whose digits are of use."""
    dtype = autocast_dtype(input) if isinstance(input, Tensor) else None
    if dtype is None:
        return input, *parameters
    halves = (torch.bfloat16, torch.float16)
    cast = (t.to(dtype) if isinstance(t, Tensor) and t.dtype in halves else t for t in parameters)
    return input.to(dtype), *cast
