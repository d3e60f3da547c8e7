"""What a backward pass needs that is differentiated again, or gets a batch of gradients (is_grads_batched)."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def is_differentiated(tensors: Iterable[Tensor | None]) -> bool:
    """Whether this backward pass, a function of these tensors, is to be differentiated itself."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


_BATCHED: Any = torch._C._parse_dispatch_key("Batched")


def is_batched(*gradients: Tensor | None) -> bool:
    """Whether a backward pass gets many gradients at once, for which only PyTorch's own operators have rules."""
    return any(gradient is not None and torch._C._dispatch_keys(gradient).has(_BATCHED) for gradient in gradients)


def aliases(tensors: Sequence[Tensor | None]) -> list[Any]:
    """Return tensors as new nodes of the graph, to differentiate a formula with respect to them.

    Where one argument of an op was computed from another (x = f(weight)), differentiating with respect to the saved
    tensors themselves would count the path through x into weight here, and again in the graph outside.
    """
    return [None if tensor is None else tensor.view_as(tensor) for tensor in tensors]


def differentiate(
    outputs: Any, tensors: Sequence[Tensor | None], needs: Sequence[bool], gradients: Any, *, again: bool = True
) -> tuple:
    """Return gradients of the tensors, None for what needs none.

    Args:
        outputs: what was computed from tensors: one, or a sequence.
        tensors: see aliases.
        needs: whether each one's gradient is needed.
        gradients: of outputs.
        again: whether they can be differentiated again.
    """
    needed: list[Any] = [tensor for tensor, need in zip(tensors, needs) if need]
    found = iter(torch.autograd.grad(outputs, needed, gradients, create_graph=again) if needed else ())
    return tuple(next(found) if need else None for need in needs)
