"""Optimizers of an expanded model: parameters that move, and groups."""

import copy
import re
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ..nn.member_module import MemberModule

# ---------------------------------------------------------------------------------------------- live optimizers


# Rank-1 gains with their names, by the weight that they multiply.
Gains = dict[nn.Parameter, list[tuple[str, nn.Parameter]]]

# Rules that mix the elements of a tensor (a norm, a factorization, a matrix sign): [K, …] is not K tensors to them.
_MIXING = ("Adafactor", "Lamb", "LAMB", "FusedLAMB", "Lars", "LARS", "LBFGS", "Muon", "NovoGrad", "NvNovoGrad", "SOAP")


def check_optimizers(
    model: nn.Module,
    optimizers: list,
    moved: dict[nn.Parameter, nn.Parameter],
    added: Gains,
    member_state: str,
    options: dict,
) -> None:
    """Raise unless move_parameters can work on each optimizer.

    Raises:
        TypeError, ValueError, NotImplementedError: the message names the argument.
    """
    if member_state not in ("fresh", "copy"):
        raise ValueError(f'expand: member_state must be "fresh" or "copy", got {member_state!r}')
    if not isinstance(options, dict):
        raise TypeError(f"expand: member_options must be a dict, got {type(options).__name__}")
    own = set(model.parameters())
    for optimizer in optimizers:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"expand: optimizers must be torch optimizers, got {type(optimizer).__name__}")
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if not own.intersection(parameters):
            raise ValueError(
                f"expand: optimizers must hold parameters of the model, but none of the {type(optimizer).__name__}'s "
                f"{len(parameters)} is one; make it from this model's parameters"
            )
        held = [p for p in parameters if p in moved]
        if not held and not any(p in added for p in parameters):
            continue
        known = {key for group in optimizer.param_groups for key in group} - {"params", "param_names"}
        unknown = sorted(set(options) - known)
        if unknown:
            raise ValueError(
                f"expand: member_options has {unknown[0]!r}, which {type(optimizer).__name__} does not know; "
                f"it knows {', '.join(sorted(known))}"
            )
        if held and type(optimizer).__name__ in _MIXING:
            raise NotImplementedError(
                f"expand: {type(optimizer).__name__} mixes the elements of a tensor and cannot hold replicated "
                "parameters [K, …]; give the targets' parameters an optimizer of their own, such as SGD or AdamW"
            )
        if hasattr(optimizer.step, "_wrapped_by_lr_sched"):
            warnings.warn(
                f"expand: the {type(optimizer).__name__} has a learning rate scheduler, which may not know the "
                "members' new groups; make it again after expand (with last_epoch=scheduler.last_epoch to go on)",
                stacklevel=3,
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
    optimizer: torch.optim.Optimizer,
    moved: dict[nn.Parameter, nn.Parameter],
    added: Gains,
    member_state: str,
    options: dict,
) -> None:
    """Replace each plain parameter by its replicated one, in a new group behind the others for each group it left.

    The gains of the weights in a group join that new group, and leave `added`.
    """
    new_groups = []
    takes_gains = type(optimizer).__name__ not in _MIXING
    for group in optimizer.param_groups:
        positions = [i for i, parameter in enumerate(group["params"]) if parameter in moved]
        gains = [gain for parameter in group["params"] if takes_gains for gain in added.pop(parameter, ())]
        if not positions and not gains:
            continue
        new = {key: _copied(value) for key, value in group.items() if key not in ("params", "param_names")}
        new.update({key: _copied(value) for key, value in options.items()})
        if "lr" in options and "initial_lr" in new:  # a scheduler's mark
            new["initial_lr"] = _copied(options["lr"])
        if isinstance(group.get("name"), str):  # as param_groups names them
            new["name"] = re.sub("^base(?=$|_no_decay$)", "member", group["name"])
        leaving = [group["params"][i] for i in positions]
        new["params"] = [moved[parameter] for parameter in leaving]
        if "param_names" in group:
            new["params"] = [(group["param_names"][i], p) for i, p in zip(positions, new["params"])]
            group["param_names"] = [n for i, n in enumerate(group["param_names"]) if i not in set(positions)]
        new["params"] += gains if "param_names" in group else [gain for _, gain in gains]
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
            yield from module.replicated_parameters().values()


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
