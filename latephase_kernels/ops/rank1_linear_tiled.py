"""rank1_linear on a CPU with the gains inside its products, and nothing kept beside the arguments.

No pass over rows; for backward one over every member's product of the weight's size, H_k = dy_kᵀ x_k, in registers.
"""

from torch import Tensor

from . import rank1_linear_products as products

KEEPS_PRODUCT = False


def forward(x, weight, input_gain, output_gain, bias, keep: bool) -> tuple[Tensor, Tensor]:
    """Return y of x [K·B, …, in], and nothing to keep."""
    weight, s, r = weight.contiguous(), input_gain.contiguous(), output_gain.contiguous()
    return products.product(x, weight, True, s, r, None if bias is None else bias.contiguous(), False)


def backward(dy, x, weight, input_gain, output_gain, bias, product, needs) -> list[Tensor | None]:
    """Return dx, dW, ds, dr and dbias; None where there is no need."""
    weight, s, r = weight.contiguous(), input_gain.contiguous(), output_gain.contiguous()
    dx, others = None, (None,) * 4
    if needs[0]:
        dx, _ = products.product(dy, weight, False, r, s, None, False)
    if any(needs[1:4]):
        others = products.gradients(dy, x, weight, s, r, bias is not None and bias.dim() == 1)
    return [dx, *others]
