"""Optimizers of an expanded model: parameters that move, groups, and the scale of base gradients."""

import copy
import math
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ..nn.member_module import MemberModule
from ..nn.routing import Routed

# ---------------------------------------------------------------------------------------------- live optimizers


def check_optimizers(
    optimizers: list, moved: dict[nn.Parameter, nn.Parameter], member_state: str, options: dict
) -> None:
    """Raise unless move_parameters can work on each optimizer.

    Raises:
        TypeError, ValueError, NotImplementedError: the message names the argument.
    """
    if member_state not in ("fresh", "copy"):
        raise ValueError(f'expand: member_state must be "fresh" or "copy", got {member_state!r}')
    if not isinstance(options, dict):
        raise TypeError(f"expand: member_options must be a dict, got {type(options).__name__}")
    for optimizer in optimizers:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"expand: optimizers must be torch optimizers, got {type(optimizer).__name__}")
        held = [p for group in optimizer.param_groups for p in group["params"] if p in moved]
        if not held:
            continue
        known = {key for group in optimizer.param_groups for key in group} - {"params", "param_names"}
        unknown = sorted(set(options) - known)
        if unknown:
            raise ValueError(
                f"expand: member_options has {unknown[0]!r}, which {type(optimizer).__name__} does not know; "
                f"it knows {', '.join(sorted(known))}"
            )
        if type(optimizer).__name__ in ("LBFGS", "Muon"):
            raise NotImplementedError(
                f"expand: {type(optimizer).__name__} cannot hold replicated parameters [K, …]; give the targets' "
                "parameters an optimizer of their own, such as SGD"
            )
        for parameter in held if member_state == "copy" else ():
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.shape != parameter.shape and value.numel() != 1:
                    raise ValueError(
                        f'expand: member_state="copy" cannot broadcast the state {key!r} of shape {list(value.shape)} '
                        f'for a parameter of shape {list(parameter.shape)}; use member_state="fresh"'
                    )


def _copied(value):
    """Return a copy that shares no memory."""
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def move_parameters(
    optimizer: torch.optim.Optimizer, moved: dict[nn.Parameter, nn.Parameter], member_state: str, options: dict
) -> None:
    """Replace each plain parameter by its replicated one, in a new group behind the others for each group it left."""
    new_groups = []
    for group in optimizer.param_groups:
        positions = [i for i, parameter in enumerate(group["params"]) if parameter in moved]
        if not positions:
            continue
        new = {key: _copied(value) for key, value in group.items() if key not in ("params", "param_names")}
        new.update({key: _copied(value) for key, value in options.items()})
        leaving = [group["params"][i] for i in positions]
        new["params"] = [moved[parameter] for parameter in leaving]
        if "param_names" in group:
            new["params"] = [(group["param_names"][i], p) for i, p in zip(positions, new["params"])]
            group["param_names"] = [n for i, n in enumerate(group["param_names"]) if i not in set(positions)]
        group["params"] = [parameter for parameter in group["params"] if parameter not in moved]
        for parameter in leaving:
            _move_state(optimizer, parameter, moved[parameter], member_state)
        new_groups.append(new)
    for new in new_groups:
        optimizer.add_param_group(new)


def _move_state(optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter, member_state: str) -> None:
    state = optimizer.state.pop(old, {})
    if member_state == "fresh" or not state:
        return
    optimizer.state[new] = {
        key: value.detach().expand(new.shape).clone()
        if isinstance(value, Tensor) and value.shape == old.shape
        else _copied(value)
        for key, value in state.items()
    }


# ---------------------------------------------------------------------------------------------- groups


