"""The time loop of rank1_lstm: all steps forward, and all steps backward, each an op of its own.

    z = gates_t + ((h_t−1 ∘ s_k) · Wᵀ) ∘ r_k,   i, f, o = σ(z),   g = tanh(z)
    c_t = f ∘ c_t−1 + i ∘ g,   h_t = o ∘ tanh(c_t)

Symbols: s = input_gain, r = output_gain, W = weight. Shapes: K members, B rows a member, T steps, H units; gates
[K, T, B, 4H], sequences [T, K·B, H], states [K·B, H], weight [4H, H], gains [K, H] and [K, 4H].

Registered ops: `rank1_lstm_steps` and `rank1_lstm_steps_backward`. A backend may have them in a form of its own; here
they are made of PyTorch's own operators.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..reference.precision import accumulation_dtype
from . import registry


def run_steps(*arguments: Tensor) -> tuple[Tensor, Tensor]:
    """Return every h and every c, as gates' backend has them; gates (the inputs' part) become the activated in place.

    Args:
        arguments: gates, h0, c0, weight, input_gain, output_gain.
    """
    return _run("rank1_lstm_steps", _steps, *arguments)


def run_steps_backward(*arguments: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the gates before their activations, of h0 and of c0, as gates' backend has them.

    Args:
        arguments: gates (activated), cells (every c), dy (of every h, or None), dc_n (of the last c, or None), c0,
            weight, input_gain, output_gain.
    """
    return _run("rank1_lstm_steps_backward", _steps_backward, *arguments)


def _run(name: str, reference_steps: Callable, gates, *arguments):
    namespace = registry.namespace_for(gates, name)
    return (reference_steps if namespace is None else registry.op(namespace, name))(gates, *arguments)


def _steps(gates, h0, c0, weight, input_gain, output_gain) -> tuple[Tensor, Tensor]:
    """Return every h and every c; gates: the inputs' part of all steps, which becomes the activated gates in place."""
    num_members, steps, batch, four_units = gates.shape
    dtype, rows, units = gates.dtype, num_members * batch, four_units // 4
    by_member = (num_members, batch, units)
    # A step's few rows would not pay for K folded weights: the members share one product and one read of W.
    weight_t = weight.to(dtype).t()
    input_gain, output_gain = input_gain.unsqueeze(1), output_gain.unsqueeze(1)
    output = torch.empty(steps, rows, units, dtype=dtype, device=gates.device)
    cells = torch.empty_like(output, dtype=accumulation_dtype(dtype))
    scaled, tanh_c = torch.empty_like(output[0]), torch.empty_like(cells[0]).view(by_member)
    product = torch.empty(rows, four_units, dtype=dtype, device=gates.device)
    h, c = h0.to(dtype).reshape(by_member), c0.to(cells.dtype).reshape(by_member)
    for z, h_next, c_next in zip(gates.unbind(1), output.unbind(0), cells.unbind(0)):
        torch.mul(h, input_gain, out=scaled.view(by_member))
        torch.mm(scaled, weight_t, out=product)
        z.addcmul_(product.view(num_members, batch, four_units), output_gain)
        i, f, g, o = z.chunk(4, dim=-1)
        z[..., : 2 * units].sigmoid_()
        g.tanh_()
        o.sigmoid_()
        h_next, c_next = h_next.view(by_member), c_next.view(by_member)
        torch.mul(f, c, out=c_next).addcmul_(i, g)
        torch.tanh(c_next, out=tanh_c)
        torch.mul(o, tanh_c, out=h_next)
        h, c = h_next, c_next
    return output, cells


def _steps_backward(gates, cells, dy, dc_n, c0, weight, input_gain, output_gain) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the gates before their activations, [K, T, B, 4H], of h0 and of c0."""
    num_members, steps, batch, four_units = gates.shape
    units = four_units // 4
    by_member = (num_members, batch, units)
    weight = weight.to(gates.dtype)
    input_gain, output_gain = input_gain.unsqueeze(1), output_gain.unsqueeze(1)
    dgates = torch.empty_like(gates)
    scaled = torch.empty(num_members * batch, four_units, dtype=gates.dtype, device=gates.device)
    recurrent = torch.zeros(num_members * batch, units, dtype=gates.dtype, device=gates.device)
    dh, temporary = (torch.empty(by_member, dtype=cells.dtype, device=cells.device) for _ in range(2))
    tanh_c = torch.empty_like(dh)
    dc = torch.zeros_like(dh) if dc_n is None else dc_n.to(dh.dtype, copy=True).view(by_member)
    sigmoid_backward, tanh_backward = torch.ops.aten.sigmoid_backward, torch.ops.aten.tanh_backward
    for t in reversed(range(steps)):
        c_before = (cells[t - 1] if t else c0.to(cells.dtype)).reshape(by_member)
        (i, f, g, o), dz = gates[:, t].chunk(4, dim=-1), dgates[:, t]
        di, df, dg, do = dz.chunk(4, dim=-1)
        torch.tanh(cells[t].view(by_member), out=tanh_c)
        if dy is None:
            dh.copy_(recurrent.view(by_member))
        else:
            torch.add(recurrent.view(by_member), dy[t].unflatten(0, (num_members, batch)), out=dh)
        sigmoid_backward.grad_input(torch.mul(dh, tanh_c, out=temporary), o, grad_input=do)
        dh.mul_(o)
        dc.add_(tanh_backward.grad_input(dh, tanh_c, grad_input=temporary))
        sigmoid_backward.grad_input(torch.mul(dc, g, out=temporary), i, grad_input=di)
        sigmoid_backward.grad_input(torch.mul(dc, c_before, out=temporary), f, grad_input=df)
        tanh_backward.grad_input(torch.mul(dc, i, out=temporary), g, grad_input=dg)
        dc.mul_(f)
        torch.mul(dz, output_gain, out=scaled.view(num_members, batch, four_units))
        torch.mm(scaled, weight, out=recurrent)
        recurrent.view(by_member).mul_(input_gain)
    return dgates, recurrent, dc.view(num_members * batch, units)


# ---------------------------------------------------------------------------------------------- registration


def _fake_steps(gates, h0, c0, weight, input_gain, output_gain):
    _, steps, _, four_units = gates.shape
    output = gates.new_empty(steps, h0.size(0), four_units // 4)
    return output, torch.empty_like(output, dtype=accumulation_dtype(gates.dtype))


def _fake_steps_backward(gates, cells, dy, dc_n, c0, weight, input_gain, output_gain):
    states = (torch.empty_like(c0, dtype=dtype) for dtype in (gates.dtype, cells.dtype))
    return torch.empty_like(gates), *states


_OF_A_STEP = "Tensor c0, Tensor weight, Tensor input_gain, Tensor output_gain"
registry.define(
    "rank1_lstm_steps",
    f"(Tensor(a!) gates, Tensor h0, {_OF_A_STEP}) -> (Tensor output, Tensor cells)",
    _fake_steps,
    op_file="rank1_lstm",
    composite=_steps,
)
registry.define(
    "rank1_lstm_steps_backward",
    f"(Tensor gates, Tensor cells, Tensor? dy, Tensor? dc_n, {_OF_A_STEP}) -> (Tensor dgates, Tensor dh0, Tensor dc0)",
    _fake_steps_backward,
    op_file="rank1_lstm",
    composite=_steps_backward,
)
