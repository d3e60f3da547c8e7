"""One LSTM layer with rank-1 gains in plain PyTorch, over a whole sequence.

    i, f, g, o = ((x_t ∘ s_ih,k) · W_ihᵀ) ∘ r_ih,k + ((h_t−1 ∘ s_hh,k) · W_hhᵀ) ∘ r_hh,k + bias_k
    c_t = σ(f) ∘ c_t−1 + σ(i) ∘ tanh(g)        h_t = σ(o) ∘ tanh(c_t)

Symbols: s = input gain, r = output gain. Shapes: K members, B rows a member, T steps, H units; input [T, K·B, in],
states [K·B, H]; input gains [K, in] and [K, H], output gains [K, 4H]; bias [K, 4H] or [4H].
Differentiable to any order by autograd, and usable under every torch.func transform.
"""

import torch
from torch import Tensor

from .precision import working_dtype


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
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return every h [T, K·B, H] and the last c [K·B, H], in input's type."""
    dtype, num_members = working_dtype(input), input_gain_ih.size(0)

    def per_member(rows: Tensor) -> Tensor:  # [K·B, C] to [K, B, C]
        return rows.to(dtype).unflatten(0, (num_members, rows.size(0) // num_members))

    def multiply(rows: Tensor, weight: Tensor, input_gain: Tensor, output_gain: Tensor) -> Tensor:
        product = (rows * input_gain.to(dtype).unsqueeze(1)) @ weight.to(dtype).mT
        return product * output_gain.to(dtype).unsqueeze(1)

    h, c = per_member(h0), per_member(c0)
    outputs = []
    for x in input.unbind(0):
        z = multiply(per_member(x), weight_ih, input_gain_ih, output_gain_ih)
        z = z + multiply(h, weight_hh, input_gain_hh, output_gain_hh)
        if bias is not None:
            z = z + (bias.unsqueeze(1) if bias.dim() == 2 else bias).to(dtype)
        i, f, g, o = z.chunk(4, dim=-1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h.flatten(0, 1))
    return torch.stack(outputs).to(input.dtype), c.flatten(0, 1).to(input.dtype)
