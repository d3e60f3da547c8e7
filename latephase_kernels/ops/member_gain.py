"""Member gain: a multiplier, and perhaps a shift, for each member and channel.

    y = activation( x · gain_k + bias_k )

Shapes: K members, B rows a member, C channels; row i of input [K·B, C, *] or [K·B, *, C] belongs to member k = i // B.

Registered ops, the same in both namespaces (`registry.py`): `member_gain` and `member_gain_backward`, and both `_into`
a tensor that is given, which may be x or dy itself. Their input is dense, contiguous or channels_last; gain and bias
are contiguous; channel_dim counts from the front.
"""

import torch
from torch import Tensor

from ..reference import member_gain as reference
from ..reference.precision import accumulation_dtype
from . import registry
from .double_backward import aliases, differentiate, is_differentiated
from .layout import contiguous, dense, dense_like
from .member_gain_checks import check_arguments

# ---------------------------------------------------------------------------------------------- schemas and fakes


def _fake_forward(input, gain, bias, channel_dim, activation):
    return torch.empty_like(input)


def _fake_backward(dy, input, gain, bias, channel_dim, activation):
    dgain = torch.empty_like(gain, dtype=accumulation_dtype(input.dtype))
    return torch.empty_like(input), dgain, torch.empty_like(dgain)


def _fake_into(input, gain, bias, channel_dim, activation, out):
    return None


def _fake_backward_into(dy, input, gain, bias, channel_dim, activation, out):
    return _fake_backward(dy, input, gain, bias, channel_dim, activation)[1:]


_ARGUMENTS = "Tensor input, Tensor gain, Tensor? bias, int channel_dim, str activation"

registry.define("member_gain", f"({_ARGUMENTS}) -> Tensor", _fake_forward, op_file="member_gain")
registry.define(
    "member_gain_backward",
    f"(Tensor dy, {_ARGUMENTS}) -> (Tensor dx, Tensor dgain, Tensor dbias)",
    _fake_backward,
    op_file="member_gain",
)
registry.define("member_gain_into", f"({_ARGUMENTS}, Tensor(a!) out) -> ()", _fake_into, op_file="member_gain")
registry.define(
    "member_gain_backward_into",
    f"(Tensor dy, {_ARGUMENTS}, Tensor(a!) out) -> (Tensor dgain, Tensor dbias)",
    _fake_backward_into,
    op_file="member_gain",
)

# ---------------------------------------------------------------------------------------------- autograd


def _save(ctx, input: Tensor, gain: Tensor, bias: Tensor | None, channel_dim: int, activation: str) -> None:
    ctx.save_for_backward(input, gain, bias)
    ctx.channel_dim, ctx.activation = channel_dim, activation
    ctx.needs = tuple(t is not None and t.requires_grad for t in (input, gain, bias))
    ctx.set_materialize_grads(False)


def _gradients(ctx, namespace: str, dy: Tensor) -> tuple:
    """Return the gradients of (input, gain, bias) for the context that _save filled."""
    input, gain, bias = ctx.saved_tensors
    if is_differentiated((dy, input, gain, bias)):
        return _differentiable_gradients(ctx, dy)
    dx, dgain, dbias = registry.op(namespace, "member_gain_backward")(
        dense_like(dy, input), input, gain, bias, ctx.channel_dim, ctx.activation
    )
    needs_input, needs_gain, needs_bias = ctx.needs
    if needs_bias:
        dbias = (dbias if bias.dim() == 2 else dbias.sum(0)).to(bias.dtype)
    return dx if needs_input else None, dgain.to(gain.dtype) if needs_gain else None, dbias if needs_bias else None


def _differentiable_gradients(ctx, dy: Tensor) -> tuple:
    """The same gradients by the reference formula, so that they can be differentiated again."""
    input, gain, bias = aliases(ctx.saved_tensors)
    y = reference.member_gain(input, gain, bias, ctx.channel_dim, ctx.activation)
    return differentiate(y, (input, gain, bias), ctx.needs, dy)


class _MemberGain(torch.autograd.Function):
    """The eager path: less overhead a call than the registered op's generated autograd."""

    @staticmethod
    def forward(ctx, namespace, input, gain, bias, channel_dim, activation):
        with torch._C._AutoDispatchBelowAutograd():
            y = registry.op(namespace, "member_gain")(input, gain, bias, channel_dim, activation)
        _save(ctx, input, gain, bias, channel_dim, activation)
        ctx.namespace = namespace
        return y

    @staticmethod
    def backward(ctx, dy):
        return None, *((None,) * 3 if dy is None else _gradients(ctx, ctx.namespace, dy)), None, None


def _setup_context(ctx, inputs, output):
    _save(ctx, *inputs)


def _backward(namespace, ctx, dy):
    return *((None,) * 3 if dy is None else _gradients(ctx, namespace, dy)), None, None


registry.register_autograd("member_gain", _backward, _setup_context)

# ---------------------------------------------------------------------------------------------- public


def member_gain(
    input: Tensor,  # [K·B, C, *] or [K·B, *, C]
    gain: Tensor,  # [K, C]
    bias: Tensor | None = None,  # [K, C] or [C]
    *,
    channel_dim: int = 1,
    activation: str = "none",
) -> Tensor:
    """Multiply each member's rows by its own gains; equals `F.relu(x_k * gain_k + bias_k)` on each member's slice.

        y = activation( x · gain_k + bias_k )

    Args:
        input: [K·B, …] with its C channels at channel_dim, member-major (row i is member i // B's); float32, bfloat16,
            float16, or float64 (CPU); any strides, contiguous and channels_last without a copy.
        gain: [K, C], any sign; float32 or input's type.
        bias: [K, C], or [C] shared by all members, or None; float32 or input's type.
        channel_dim: any dimension but the first: 1 behind a convolution, -1 behind a linear layer or a layer norm.
        activation: "none" or "relu" (NaN passes through).

    Returns:
        input's shape, type and memory format.

    Raises:
        ValueError: a shape or value does not fit.
        TypeError: an argument has the wrong Python type.
        NotImplementedError: a dtype or tensor layout without kernels.

    Cost:
        One read and one write forward; two reads and one write backward. Saved for backward: input, gain and bias.

    Source: von Oswald et al., ICLR 2021, section 2 (rank-1 late-phase weights, as in BatchEnsemble: Wen et al., 2020).
    """
    channel_dim = check_arguments(input, gain, bias, channel_dim, activation)
    namespace = registry.namespace_for(input, "member_gain")
    if namespace is None or torch._C._are_functorch_transforms_active():
        return reference.member_gain(input, gain, bias, channel_dim, activation)
    input, gain, bias = dense(input), gain.contiguous(), contiguous(bias)
    if torch.compiler.is_compiling():
        return registry.op(namespace, "member_gain")(input, gain, bias, channel_dim, activation)
    return _MemberGain.apply(namespace, input, gain, bias, channel_dim, activation)
