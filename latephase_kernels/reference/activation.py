"""Each activation that an op can end in."""

from torch import Tensor


def activate(z: Tensor, activation: str) -> Tensor:
    """Apply activation, "none" or "relu"."""
    return z.relu() if activation == "relu" else z
