"""What a backward pass that can be differentiated again needs."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def is_differentiated(tensors: Iterable[Tensor | None]) -> bool:
    """Whether this backward pass, a function of these tensors, is to be differentiated itself."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def aliases(tensors: Sequence[Tensor | None]) -> list[Any]:
    """Return tensors as new nodes of the graph, to differentiate a formula with respect to them.

    Where one argument of an op was computed from another (x = f(weight)), differentiating with respect to the saved
    tensors themselves would count the path through x into weight here, and again in the graph outside.
    """
    return [None if tensor is None else tensor.view_as(tensor) for tensor in tensors]


def differentiate(outputs: Any, tensors: Sequence[Tensor | None], needs: Sequence[bool], gradients: Any) -> tuple:
    """Return gradients of the tensors that can be differentiated again, None for what needs none.

    Args:
        outputs: what was computed from tensors: one, or a sequence.
        tensors: see aliases.
        needs: whether each one's gradient is needed.
        gradients: of outputs.
    """
    needed: list[Any] = [tensor for tensor, need in zip(tensors, needs) if need]
    found = iter(torch.autograd.grad(outputs, needed, gradients, create_graph=True) if needed else ())
    return tuple(next(found) if need else None for need in needs)
