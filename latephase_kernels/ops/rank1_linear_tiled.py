"""rank1_linear on a CPU with the gains inside its products: where a tile's factors are read and where it is stored.

No pass over rows beside the products, nothing kept beside the arguments. Symbols: s = input_gain, r = output_gain,
W = weight, H_k = dy_kᵀ x_k. Shapes: K members, R rows a member.

Registered ops: `rank1_product` and `rank1_gradients`; float32 and float64, everything of one type.
"""

import torch
from torch import Tensor

from . import registry
from .rank1_linear_folded import _fold_backward

# ---------------------------------------------------------------------------------------------- the products


def _by_member(t: Tensor, num_members: int) -> Tensor:
    return t.view(num_members, t.size(0) // num_members, t.size(1))


def _product(x, weight, transposed: bool, x_gain, y_gain, bias) -> Tensor:
    """Return ((x ∘ x_gain_k) · B) ∘ y_gain_k + bias of x [K·R, *]; B is weight, or transposed that of weight."""
    y = (_by_member(x, len(x_gain)) * x_gain.unsqueeze(1)) @ (weight.t() if transposed else weight)
    y *= y_gain.unsqueeze(1)
    if bias is not None:
        y += bias if bias.dim() == 1 else bias.unsqueeze(1)
    return y.flatten(0, 1)


def _gradients(dy, x, weight, input_gain, output_gain) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dW [out, in], ds [K, in], dr [K, out] and dbias [K, out] of x [K·R, in] and dy [K·R, out].

    dW = Σ_k (r_k s_kᵀ) ∘ H_k,   ds_k = colsum(r_k · H_k ∘ W),   dr_k = rowsum(H_k ∘ W · s_k)
    """
    dy = _by_member(dy, len(input_gain))
    dweight = torch.zeros_like(weight)
    products = torch.bmm(dy.mT, _by_member(x, len(input_gain)))
    ds, dr = _fold_backward(products, weight, input_gain, output_gain, dweight)
    return dweight, ds, dr, dy.sum(1)


def _fake_product(x, weight, transposed, x_gain, y_gain, bias):
    return x.new_empty(x.size(0), weight.size(0 if transposed else 1))


def _fake_gradients(dy, x, weight, input_gain, output_gain):
    like = (weight, input_gain, output_gain, output_gain)
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in like)


registry.define(
    "rank1_product",
    "(Tensor x, Tensor weight, bool transposed, Tensor x_gain, Tensor y_gain, Tensor? bias) -> Tensor",
    _fake_product,
    op_file="rank1_linear",
    composite=_product,
)
registry.define(
    "rank1_gradients",
    "(Tensor dy, Tensor x, Tensor weight, Tensor input_gain, Tensor output_gain) -> "
    "(Tensor dweight, Tensor ds, Tensor dr, Tensor dbias)",
    _fake_gradients,
    op_file="rank1_linear",
    composite=_gradients,
)

# ---------------------------------------------------------------------------------------------- the layer


def forward(x: Tensor, weight: Tensor, input_gain: Tensor, output_gain: Tensor, bias: Tensor | None) -> Tensor:
    """Return y [K, R, out] of x [K, R, in]."""
    weight, s, r = (t.contiguous() for t in (weight, input_gain, output_gain))
    bias = None if bias is None else bias.contiguous()
    y = registry.op(registry.NATIVE, "rank1_product")(x.flatten(0, 1), weight, True, s, r, bias)
    return y.view(*x.shape[:2], len(weight))


def backward(dy, x, weight, input_gain, output_gain, needs) -> list[Tensor | None]:
    """Return dx, dW, ds, dr and dbias [K, out]; None where there is no need."""
    weight, s, r = (t.contiguous() for t in (weight, input_gain, output_gain))
    rows = dy.flatten(0, 1)
    dx, others = None, (None,) * 4
    if needs[0]:
        dx = registry.op(registry.NATIVE, "rank1_product")(rows, weight, False, r, s, None)
    if any(needs[1:4]):
        others = registry.op(registry.NATIVE, "rank1_gradients")(rows, x.flatten(0, 1), weight, s, r)
    return [dx, *others]
