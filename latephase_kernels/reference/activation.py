"""Each activation that an op can end in."""

import torch.nn.functional as F
from torch import Tensor


def activate(z: Tensor, activation: str) -> Tensor:
    """Apply activation, "none", "relu" or "silu"."""
    if activation == "silu":
        return F.silu(z)
    return z.relu() if activation == "relu" else z
