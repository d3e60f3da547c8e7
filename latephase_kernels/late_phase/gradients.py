"""Gradients of an expanded model: the scale of the base gradients, and clipping by norm.

Shapes: K members; a replicated parameter's gradient is [K, …].
"""

import math
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.routing import routings_of
from .optimizers import member_parameters, plain_optimizer

# Of each optimizer the base weights that a hook scales, and the hook's handle: one for each model that it trains.
_hooks: "weakref.WeakKeyDictionary[torch.optim.Optimizer, list[tuple[set[nn.Parameter], Any]]]"
_hooks = weakref.WeakKeyDictionary()


def base_grad_factor(where: str, scale: str | float, num_members: int) -> float:
    """Return γ_θ as a number.

    Raises:
        TypeError, ValueError: scale is neither "sum", "mean" nor a finite number.
    """
    if isinstance(scale, str):
        if scale not in ("sum", "mean"):
            raise ValueError(f'{where}: scale must be "sum", "mean" or a float, got {scale!r}')
        return 1.0 if scale == "sum" else 1.0 / num_members
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"{where}: scale must be a str or a float, got {type(scale).__name__}")
    if not math.isfinite(scale):
        raise ValueError(f"{where}: scale must be finite, got {scale}")
    return float(scale)


def set_base_grad_scale(optimizer: torch.optim.Optimizer, model: nn.Module, scale: str | float) -> None:
    """Scale the gradients of base weights by γ_θ before every step of optimizer, whatever its rule.

    The gradients are scaled in place, so zero them after the step. A closure's gradients are scaled after each call.
    Calling again replaces the scale, 1 removes it. It is in no state dict: call it again where training goes on.

    Args:
        optimizer: any torch.optim optimizer that holds base weights of the model.
        model: expanded.
        scale: "sum" (1), "mean" (1/K) or a number.

    Raises:
        TypeError, ValueError: scale is none of these, or optimizer is none, holds no base weight of the model, or has
            a line search (LBFGS).
        RuntimeError: model is not expanded.

    Source: von Oswald et al., ICLR 2021, section 2 (γ_θ).
    """
    routings = routings_of("set_base_grad_scale", model)
    factor = base_grad_factor("set_base_grad_scale", scale, routings[0].total_members)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"set_base_grad_scale: optimizer must be a torch optimizer, got {type(optimizer).__name__}; "
            "give it the one that trains the base weights"
        )
    optimizer = plain_optimizer(optimizer)
    members = set(member_parameters(model))
    base = {parameter for parameter in model.parameters() if parameter not in members}
    if not any(parameter in base for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError(
            "set_base_grad_scale: optimizer holds no base weight of the model; give it the one that trains them"
        )
    if factor != 1.0 and any(group.get("line_search_fn") for group in optimizer.param_groups):
        raise ValueError(
            "set_base_grad_scale: optimizer must have no line search, which needs gradients of the loss it is told; "
            f"got {type(optimizer).__name__} with line_search_fn={optimizer.param_groups[0]['line_search_fn']!r}"
        )
    for routing in routings:
        routing.base_grad_scale = factor
    hooks = _hooks.setdefault(optimizer, [])
    for scaled, handle in [entry for entry in hooks if not base.isdisjoint(entry[0])]:
        hooks.remove((scaled, handle))
        handle.remove()
    if factor == 1.0:
        return

    def hook(stepping, args, kwargs):
        # args[0] is the optimizer itself
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            _scale_gradients(stepping, base, factor)
            return None

        def scaled_closure():
            loss = closure()
            _scale_gradients(stepping, base, factor)
            return loss

        rest = {key: value for key, value in kwargs.items() if key != "closure"}
        return (args[0], scaled_closure, *args[2:]), rest

    hooks.append((base, optimizer.register_step_pre_hook(hook)))


@torch.no_grad()
def _scale_gradients(optimizer: torch.optim.Optimizer, parameters: set[nn.Parameter], factor: float) -> None:
    gradients = [
        parameter.grad
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None and parameter in parameters
    ]
    dense = [gradient for gradient in gradients if not gradient.is_sparse]
    if dense:
        torch._foreach_mul_(dense, factor)
    for gradient in gradients:
        if gradient.is_sparse:
            gradient.mul_(factor)


@torch.no_grad()
def clip_grad_norm_(
    model: nn.Module, max_norm: float, norm_type: float = 2.0, *, error_if_nonfinite: bool = False
) -> Tensor:
    """Clip the gradients of an expanded model as the loop over members would: each update by its own norm.

    The loop makes K + 1 updates a step, and so there are K + 1 norms: of the base gradients (times γ_θ, where
    set_base_grad_scale has set it) and of each member's. One norm over everything, as
    torch.nn.utils.clip_grad_norm_ takes it, would let one member's outlier shrink the others' steps.

    Args:
        model: expanded; gradients are scaled in place. Unscale them first where a GradScaler is used.
        max_norm: of each update.
        norm_type: p of the p-norm, or inf.
        error_if_nonfinite: raise before anything is scaled; else a member whose norm is not finite becomes NaN alone.

    Returns:
        The norms before clipping, [1 + K]: base, member 0, …

    Raises:
        TypeError, ValueError: max_norm is no number, or below 0.
        RuntimeError: model is not expanded, or error_if_nonfinite and a norm is nan or inf.
    """
    routing = routings_of("clip_grad_norm_", model)[0]
    if isinstance(max_norm, bool) or not isinstance(max_norm, (int, float, Tensor)):
        raise TypeError(f"clip_grad_norm_: max_norm must be a float, got {type(max_norm).__name__}")
    if not max_norm >= 0:
        raise ValueError(f"clip_grad_norm_: max_norm must be at least 0, got {max_norm}")
    replicated = dict.fromkeys(member_parameters(model))  # in their order, each once
    member = [parameter.grad for parameter in replicated if parameter.grad is not None]
    base = [p.grad for p in model.parameters() if p.grad is not None and p not in replicated]
    device = next((gradient.device for gradient in (*base, *member)), None)
    norm = torch.nn.utils.get_total_norm(base, norm_type).to(device) * abs(routing.base_grad_scale)
    rows = [_member_norms(gradient, norm_type).to(device) for gradient in member]
    none = torch.zeros(1, routing.num_members, device=device)
    norms = torch.cat([norm.reshape(1), torch.linalg.vector_norm(torch.stack(rows) if rows else none, norm_type, 0)])
    if error_if_nonfinite and not bool(norms.isfinite().all()):
        raise RuntimeError(f"clip_grad_norm_: the norms must be finite, got {norms.tolist()} (base, then members)")
    factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_ has it
    for gradient in base:
        gradient.mul_(factors[0].to(gradient.device))
    for gradient in member:
        gradient.mul_(factors[1:].to(gradient).view(-1, *[1] * (gradient.dim() - 1)))
    return norms


def _member_norms(gradient: Tensor, norm_type: float) -> Tensor:
    """Return the norm of each member's part of a gradient [K, …], [K]."""
    dense = gradient.to_dense() if gradient.is_sparse else gradient
    return torch.linalg.vector_norm(dense.unsqueeze(-1).flatten(1), norm_type, 1)  # K numbers have no dim 1
