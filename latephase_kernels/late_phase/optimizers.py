"""Optimizers of an expanded model: parameters that move, and groups."""

import copy
import functools
import itertools
import re
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..nn.member_module import REPLACED_BY, MemberModule

# ---------------------------------------------------------------------------------------------- live optimizers


# Rank-1 gains with their names, by the weight that they multiply.
Gains = dict[nn.Parameter, list[tuple[str, nn.Parameter]]]

# Rules that mix the elements of a tensor or of all (a norm, a factorization, a matrix sign, a step size found from all
# gradients, a step to the sharp side): [K, …] is not K tensors to them. Libraries write their names in several ways.
_MIXING_RULES = {
    *("adafactor", "adafactorbigvision", "adamp", "came", "dadaptadagrad", "dadaptadam", "dadaptadan", "dadaptlion"),
    *("dadaptsgd", "fusedlamb", "kron", "lamb", "lars", "lbfgs", "mars", "muon", "novograd", "nvnovograd", "prodigy"),
    *("ranger", "ranger21", "sgdp", "shampoo", "sm3", "soap", "stableadamw"),
    *("bsam", "friendlysam", "gsam", "looksam", "sam", "wsam"),
}


def _mixing(optimizer: torch.optim.Optimizer) -> str | None:
    """Return the name of an optimizer, or of one inside it, that is or derives from one of these; None if none does."""
    return next(
        (
            type(o).__name__
            for o in _nested(optimizer)
            if any(k.__name__.lower() in _MIXING_RULES for k in type(o).__mro__)
        ),
        None,
    )


def _is_cautious(group: dict, options: dict) -> bool:
    """Return whether members in such a group would share timm's caution, a mean over the whole tensor."""
    return bool({**group, **options}.get("caution"))


def _nested(optimizer: Any) -> Iterator[Any]:
    """Yield an optimizer and, from wrappers such as Accelerate's and timm's Lookahead, those inside it."""
    yield optimizer
    for name in ("optimizer", "base_optimizer", "_base_optimizer"):
        inner = getattr(optimizer, name, None)
        if isinstance(inner, torch.optim.Optimizer):
            yield from _nested(inner)
            return


def plain_optimizer(optimizer: Any) -> Any:
    """Return the torch optimizer inside wrappers, or the argument itself."""
    *_, plain = _nested(optimizer)
    return plain


def listed_optimizers(optimizers: torch.optim.Optimizer | Iterable[torch.optim.Optimizer]) -> list:
    """Return one or several optimizers, as expand takes them, as a list; check_optimizers looks at what is in it."""
    if isinstance(optimizers, torch.optim.Optimizer):
        return [optimizers]
    if not isinstance(optimizers, Iterable):
        raise TypeError(
            f"expand: optimizers must be torch optimizers, got {type(optimizers).__name__}; give one or a list of them"
        )
    return list(optimizers)


def listed_schedulers(schedulers: Any) -> list:
    """Return one or several schedulers, or None, as a list; of wrappers (Accelerate's) the schedulers inside."""
    if schedulers is None:
        return []
    if hasattr(schedulers, "optimizer") or hasattr(schedulers, "scheduler"):
        schedulers = [schedulers]
    if not isinstance(schedulers, Iterable):
        raise TypeError(
            f"expand: schedulers must be learning rate schedulers, got {type(schedulers).__name__}; "
            "give one or a list of them"
        )
    return [s if hasattr(s, "optimizer") else getattr(s, "scheduler", s) for s in schedulers]


