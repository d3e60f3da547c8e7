"""The products of rank1_linear with the gains inside: where a tile's factors are read and where it is stored.

Symbols: s = input_gain, r = output_gain, W = weight, H_k = dy_kᵀ x_k, u = (x ∘ s) · Wᵀ, the product before its gain.
Shapes: K members, R rows a member (all leading dimensions); x [K·B, …, in], dy and u [K·B, …, out].

Registered ops, with kernels on a CPU for float32 and float64; everything contiguous and of one type.
"""

import torch
from torch import Tensor

from . import registry
from .rank1_linear_folded import _fold_backward, by_member


def _product(x, weight, transposed: bool, x_gain, y_gain, bias, keep: bool) -> tuple[Tensor, Tensor]:
    """Return y = ((x ∘ x_gain_k) · B) ∘ y_gain_k + bias and, if it is to be kept, y before y_gain, else empty.

    B is weight, or transposed that of weight.
    """
    product = (by_member(x, x_gain) * x_gain.unsqueeze(1)) @ (weight.t() if transposed else weight)
    y = product * y_gain.unsqueeze(1)
    if bias is not None:
        y += bias if bias.dim() == 1 else bias.unsqueeze(1)
    shape = (*x.shape[:-1], y.size(2))
    return y.view(shape), product.view(shape) if keep else product.new_empty(0)


def _dbias(sums: Tensor, shared: bool) -> Tensor:
    return sums.sum(0) if shared else sums


def _product_backward(dy, x, weight, input_gain, output_gain, product, shared_bias: bool) -> tuple[Tensor, ...]:
    """Return dx, ds [K, in], dr [K, out] and dbias, [out] if shared, else [K, out]; product: u.

    dx = (d W) ∘ s with d = dy ∘ r,   ds_k = Σ_rows x ∘ (d W),   dr_k = Σ_rows dy ∘ u
    """
    dx = torch.empty_like(x)
    dy, x, product = (by_member(t, input_gain) for t in (dy, x, product))
    d = (dy * output_gain.unsqueeze(1)) @ weight
    torch.mul(d, input_gain.unsqueeze(1), out=by_member(dx, input_gain))
    return dx, (d * x).sum(1), (dy * product).sum(1), _dbias(dy.sum(1), shared_bias)


def _weight_gradient(dy, x, input_gain, output_gain) -> Tensor:
    """Return dW = (dy ∘ r)ᵀ (x ∘ s), [out, in]."""
    d, scaled = (by_member(t, gain) * gain.unsqueeze(1) for t, gain in ((dy, output_gain), (x, input_gain)))
    return d.flatten(0, 1).t() @ scaled.flatten(0, 1)


def _gradients(dy, x, weight, input_gain, output_gain, shared_bias: bool) -> tuple[Tensor, ...]:
    """Return dW [out, in], ds [K, in] and dr [K, out], all from the H_k, and dbias, [out] if shared, else [K, out].

    dW = Σ_k (r_k s_kᵀ) ∘ H_k,   ds_k = colsum(r_k · H_k ∘ W),   dr_k = rowsum(H_k ∘ W · s_k)
    """
    dy, x = by_member(dy, input_gain), by_member(x, input_gain)
    dweight = torch.zeros_like(weight)
    ds, dr = _fold_backward(torch.bmm(dy.mT, x), weight, input_gain, output_gain, dweight)
    return dweight, ds, dr, _dbias(dy.sum(1), shared_bias)


def _fake_product(x, weight, transposed, x_gain, y_gain, bias, keep):
    sizes = *x.shape[:-1], weight.size(0 if transposed else 1)
    return x.new_empty(sizes), x.new_empty(sizes if keep else 0)


def _empty_like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors)


def _fake_product_backward(dy, x, weight, input_gain, output_gain, product, shared_bias):
    return _empty_like(x, input_gain, output_gain, output_gain[0] if shared_bias else output_gain)


def _fake_weight_gradient(dy, x, input_gain, output_gain):
    return x.new_empty(output_gain.size(1), x.size(-1))


def _fake_gradients(dy, x, weight, input_gain, output_gain, shared_bias):
    return _empty_like(weight, input_gain, output_gain, output_gain[0] if shared_bias else output_gain)


def _define(name: str, schema: str, fake, composite) -> None:
    registry.define(name, schema, fake, op_file="rank1_linear", composite=composite)


_define(
    "rank1_product",
    "(Tensor x, Tensor weight, bool transposed, Tensor x_gain, Tensor y_gain, Tensor? bias, bool keep) -> "
    "(Tensor y, Tensor product)",
    _fake_product,
    _product,
)
_define(
    "rank1_product_backward",
    "(Tensor dy, Tensor x, Tensor weight, Tensor input_gain, Tensor output_gain, Tensor product, "
    "bool shared_bias) -> "
    "(Tensor dx, Tensor ds, Tensor dr, Tensor dbias)",
    _fake_product_backward,
    _product_backward,
)
_define(
    "rank1_weight_gradient",
    "(Tensor dy, Tensor x, Tensor input_gain, Tensor output_gain) -> Tensor",
    _fake_weight_gradient,
    _weight_gradient,
)
_define(
    "rank1_gradients",
    "(Tensor dy, Tensor x, Tensor weight, Tensor input_gain, Tensor output_gain, bool shared_bias) -> "
    "(Tensor dweight, Tensor ds, Tensor dr, Tensor dbias)",
    _fake_gradients,
    _gradients,
)

product, product_backward, weight_gradient, gradients = (
    registry.op(registry.NATIVE, f"rank1_{name}")
    for name in ("product", "product_backward", "weight_gradient", "gradients")
)
