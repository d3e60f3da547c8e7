"""Each activation that an op can end in."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda z: z,
    "relu": torch.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
}
ACTIVATIONS = tuple(_FUNCTIONS)
STANDALONE = ("relu6", "silu", "hardswish")  # ensemble batch norm applies them without residual and output gain


def activate(z: Tensor, activation: str) -> Tensor:
    """Apply activation, one of ACTIVATIONS."""
    return _FUNCTIONS[activation](z)
