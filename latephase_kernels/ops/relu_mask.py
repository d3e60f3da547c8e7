"""Which values passed a ReLU, packed into bits: kept for backward where they cannot be computed again.

Shapes: input [K·B, C, *], S = product of the spatial sizes.
"""

import torch
from torch import Tensor

from .layout import rows_of_channels


def mask_shape(input: Tensor, residual: Tensor | None, activation: str) -> list[int]:
    """Shape of the packed ReLU mask, [rows, ⌈columns / 8⌉]: a row is the run of memory that shares its first byte.

    Contiguous input with S > 1: rows = K·B·C, columns = S. Otherwise rows = K·B·S, columns = C.
    Bit j % 8 of byte j // 8 says whether column j passed the ReLU. [0] where no mask is needed.
    """
    if residual is None or activation != "relu":
        return [0]
    columns = input.size(1) if rows_of_channels(input) else input.shape[2:].numel()
    return [input.numel() // columns if columns else 0, (columns + 7) // 8]


def unpack_mask(mask: Tensor, input: Tensor) -> Tensor:
    """Return the packed ReLU mask as booleans in input's shape."""
    bits = (mask.unsqueeze(-1) >> torch.arange(8, device=mask.device, dtype=torch.uint8)) & 1
    if rows_of_channels(input):
        return bits.flatten(1)[:, : input.size(1)].reshape(input.movedim(1, -1).shape).movedim(-1, 1).bool()
    return bits.flatten(1)[:, : input.shape[2:].numel()].reshape(input.shape).bool()
