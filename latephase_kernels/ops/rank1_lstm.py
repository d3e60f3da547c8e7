"""One LSTM layer with rank-1 gains over a whole sequence, every member of a stacked batch in one pass.

    i, f, g, o = ((x_t ∘ s_ih,k) · W_ihᵀ) ∘ r_ih,k + ((h_t−1 ∘ s_hh,k) · W_hhᵀ) ∘ r_hh,k + bias_k
    c_t = σ(f) ∘ c_t−1 + σ(i) ∘ tanh(g)        h_t = σ(o) ∘ tanh(c_t)

Symbols: s = input gain, r = output gain. Shapes: K members, B rows a member, T steps, H units.

Registered ops: `rank1_lstm` and `rank1_lstm_backward`, made of PyTorch's own operators and of the time loop
(rank1_lstm_steps.py), which a backend may have in a form of its own. An op holds a whole sequence: in autograd, and in
a compiled graph, T steps are one node.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backend
from ..reference import rank1_lstm as reference
from ..reference.precision import accumulation_dtype
from . import rank1_linear_folded, registry
from .autocast import autocast_dtype, without_autocast
from .checks import check_input
from .double_backward import aliases, differentiate, is_batched, is_differentiated
from .rank1_lstm_checks import check_arguments
from .rank1_lstm_steps import run_steps, run_steps_backward

# ---------------------------------------------------------------------------------------------- forward


def _member_major(sequence: Tensor, num_members: int) -> Tensor:
    """[T, K·B, C] to a contiguous [K, T·B, C]: what a product over each member's rows of all steps takes."""
    steps, rows, channels = sequence.shape
    by_member = sequence.unflatten(1, (num_members, rows // num_members)).transpose(0, 1)
    return by_member.reshape(num_members, steps * (rows // num_members), channels)


def _forward(
    input, h0, c0, weight_ih, weight_hh, input_gain_ih, output_gain_ih, input_gain_hh, output_gain_hh, bias
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return every h [T, K·B, H], the last c, every c, and the gates after their activations, [K, T, B, 4H].

    Within the sequence c is kept in the accumulation type: over many steps bfloat16 would lose small increments.
    """
    steps, rows, _ = input.shape
    num_members, units = input_gain_hh.shape
    batch, dtype = rows // num_members, input.dtype

    # The inputs' part of all gates at once: so many rows share a member's weight that folding its gains in is free.
    gates, _ = rank1_linear_folded.forward(
        _member_major(input, num_members), weight_ih, input_gain_ih, output_gain_ih, bias, False
    )
    gates = gates.view(num_members, steps, batch, 4 * units)
    output, cells = run_steps(gates, h0, c0, weight_hh, input_gain_hh, output_gain_hh)
    return output, cells[-1].to(dtype, copy=True), cells, gates


# ---------------------------------------------------------------------------------------------- backward


def _backward(
    dy, dc_n, input, h0, c0, weight_ih, weight_hh, input_gain_ih, output_gain_ih, input_gain_hh, output_gain_hh, bias,
    output, cells, gates, needs,
) -> list[Tensor]:  # fmt: skip
    """Return the gradients of the ten arguments of `_forward`, empty tensors for those that need none."""
    dgates, dh0, dc0 = run_steps_backward(gates, cells, dy, dc_n, c0, weight_hh, input_gain_hh, output_gain_hh)
    num_members, steps, batch, _ = dgates.shape
    dz = dgates.flatten(1, 2)  # [K, T·B, 4H]
    gradients: list[Tensor | None] = [None] * len(needs)
    gradients[1], gradients[2] = dh0, dc0
    # z is the sum of two linear layers with rank-1 gains, of all steps' rows at once.
    if needs[0] or needs[3] or needs[5] or needs[6]:
        dx, gradients[3], gradients[5], gradients[6], _ = rank1_linear_folded.backward(
            dz, _member_major(input, num_members), weight_ih, input_gain_ih, output_gain_ih, None, None,
            (needs[0], needs[3], needs[5], needs[6], False),
        )  # fmt: skip
        if dx is not None:
            gradients[0] = dx.unflatten(1, (steps, batch)).transpose(0, 1).reshape(input.shape)
    if needs[4] or needs[7] or needs[8]:
        h_before = output.new_empty(num_members, steps, batch, output.size(2))
        h_before[:, 0] = h0.unflatten(0, (num_members, batch))
        h_before[:, 1:] = output[:-1].unflatten(1, (num_members, batch)).transpose(0, 1)
        _, gradients[4], gradients[7], gradients[8], _ = rank1_linear_folded.backward(
            dz, h_before.flatten(1, 2), weight_hh, input_gain_hh, output_gain_hh, None, None,
            (False, needs[4], needs[7], needs[8], False),
        )  # fmt: skip
    if needs[9]:
        gradients[9] = dz.sum(1 if bias.dim() == 2 else (0, 1), dtype=accumulation_dtype(dz.dtype))
    arguments = (
        input, h0, c0, weight_ih, weight_hh, input_gain_ih, output_gain_ih, input_gain_hh, output_gain_hh, bias,
    )  # fmt: skip
    return [
        input.new_empty(0) if gradient is None or not need else gradient.to(argument.dtype)
        for gradient, need, argument in zip(gradients, needs, arguments)
    ]


# ---------------------------------------------------------------------------------------------- registration


def _fake_forward(input, h0, c0, weight_ih, weight_hh, s_ih, r_ih, input_gain_hh, r_hh, bias):
    steps, rows, _ = input.shape
    num_members, units = input_gain_hh.shape
    output = input.new_empty(steps, rows, units)
    gates = input.new_empty(num_members, steps, rows // num_members, 4 * units)
    cells = torch.empty_like(output, dtype=accumulation_dtype(input.dtype))
    return output, input.new_empty(rows, units), cells, gates


def _fake_backward(dy, dc_n, *tensors):
    arguments, needs = tensors[:10], tensors[-1]
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format) if need else arguments[0].new_empty(0)
        for t, need in zip(arguments, needs)
    ]


_ARGUMENTS = (
    "Tensor input, Tensor h0, Tensor c0, Tensor weight_ih, Tensor weight_hh, Tensor input_gain_ih, "
    "Tensor output_gain_ih, Tensor input_gain_hh, Tensor output_gain_hh, Tensor? bias"
)
_FORWARD, _BACKWARD = f"{registry.NATIVE}::rank1_lstm", f"{registry.NATIVE}::rank1_lstm_backward"
backend.note_op("rank1_lstm", composite=True)
backend.note_op("rank1_lstm_backward", composite=True)
torch.library.define(_FORWARD, f"({_ARGUMENTS}) -> (Tensor output, Tensor c_n, Tensor cells, Tensor gates)")
torch.library.define(
    _BACKWARD,
    f"(Tensor? dy, Tensor? dc_n, {_ARGUMENTS}, Tensor output, Tensor cells, Tensor gates, bool[] needs) -> Tensor[]",
)
for _name, _implementation, _fake in ((_FORWARD, _forward, _fake_forward), (_BACKWARD, _backward, _fake_backward)):
    torch.library.impl(_name, "default", _implementation)
    torch.library.register_fake(_name, _fake)

# ---------------------------------------------------------------------------------------------- autograd


def _setup_context(ctx, inputs, output):
    h, _, cells, gates = output
    ctx.save_for_backward(*inputs, h, cells, gates)
    ctx.mark_non_differentiable(cells, gates)
    ctx.set_materialize_grads(False)


def _gradients(ctx, dy, dc_n, *_):
    *arguments, output, cells, gates = ctx.saved_tensors
    if dy is None and dc_n is None:
        return (None,) * len(arguments)
    needs = [bool(need) for need in ctx.needs_input_grad]
    if is_differentiated((dy, dc_n, *arguments)) or is_batched(dy, dc_n):
        return _formula_gradients(dy, dc_n, arguments, needs)
    backward = torch.ops.latephase_kernels.rank1_lstm_backward.default
    with without_autocast(output.device):
        found = backward(dy, dc_n, *arguments, output, cells, gates, needs)
    return tuple(gradient if need else None for gradient, need in zip(found, needs))


def _formula_gradients(dy, dc_n, arguments: list, needs: Sequence[bool]) -> tuple:
    """The same gradients by the reference formula, so that they can be differentiated again, or batched."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        arguments = aliases(arguments)
        outputs = [(y, d) for y, d in zip(reference.rank1_lstm(*arguments), (dy, dc_n)) if d is not None]
        ys, ds = zip(*outputs)
        return differentiate(ys, arguments, needs, ds, again=again)


torch.library.register_autograd(_FORWARD, _gradients, setup_context=_setup_context)

# ---------------------------------------------------------------------------------------------- public


def rank1_lstm(
    input: Tensor,
    h0: Tensor,
    c0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    input_gain_ih: Tensor,
    output_gain_ih: Tensor,
    input_gain_hh: Tensor,
    output_gain_hh: Tensor,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one LSTM layer over a sequence, each member's rows with its own weights W ∘ (r_k s_kᵀ).

        i, f, g, o = ((x_t ∘ s_ih,k) · W_ihᵀ) ∘ r_ih,k + ((h_t−1 ∘ s_hh,k) · W_hhᵀ) ∘ r_hh,k + bias_k
        c_t = σ(f) ∘ c_t−1 + σ(i) ∘ tanh(g)        h_t = σ(o) ∘ tanh(c_t)

    Equals nn.LSTM on each member's rows with the weights `weight * output_gain[k][:, None] * input_gain[k]`.

    Args:
        input: [T, K·B, in], at least one step, member-major along dim 1 (row i of a step is member i // B's); float32,
            bfloat16, float16 or float64, any strides. Under autocast it joins autocast's type.
        h0, c0: [K·B, H], the state before the first step; float32 or input's type, as everything that follows.
        weight_ih, weight_hh: [4H, in] and [4H, H], shared by the members; gates in nn.LSTM's order i, f, g, o.
        input_gain_ih, input_gain_hh: s, [K, in] and [K, H], any sign or zero.
        output_gain_ih, output_gain_hh: r, [K, 4H] each, any sign or zero.
        bias: of the gates, the sum of nn.LSTM's two: [K, 4H], or [4H] shared by the members, or None.

    Returns:
        Every h_t [T, K·B, H], the last h and the last c [K·B, H]; input's type.

    Raises:
        ValueError: a shape does not fit, or T is 0.
        TypeError: an argument has the wrong Python type.
        NotImplementedError: a dtype or tensor layout that is not supported.

    Cost:
        Forward: one batched product for the inputs of all steps, then a product a step; backward: a product a step,
        then one batched product a weight. Saved for backward: 4H + H values a row and step beside arguments and output.
        Gradients that are to be differentiated again come from the plain formula, step by step.

    Source: von Oswald et al., ICLR 2021, sections 2 and 3 (rank-1 late-phase weights for an LSTM).
    """
    gains = (input_gain_ih, output_gain_ih, input_gain_hh, output_gain_hh)
    check_input("rank1_lstm", input)
    input = input.to(autocast_dtype(input) or input.dtype)
    check_arguments(input, h0, c0, weight_ih, weight_hh, *gains, bias)
    plain = registry.is_exporting() and registry.namespace_for(input, "rank1_lstm") is None
    if plain or torch._C._are_functorch_transforms_active():
        output, c_n = reference.rank1_lstm(input, h0, c0, weight_ih, weight_hh, *gains, bias)
    else:
        forward = torch.ops.latephase_kernels.rank1_lstm.default
        output, c_n, _, _ = forward(input, h0, c0, weight_ih, weight_hh, *gains, bias)
    return output, output[-1].clone(), c_n  # a copy: a state that is kept must not keep the whole sequence
