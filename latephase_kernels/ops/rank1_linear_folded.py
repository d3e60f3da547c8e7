"""rank1_linear with the gains in the weight: every member's own W ∘ (r_k s_kᵀ), and no pass over rows.

Symbols: s = input_gain, r = output_gain, W = weight, H_k = dy_kᵀ x_k. Shapes: K members, R rows a member.

Registered ops, around the products: `rank1_fold` and `rank1_fold_backward`, their gains in the accumulation type.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..reference.precision import accumulation_dtype
from . import registry


def by_member(t: Tensor, gain: Tensor) -> Tensor:
    """View a contiguous [K·B, …, C] as [K, R, C]; gain: [K, *]."""
    *leading, channels = t.shape
    return t.view(len(gain), math.prod(leading) // len(gain), channels)


# ---------------------------------------------------------------------------------------------- around the products


def _fold(weight: Tensor, input_gain: Tensor, output_gain: Tensor, folded: Tensor) -> None:
    """Write W ∘ (r_k s_kᵀ) into folded [K, out, in]."""
    folded.copy_(weight * input_gain.unsqueeze(1) * output_gain.unsqueeze(2))


def _fold_backward(products, weight, input_gain, output_gain, dweight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return ds and dr of products H [K, out, in], and add to dweight.

    dW = Σ_k (r_k s_kᵀ) ∘ H_k,   ds_k = colsum(r_k · H_k ∘ W),   dr_k = rowsum(H_k ∘ W · s_k)
    """
    products, r, s = products.to(input_gain.dtype), output_gain.unsqueeze(1), input_gain.unsqueeze(2)
    of_gains = products * weight
    if dweight is not None:
        dweight += (products * r.mT * s.mT).sum(0)
    return torch.bmm(r, of_gains).squeeze(1), torch.bmm(of_gains, s).squeeze(2)


def _fake_fold(weight, input_gain, output_gain, folded):
    return None


def _fake_fold_backward(products, weight, input_gain, output_gain, dweight):
    return torch.empty_like(input_gain), torch.empty_like(output_gain)


_WEIGHTS = "Tensor weight, Tensor input_gain, Tensor output_gain"
registry.define(
    "rank1_fold", f"({_WEIGHTS}, Tensor(a!) folded) -> ()", _fake_fold, op_file="rank1_linear", composite=_fold
)
registry.define(
    "rank1_fold_backward",
    f"(Tensor products, {_WEIGHTS}, Tensor(a!)? dweight) -> (Tensor ds, Tensor dr)",
    _fake_fold_backward,
    op_file="rank1_linear",
    composite=_fold_backward,
)


def _op(name: str, composite: Callable, x: Tensor) -> Callable:
    """Return the registered op, or for what has no kernels (float64 on a GPU) its composite implementation itself."""
    return composite if registry.namespace_for(x, name) is None else registry.op(registry.NATIVE, name)


# ---------------------------------------------------------------------------------------------- the layer

KEEPS_PRODUCT = False
_CACHED_VALUES = 1 << 18


def _chunks(num_members: int, weight: Tensor) -> list[slice]:
    """Members whose folded weights exist at one time: on the CPU no more than stay in cache, else all."""
    at_once = num_members
    if weight.device.type == "cpu":
        at_once = min(num_members, max(1, _CACHED_VALUES // max(1, weight.numel())))
    return [slice(first, min(first + at_once, num_members)) for first in range(0, num_members, at_once)]


def _parameters(x: Tensor, weight: Tensor, input_gain: Tensor, output_gain: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, s and r as the ops around the products take them."""
    accumulate = accumulation_dtype(x.dtype)
    return weight.contiguous(), input_gain.to(accumulate).contiguous(), output_gain.to(accumulate).contiguous()


def forward(x, weight, input_gain, output_gain, bias, keep: bool) -> tuple[Tensor, Tensor]:
    """Return y of x [K·B, …, in], and nothing to keep."""
    out_features = weight.size(0)
    y = x.new_empty(*x.shape[:-1], out_features)  # returned as it is: autograd lets nobody change a view in place
    x, rows_of_y = by_member(x, input_gain), by_member(y, output_gain)
    num_members = len(x)
    weight, s, r = _parameters(x, weight, input_gain, output_gain)
    shift = None if bias is None else bias.to(x.dtype).unsqueeze(-2).expand(num_members, 1, out_features)
    chunks = _chunks(num_members, weight)
    buffer = x.new_empty(chunks[0].stop, *weight.shape)
    fold = _op("rank1_fold", _fold, x)
    for some in chunks:
        folded = buffer[: some.stop - some.start]
        fold(weight, s[some], r[some], folded)
        if shift is None:
            torch.bmm(x[some], folded.mT, out=rows_of_y[some])
        else:
            torch.baddbmm(shift[some], x[some], folded.mT, out=rows_of_y[some])
    return y, x.new_empty(0)


def backward(dy, x, weight, input_gain, output_gain, bias, product, needs) -> list[Tensor | None]:
    """Return dx [K, R, in], dW, ds, dr and None for dbias; None where there is no need. dy, x: [K·B, …, *]."""
    needs_input, needs_weight, needs_input_gain, needs_output_gain, _ = needs
    dy, x = by_member(dy, input_gain), by_member(x, input_gain)
    weight, s, r = _parameters(x, weight, input_gain, output_gain)
    dx = torch.empty_like(x) if needs_input else None
    dweight = torch.zeros_like(weight, dtype=s.dtype) if needs_weight else None
    chunks = _chunks(x.size(0), weight)
    buffer = x.new_empty(chunks[0].stop, *weight.shape)
    fold, fold_backward = _op("rank1_fold", _fold, x), _op("rank1_fold_backward", _fold_backward, x)
    of_gains = []
    for some in chunks:
        own = buffer[: some.stop - some.start]
        if dx is not None:
            fold(weight, s[some], r[some], own)
            torch.bmm(dy[some], own, out=dx[some])
        if needs_weight or needs_input_gain or needs_output_gain:
            torch.bmm(dy[some].mT, x[some], out=own)
            of_gains.append(fold_backward(own, weight, s[some], r[some], dweight))
    ds, dr = (torch.cat(sums) for sums in zip(*of_gains)) if of_gains else (None, None)
    return [dx, dweight, ds, dr, None]