def member_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the replicated parameters [K, …], by the type of the module that owns them."""
    for module in model.modules():
        if isinstance(module, MemberModule):
            yield from (parameter for parameter in module._parameters.values() if parameter is not None)


def param_groups(
    model: nn.Module,
    *,
    lr: float | Tensor,
    member_lr: float | Tensor | None = None,
    weight_decay: float = 0.0,
    member_weight_decay: float | None = None,
    no_decay: int | bool | Callable[[str, nn.Parameter], bool] | None = None,
) -> list[dict]:
    """Return parameter groups for any torch.optim optimizer: base and member weights, with and without decay.

    Args:
        model: expanded or plain.
        lr, weight_decay: of base weights.
        member_lr, member_weight_decay: of replicated weights; None for those of base weights.
        no_decay: None (all decay), the largest number of dimensions *before expansion* that does not decay
            (1 or True: biases and norms), or a callable (name, parameter) -> bool.

    Returns:
        Up to four groups with a "name": base, base_no_decay, member, member_no_decay; empty ones are left out.

    Raises:
        TypeError: no_decay is none of these.
    """
    if no_decay is not None and not isinstance(no_decay, int) and not callable(no_decay):
        raise TypeError(f"param_groups: no_decay must be None, an int or a callable, got {type(no_decay).__name__}")
    settings = {
        "base": (lr, weight_decay),
        "member": (
            lr if member_lr is None else member_lr,
            weight_decay if member_weight_decay is None else member_weight_decay,
        ),
    }
    members = set(member_parameters(model))
    groups: dict[str, dict] = {}
    for kind, (kind_lr, decay) in settings.items():
        groups[kind] = {"name": kind, "params": [], "lr": kind_lr, "weight_decay": decay}
        groups[kind + "_no_decay"] = {"name": kind + "_no_decay", "params": [], "lr": kind_lr, "weight_decay": 0.0}
    for name, parameter in model.named_parameters():
        kind = "member" if parameter in members else "base"
        if callable(no_decay):
            exempt = no_decay(name, parameter)
        else:
            exempt = no_decay is not None and no_decay is not False and parameter.dim() - (kind == "member") <= no_decay
        groups[kind + "_no_decay" if exempt else kind]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


# ---------------------------------------------------------------------------------------------- base gradient scale

_handles: "weakref.WeakKeyDictionary[torch.optim.Optimizer, object]" = weakref.WeakKeyDictionary()


def set_base_grad_scale(optimizer: torch.optim.Optimizer, model: nn.Module, scale: str | float) -> None:
    """Scale the gradients of base weights by γ_θ before every step of optimizer, whatever its rule.

    The gradients are scaled in place, so zero them after the step. A closure's gradients are scaled after each call.
    Calling again replaces the scale, 1 removes it.

    Args:
        optimizer: any torch.optim optimizer that holds base weights of the model.
        model: expanded.
        scale: "sum" (1), "mean" (1/K) or a number.

    Raises:
        TypeError, ValueError: scale is none of these.
        RuntimeError: model is not expanded.

    Source: von Oswald et al., ICLR 2021, section 2 (γ_θ).
    """
    num_members = next((module.num_members for module in model.modules() if isinstance(module, Routed)), None)
    if num_members is None:
        raise RuntimeError("set_base_grad_scale: model is not expanded; call expand first")
    if isinstance(scale, str):
        if scale not in ("sum", "mean"):
            raise ValueError(f'set_base_grad_scale: scale must be "sum", "mean" or a float, got {scale!r}')
        factor = 1.0 if scale == "sum" else 1.0 / num_members
    elif isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"set_base_grad_scale: scale must be a str or a float, got {type(scale).__name__}")
    elif not math.isfinite(scale):
        raise ValueError(f"set_base_grad_scale: scale must be finite, got {scale}")
    else:
        factor = float(scale)
    handle = _handles.pop(optimizer, None)
    if handle is not None:
        handle.remove()
    if factor == 1.0:
        return
    members = set(member_parameters(model))
    base = {parameter for parameter in model.parameters() if parameter not in members}

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

    _handles[optimizer] = optimizer.register_step_pre_hook(hook)


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
