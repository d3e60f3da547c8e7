"""rank1_linear with the gains over the rows: one weight for all members.

Symbols: s = input_gain, r = output_gain, W = weight, u = (x ∘ s) · Wᵀ, the product before its gain. Shapes: K members,
R rows a member.

On a CPU the members go through in chunks of a size that stays in cache from one pass over rows to the next.
"""

import torch
from torch import Tensor

from ..reference import member_gain as reference
from ..reference.precision import accumulation_dtype
from . import registry
from .rank1_linear_folded import by_member

KEEPS_PRODUCT = True
_CHUNK_ROWS = 512  # at least: with fewer a product takes longer a row


def _chunks(x: Tensor) -> list[slice]:
    """Members that go through together; as many each time, so that each one's numbers come about in the same way."""
    num_members, rows, _ = x.shape
    at_once = num_members
    # Half precision would round the weight's gradient at every chunk.
    if x.device.type == "cpu" and x.dtype == accumulation_dtype(x.dtype):
        sizes = (n for n in range(1, num_members) if num_members % n == 0 and n * rows >= _CHUNK_ROWS)
        at_once = next(sizes, num_members)
    return [slice(first, first + at_once) for first in range(0, num_members, at_once)]


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


def _rows(stacked: Tensor, some: slice) -> Tensor:
    """Rows [members · R, C] of some members of [K, R, C], a view."""
    return stacked[some].flatten(0, 1)


def forward(
    x: Tensor, weight: Tensor, input_gain: Tensor, output_gain: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return y and u of x [K·B, …, in]."""
    shape, x = (*x.shape[:-1], weight.size(0)), by_member(x, input_gain)
    s, r, weight_t = input_gain.contiguous(), output_gain.contiguous(), weight.to(x.dtype).t()
    bias = None if bias is None else bias.contiguous()
    product = x.new_empty(*x.shape[:2], weight.size(0))
    y = torch.empty_like(product)
    chunks = _chunks(x)
    scaled = torch.empty_like(_rows(x, chunks[0]))
    for some in chunks:
        u = torch.mm(_multiply(_rows(x, some), s[some], None, scaled), weight_t, out=_rows(product, some))
        _multiply(u, r[some], bias if bias is None or bias.dim() == 1 else bias[some], _rows(y, some))
    return y.view(shape), product.view(shape)


def backward(dy, x, weight, input_gain, output_gain, bias, product, needs) -> list[Tensor | None]:
    """Return dx [K, R, in], dW, ds, dr and dbias [K, out]; None where there is no need.

    Args:
        dy, x: [K·B, …, *].
        product: u, or None: computed again.

    With d = dy ∘ r:   dW = dᵀ (x ∘ s),   dx = (d W) ∘ s,   ds_k = Σ_rows x ∘ (d W),   dr_k = Σ_rows dy ∘ u
    """
    needs_input, needs_weight, needs_input_gain, needs_output_gain, _ = needs
    dy, x = by_member(dy, input_gain), by_member(x, input_gain)
    product = None if product is None else by_member(product, input_gain)
    s, r, weight = input_gain.contiguous(), output_gain.contiguous(), weight.to(x.dtype)
    chunks = _chunks(x)
    dx = torch.empty_like(x)
    d = torch.empty_like(_rows(dy, chunks[0]))
    dweight = None
    sums_of_inputs, sums_of_outputs = [], []
    for some in chunks:
        x_some, dy_some, dx_some = (_rows(t, some) for t in (x, dy, dx))
        if needs_output_gain:
            if product is None:
                u = torch.mm(_multiply(x_some, s[some], None, dx_some), weight.t())
            else:
                u = _rows(product, some)
            sums_of_outputs.append(_multiply_backward(dy_some, u, r[some], d))
        else:
            _multiply(dy_some, r[some], None, d)
        if needs_weight:  # x ∘ s lies where dx will
            scaled = _multiply(x_some, s[some], None, dx_some)
            dweight = torch.mm(d.t(), scaled) if dweight is None else dweight.addmm_(d.t(), scaled)
        if needs_input or needs_input_gain:
            torch.mm(d, weight, out=dx_some)
            sums_of_inputs.append(_multiply_backward(dx_some, x_some, s[some], dx_some))
    dr, dbias = (torch.cat(sums) for sums in zip(*sums_of_outputs)) if sums_of_outputs else (None, None)
    ds = torch.cat([sums for sums, _ in sums_of_inputs]) if sums_of_inputs else None
    return [dx, dweight, ds, dr, dbias]
