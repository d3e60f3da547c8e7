"""What a backward pass that can be differentiated again needs."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def aliases(tensors: Sequence[Tensor | None]) -> list[Any]:
    """Return tensors as new nodes of the graph, to differentiate a formula with respect to them.

    Where one argument of an op was computed from another (x = f(weight)), differentiating with respect to the saved
    tensors themselves would count the path through x into weight here, and again in the graph outside.
    """
    return [None if tensor is None else tensor.view_as(tensor) for tensor in tensors]