def check_optimizers(
    model: nn.Module,
    optimizers: list,
    schedulers: list,
    moved: dict[nn.Parameter, nn.Parameter],
    added: Gains,
    member_state: str,
    options: dict,
) -> None:
    """Raise unless move_parameters can work on each optimizer, and extend_scheduler on each scheduler.

    Raises:
        TypeError, ValueError, NotImplementedError: the message names the argument.
    """
    if member_state not in ("fresh", "copy"):
        raise ValueError(f'expand: member_state must be "fresh" or "copy", got {member_state!r}')
    if not isinstance(options, dict):
        raise TypeError(f"expand: member_options must be a dict, got {type(options).__name__}")
    for scheduler in schedulers:
        if not any(_belongs(scheduler, optimizer) for optimizer in optimizers):
            raise ValueError(
                f"expand: schedulers must be learning rate schedulers of the optimizers given, got "
                f"{type(scheduler).__name__} of another one; give its optimizer as optimizers="
            )
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
        mixing = _mixing(optimizer)
        if held and mixing is not None:
            raise NotImplementedError(
                f"expand: {mixing} mixes the elements of a tensor and cannot hold replicated "
                "parameters [K, …]; give the targets' parameters an optimizer of their own, such as SGD or AdamW"
            )
        touched = [group for group in optimizer.param_groups if any(p in moved or p in added for p in group["params"])]
        if any(_is_cautious(group, options) for group in touched):
            raise NotImplementedError(
                f"expand: {type(optimizer).__name__} with caution=True mixes the elements of a tensor and cannot hold "
                'replicated parameters [K, …]; give member_options={"caution": False}'
            )
        scheduled = any(hasattr(o.step, "_wrapped_by_lr_sched") for o in _nested(optimizer))
        if scheduled and not any(_belongs(scheduler, optimizer) for scheduler in schedulers):
            warnings.warn(
                f"expand: the {type(optimizer).__name__} has a learning rate scheduler, which does not know the "
                "members' new groups; give it as schedulers=",
                stacklevel=3,
            )
        for parameter in held if member_state == "copy" else ():
            states = [nested.state.get(parameter, {}) for nested in _nested(optimizer)]
            for key, value in itertools.chain.from_iterable(state.items() for state in states):
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
) -> list[int]:
    """Replace each plain parameter by its replicated one, in a new group behind the others for each group it left.

    The gains of the weights in a group join that new group, and leave `added`. Returns the numbers of the groups left.
    """
    new_groups, left = [], []
    takes_gains = _mixing(optimizer) is None
    for number, group in enumerate(optimizer.param_groups):
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
        for parameter, nested in itertools.product(leaving, _nested(optimizer)):
            _move_state(nested, parameter, moved[parameter], member_state)
        new_groups.append(new)
        left.append(number)
    plain = plain_optimizer(optimizer)
    for new in new_groups:
        optimizer.add_param_group(new)
        _begin_adagrad(plain, optimizer.param_groups[-1])
        _begin_fused_momentum(plain, optimizer.param_groups[-1])
    return left


# Numbers that optimizers keep as tensors of shape []: one for all members, of a parameter of that shape, too.
_NUMBERS = ("step", "mu_product", "eta", "mu")


def _move_state(optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter, member_state: str) -> None:
    state = optimizer.state.pop(old, {})
    if member_state == "fresh" or not state:
        return
    optimizer.state[new] = {
        key: value.detach().expand(new.shape).clone()
        if isinstance(value, Tensor) and value.shape == old.shape and (value.dim() or key not in _NUMBERS)
        else _copied(value)
        for key, value in state.items()
    }


def _begin_adagrad(optimizer: torch.optim.Optimizer, group: dict) -> None:
    """Make the state of a new group: Adagrad makes it with the optimizer, and of some versions of torch not later."""
    if not isinstance(optimizer, torch.optim.Adagrad):
        return
    options = {key: group[key] for key in ("initial_accumulator_value", "fused")}
    for parameter in group["params"]:
        if not optimizer.state[parameter]:
            optimizer.state[parameter] = torch.optim.Adagrad([parameter], **options).state[parameter]


def _begin_fused_momentum(optimizer: torch.optim.Optimizer, group: dict) -> None:
    """Begin gains' momentum at 0 beside copied momenta: SGD's fused step wants all of a group's, or none."""
    if not (isinstance(optimizer, torch.optim.SGD) and group["fused"] and group["momentum"]):
        return
    if any(optimizer.state.get(parameter) for parameter in group["params"]):
        for parameter in group["params"]:
            optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))


# ---------------------------------------------------------------------------------------------- schedulers


# What schedulers, torch's and timm's, have for each group.
_OF_GROUPS = (
    *("base_lrs", "base_values", "_last_lr", "lr_lambdas", "min_lrs", "max_lrs"),
    *("base_momentums", "max_momentums", "warmup_steps"),
)


