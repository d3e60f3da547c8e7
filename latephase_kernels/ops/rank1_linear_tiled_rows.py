"""rank1_linear on a CPU with the gains inside its products, for few rows: the sums over rows are taken there, too.

No pass over anything; kept beside the arguments: u = (x ∘ s) · Wᵀ, the product before its gain.
"""

from torch import Tensor

from . import rank1_linear_products as products

KEEPS_PRODUCT = True


def forward(x, weight, input_gain, output_gain, bias, keep: bool) -> tuple[Tensor, Tensor]:
    """Return y and, if it is to be kept, u of x [K·B, …, in]."""
    weight, s, r = weight.contiguous(), input_gain.contiguous(), output_gain.contiguous()
    return products.product(x, weight, True, s, r, None if bias is None else bias.contiguous(), keep)


def backward(dy, x, weight, input_gain, output_gain, bias, product, needs) -> list[Tensor | None]:
    """Return dx, dW, ds, dr and dbias; None where there is no need. product: u, or None: computed again."""
    needs_input, needs_weight, needs_input_gain, needs_output_gain, _ = needs
    weight, s, r = weight.contiguous(), input_gain.contiguous(), output_gain.contiguous()
    dx = dweight = ds = dr = dbias = None
    if needs_input or needs_input_gain or needs_output_gain:
        if not needs_output_gain:
            u = dy  # dr is then of something else, but nobody asks for it
        elif product is None:
            _, u = products.product(x, weight, True, s, r, None, True)
        else:
            u = product
        dx, ds, dr, dbias = products.product_backward(dy, x, weight, s, r, u, bias is not None and bias.dim() == 1)
    if needs_weight:
        dweight = products.weight_gradient(dy, x, s, r)
    return [dx, dweight, ds, dr, dbias]
