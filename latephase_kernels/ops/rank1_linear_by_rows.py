"""rank1_linear with the gains over the rows: one weight for all members.

Symbols: s = input_gain, r = output_gain, W = weight, u = (x ∘ s) · Wᵀ, the product before its gain. Shapes: K members,
R rows a member.
"""

import torch
from torch import Tensor

from ..reference import member_gain as reference
from ..reference.precision import accumulation_dtype
from . import registry

KEEPS_PRODUCT = True


def _multiply(x: Tensor, gain: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """Write x ∘ gain_k + bias of [members · R, C] into out, which may be x itself, and return it."""
    namespace = registry.namespace_for(x, "member_gain_into")
    if namespace is None:
        return out.copy_(reference.member_gain(x, gain, bias, 1, "none"))
    registry.op(namespace, "member_gain_into")(x, gain, bias, 1, "none", out)
    return out


def _multiply_backward(dy: Tensor, x: Tensor, gain: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Write dy ∘ gain_k into out, which may be dy itself; return the members' column sums of dy ∘ x and of dy."""
    namespace = registry.namespace_for(x, "member_gain_backward_into")
    if namespace is None:
        by_member = (gain.size(0), x.size(0) // gain.size(0), x.size(1))
        wide = dy.to(accumulation_dtype(x.dtype)).view(by_member)
        sums = (wide * x.view(by_member)).sum(1), wide.sum(1)
        _multiply(dy, gain, None, out)
        return sums
    return registry.op(namespace, "member_gain_backward_into")(dy, x, gain, None, 1, "none", out)


def forward(x, weight, input_gain, output_gain, bias, keep: bool) -> tuple[Tensor, Tensor]:
    """Return y and, if it is to be kept, u of x [K·B, …, in]."""
    s, r = input_gain.contiguous(), output_gain.contiguous()
    y = x.new_empty(*x.shape[:-1], weight.size(0))  # returned as it is: autograd lets nobody change a view in place
    product = torch.empty_like(y) if keep else y
    x, u = x.flatten(0, -2), product.flatten(0, -2)
    torch.mm(_multiply(x, s, None, torch.empty_like(x)), weight.to(x.dtype).t(), out=u)
    _multiply(u, r, None if bias is None else bias.contiguous(), y.flatten(0, -2))
    return y, product if keep else y.new_empty(0)


def backward(dy, x, weight, input_gain, output_gain, bias, product, needs) -> list[Tensor | None]:
    """Return dx [K·R, in], dW, ds, dr and dbias [K, out]; None where there is no need.

    Args:
        dy, x: [K·B, …, *].
        product: u, or None: computed again.

    With d = dy ∘ r:   dW = dᵀ (x ∘ s),   dx = (d W) ∘ s,   ds_k = Σ_rows x ∘ (d W),   dr_k = Σ_rows dy ∘ u
    """
    needs_input, needs_weight, needs_input_gain, needs_output_gain, _ = needs
    s, r, weight = input_gain.contiguous(), output_gain.contiguous(), weight.to(x.dtype)
    dy, x = dy.flatten(0, -2), x.flatten(0, -2)
    dx, d = torch.empty_like(x), torch.empty_like(dy)
    dweight = ds = dr = dbias = None
    if needs_output_gain:
        u = torch.mm(_multiply(x, s, None, dx), weight.t()) if product is None else product.flatten(0, -2)
        dr, dbias = _multiply_backward(dy, u, r, d)
    else:
        _multiply(dy, r, None, d)
    if needs_weight:
        dweight = torch.mm(d.t(), _multiply(x, s, None, dx))  # x ∘ s lies where dx will
    if needs_input or needs_input_gain:
        torch.mm(d, weight, out=dx)
        ds, _ = _multiply_backward(dx, x, s, dx)
    return [dx if needs_input else None, dweight, ds, dr, dbias]