def _belongs(scheduler: Any, optimizer: torch.optim.Optimizer) -> bool:
    """Whether scheduler is one of optimizer, either of them wrapped or not."""
    return plain_optimizer(getattr(scheduler, "optimizer", None)) is plain_optimizer(optimizer)


def extend_scheduler(scheduler: Any, optimizer: torch.optim.Optimizer, left: list[int]) -> None:
    """Make a scheduler treat each group that move_parameters added as it does the group left, whose number is given."""
    inner = [*getattr(scheduler, "_schedulers", ()), getattr(scheduler, "lr_scheduler", None)]  # the last: timm's
    for other in inner:
        if other is not None:
            extend_scheduler(other, optimizer, left)
    if not _belongs(scheduler, optimizer):
        return
    groups = optimizer.param_groups
    new = groups[len(groups) - len(left) :]
    for name in _OF_GROUPS:
        values = getattr(scheduler, name, None)
        if not isinstance(values, list) or len(values) + len(left) != len(groups):
            continue
        key = {"base_lrs": "initial_lr", "base_values": "initial_lr", "_last_lr": "lr"}.get(name)
        values += [group.get(key, values[number]) for group, number in zip(new, left)]


# ---------------------------------------------------------------------------------------------- replaced


_looked_at: "weakref.WeakSet[torch.optim.Optimizer]" = weakref.WeakSet()  # since the last call that replaced any


def mark_replaced(parameters: Iterable[nn.Parameter], by: str) -> None:
    """Let every optimizer warn at its next step if it still holds one of these parameters."""
    for parameter in parameters:
        setattr(parameter, REPLACED_BY, by)
    _looked_at.clear()
    _watch_steps()


@functools.cache
def _watch_steps() -> None:
    register_optimizer_step_pre_hook(_look_at)


def _look_at(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    if torch.compiler.is_compiling() or optimizer in _looked_at:
        return
    _looked_at.add(optimizer)
    _warn_of_mixed(optimizer)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    replaced = [parameter for parameter in held if hasattr(parameter, REPLACED_BY)]
    if not replaced:
        return
    by = getattr(replaced[0], REPLACED_BY)
    remedy = "give live optimizers as expand(…, optimizers=)" if by == "expand" else "make a new optimizer after it"
    warnings.warn(
        f"{type(optimizer).__name__}.step: of the {len(held)} parameters that the optimizer holds, {by} has replaced "
        f"{len(replaced)} in their model (the first is {list(replaced[0].shape)}), and this optimizer does not train "
        f"what they became; {remedy}",
        stacklevel=3,
    )


def _warn_of_mixed(optimizer: torch.optim.Optimizer) -> None:
    """Warn if an optimizer that was made after expand, which would refuse it, takes members for one tensor."""
    for group in optimizer.param_groups:
        members = [parameter for parameter in group["params"] if hasattr(parameter, "num_members")]
        if members and (_mixing(optimizer) is not None or _is_cautious(group, {})):
            warnings.warn(
                f"{type(optimizer).__name__}.step: the rule mixes the elements of a tensor, and the optimizer holds "
                f"replicated parameters (the first is {list(members[0].shape)}): it takes the {members[0].num_members} "
                "members for one tensor; give them an optimizer of their own, such as SGD or AdamW",
                stacklevel=4,
            )
            return


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
        lr, weight_decay: of base weights. A group's own values hold, whatever the optimizer is given beside them: say
            weight_decay here.
        member_lr, member_weight_decay: of replicated weights; None for those of base weights.
        no_decay: None (all decay), the largest number of dimensions *before expansion* that does not decay
            (1 or True: biases and norms), or a callable (name, parameter) -> bool.

    Returns:
        Up to four groups with a "name": base, base_no_decay, member, member_no_decay; empty ones are left out.

    Raises:
        TypeError: no_decay is none of these.
        ValueError: no_decay is negative.
    """
    if no_decay is not None and not isinstance(no_decay, int) and not callable(no_decay):
        raise TypeError(f"param_groups: no_decay must be None, an int or a callable, got {type(no_decay).__name__}")
    if isinstance(no_decay, int) and no_decay < 0:
        raise ValueError(f"param_groups: no_decay must be at least 0, got {no_decay}; None lets all weights decay")
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
