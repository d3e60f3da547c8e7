"""A linear layer with rank-1 gains in plain PyTorch.

    y_k = ((x_k ∘ s_k) · Wᵀ) ∘ r_k + bias

Symbols: s = input_gain [K, in], r = output_gain [K, out], W = weight [out, in]; bias [K, out] or [out].
Shapes: K members, B rows a member; input [K·B, *, in]. Differentiable to any order by autograd, and usable under every
torch.func transform.
"""

from torch import Tensor

from .precision import working_dtype


def rank1_linear(input: Tensor, weight: Tensor, input_gain: Tensor, output_gain: Tensor, bias: Tensor | None) -> Tensor:
    """Return y [K·B, *, out] in input's type."""
    dtype, num_members = working_dtype(input), input_gain.size(0)
    x = input.to(dtype).unflatten(0, (num_members, input.size(0) // num_members))  # [K, B, *, in]

    def per_member(parameter: Tensor) -> Tensor:
        return parameter.to(dtype).reshape(num_members, *[1] * (x.dim() - 2), parameter.size(1))

    y = ((x * per_member(input_gain)) @ weight.to(dtype).mT) * per_member(output_gain)
    if bias is not None:
        y = y + (per_member(bias) if bias.dim() == 2 else bias.to(dtype))
    return y.flatten(0, 1).to(input.dtype)
