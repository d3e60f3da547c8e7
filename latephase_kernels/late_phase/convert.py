"""expand and collapse: a plain model to K late-phase members, and back.

Shapes: K members; a replicated tensor is [K, …] where the plain model's is […].
"""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..nn.member_module import MemberModule, check_mode, check_replication, copy_marks
from ..nn.routing import Model, Routed, Routing
from .fuse import unfuse
from .mixing import check_not_mixing
from .optimizers import (
    Gains,
    check_optimizers,
    extend_scheduler,
    listed_optimizers,
    listed_schedulers,
    mark_replaced,
    move_parameters,
)
from .stale_wrappers import mark_stale
from .targets import (
    MEMBER_TYPES,
    RANK1_KINDS,
    RANK1_TYPES,
    SHARED_TYPES,
    Kinds,
    build,
    check_not_expanded,
    check_not_wrapped,
    check_ties,
    find_targets,
)
from .transformers import check_batch_first, close_fast_paths, open_fast_paths

Replacements = dict[nn.Module, Any]  # the new module, by the one that it replaces


def expand(
    model: Model,
    num_members: int,
    *,
    targets: str | Callable | Iterable[str | Callable] = ("batch_norm",),
    noise_std: float = 0.0,
    generator: torch.Generator | None = None,
    optimizers: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] = (),
    member_state: str = "fresh",
    member_options: dict | None = None,
    schedulers: Any = (),
) -> Model:
    """Replicate the targets of model into num_members members, in place.

        φ_k = φ + noise_std · rms(φ) · ε_k,   ε_k ~ N(0, I)

    In train mode the model then takes the stacked batch [K·B, …], member-major; in eval mode an ordinary batch, which
    it answers as the collapsed model does. Every batch norm normalizes each member by itself, targeted or not.
    State dict keys stay; a replicated tensor gains a leading K; a plain checkpoint loads and is broadcast.

    Args:
        model: any model; it is changed.
        num_members: K.
        targets: one or several of
            "batch_norm";
            "head": the last linear layer (one: name several, as a detector has, by a callable);
            "layer_norm", "group_norm", "rms_norm": those with weights, layer and RMS norms of other libraries by the
                names of their classes (T5LayerNorm); a forward of their own runs once a member;
            "rank1": a pair of gains around every nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d and nn.LSTM of exactly
                these types (two pairs a layer of the LSTM), but where attention reads a weight without calling its
                layer; input_gain and output_gain join the state dict; a layer that another target names too is the
                other's;
            "rank1_bias": the same and, as in BatchEnsemble, a bias of each member's own (an LSTM's stay shared);
            "embedding": the embeddings of hypernetwork layers (HyperConv2d, HyperLinear); their templates stay shared;
            callables (name, module) -> bool, or "rank1" or "rank1_bias" to give that layer gains. They may choose any
                module that has parameters, no submodules and no buffers: its forward then runs once a member
                (lp.nn.Memberwise).
            (), no target, leaves every weight shared: ghost batch norm, K groups of rows with statistics of their own.
            All but batch norms and LSTMs take dim 0 of what reaches them for the batch.
        noise_std: σ0.
        generator: of ε.
        optimizers: live ones. Replicated parameters leave their group for a new one at the end; gains join that of
            their weight's group.
        member_state: "fresh" (they start without optimizer state, as in the paper) or "copy" (with the plain one's).
        member_options: of the new groups, over those of the group they left: lr, weight_decay, ….
        schedulers: one or several learning rate schedulers of these optimizers, to go on where they are: a new group
            takes the schedule of the group it left.

    Returns:
        model.

    Raises:
        TypeError: model is wrapped (DataParallel, DistributedDataParallel, compiled), or an argument has a wrong type.
        ValueError: an argument's value, the model itself is a target, or a target's parameter is tied elsewhere.
        NotImplementedError: a batch norm or target whose class computes more than torch.nn's or timm's, or is lazy, or
            stands beside attention with batch_first=False; another module that mixes the samples of a batch; an
            optimizer that cannot hold members.
        RuntimeError: model is already expanded.
        Nothing is changed then, but for the random numbers that were drawn.

    Source: von Oswald et al., ICLR 2021, section 2.
    """
    check_not_wrapped("expand", model)
    check_replication("expand", num_members, noise_std, generator)
    optimizers = listed_optimizers(optimizers)
    schedulers = listed_schedulers(schedulers)
    check_not_expanded(model)
    kinds, empty = find_targets(model, targets)
    for target in empty if kinds else ():
        warnings.warn(f"expand: target {target!r} matches no module of the model", stacklevel=2)
    if not kinds and (empty or not any(isinstance(module, _BatchNorm) for module in model.modules())):
        warnings.warn("expand: targets match no module of the model; it stays as it is", stacklevel=2)
        return model
    if isinstance(model, _BatchNorm):
        raise ValueError("expand: the model itself is a batch norm; wrap it in nn.Sequential")
    check_not_mixing(model, kinds)
    replacements: Replacements = {}
    for name, module in model.named_modules():
        if module in kinds:
            types = RANK1_TYPES if kinds[module] in RANK1_KINDS else MEMBER_TYPES
            bias = (True,) if kinds[module] == "rank1_bias" else ()
            replacements[module] = build(name, module, types, num_members, noise_std, generator, *bias)
        elif isinstance(module, _BatchNorm):
            replacements[module] = build(name, module, SHARED_TYPES, num_members)
    check_batch_first(model, {module: replacements[module] for module in kinds})
    check_ties(model, kinds)
    moved, added = _tie(kinds, replacements), _gains(model, kinds, replacements)
    _warn_of_time_first(model, kinds)
    _warn_of_hooks(model, moved)
    check_optimizers(model, optimizers, schedulers, moved, added, member_state, member_options or {})

    routing = Routing(model, num_members)
    for replacement in replacements.values():
        replacement.routing = routing
    replace_modules(model, replacements)
    close_fast_paths(model)
    for optimizer in optimizers:
        groups_left = move_parameters(optimizer, moved, added, member_state, member_options or {})
        for scheduler in schedulers:
            extend_scheduler(scheduler, optimizer, groups_left)
    mark_replaced(moved, "expand")
    mark_stale(model, "expand")
    left = _trained_by_none(model, moved.values(), optimizers)
    if optimizers and left:
        warnings.warn(
            f"expand: no optimizer trains {left[0]}"
            + (f" and {len(left) - 1} other replicated parameters" if len(left) > 1 else "")
            + ", because none of those given held the plain one; give them to one, or freeze them",
            stacklevel=2,
        )
    if optimizers and added:
        warnings.warn(
            f"expand: no optimizer trains {next(iter(added.values()))[0][0]} and other rank-1 gains, because none that "
            "could hold them has the weight that they multiply; give them to one",
            stacklevel=2,
        )
    return model


def _warn_of_time_first(model: nn.Module, kinds: Kinds) -> None:
    """Warn if the model has sequences with time in dim 0, which a replicated layer would take for the batch."""
    sequential = (nn.RNNBase, nn.MultiheadAttention)
    found = next((n for n, m in model.named_modules() if isinstance(m, sequential) and not m.batch_first), None)
    replicated = [(n, m) for n, m in model.named_modules() if kinds.get(m) == "replicated"]
    other = next((n for n, m in replicated if not isinstance(m, _BatchNorm)), None)  # which usually come before one
    if found is not None and other is not None:
        warnings.warn(
            f"expand: {found} has batch_first=False. If time is in dim 0 of what reaches {other}, the members get one "
            "another's samples: see lp.check_members",
            stacklevel=3,
        )


def _warn_of_hooks(model: nn.Module, moved: dict[nn.Parameter, nn.Parameter]) -> None:
    """Warn if a parameter that is about to be replaced has hooks of its own."""
    for name, parameter in model.named_parameters():
        hooks = parameter._backward_hooks, getattr(parameter, "_post_accumulate_grad_hooks", None)
        if parameter in moved and any(hooks):
            warnings.warn(
                f"expand: the hooks of {name} do not go over to the replicated parameter; register them again",
                stacklevel=3,
            )
            return


def _trained_by_none(model: nn.Module, replicated: Iterable[nn.Parameter], optimizers: list) -> list[str]:
    """Return the names of the replicated parameters that ask for gradients and that no optimizer holds."""
    held = {p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    left = {p for p in replicated if p.requires_grad} - held
    return [name for name, parameter in model.named_parameters() if parameter in left]


def _tie(targeted: Iterable[nn.Module], replacements: Replacements) -> dict[nn.Parameter, nn.Parameter]:
    """Tie the parameters of the replacements as those of the targets are; return plain parameter → replicated."""
    moved: dict[nn.Parameter, nn.Parameter] = {}
    for module in targeted:
        new = replacements[module]
        for name, parameter in module._parameters.items():
            if parameter is not None and name not in new.shared_names:
                new._parameters[name] = moved.setdefault(parameter, new._parameters[name])
    return moved


def _gains(model: nn.Module, kinds: Kinds, replacements: Replacements) -> Gains:
    """Return the rank-1 gains with their names, by the weight that they multiply."""
    gains: Gains = {}
    for name, module in model.named_modules():
        if kinds.get(module) not in RANK1_KINDS:
            continue
        for own, gain in replacements[module].replicated_parameters().items():
            if own in module._parameters:  # a bias of each member's own
                continue
            weight = own.replace("input_gain", "weight").replace("output_gain", "weight")  # an LSTM has several
            gains.setdefault(getattr(module, weight), []).append((f"{name}.{own}", gain))
    return gains


def replace_modules(model: nn.Module, replacements: Replacements) -> None:
    """Put the replacements where the modules that they replace are registered or in a list, tuple or dict."""
    by_id = {id(module): new for module, new in replacements.items()}
    for parent in list(model.modules()):
        _replaced(vars(parent), by_id)


def _replaced(value: Any, replacements: dict[int, nn.Module], depth: int = 5) -> Any:
    """Return value with the replacements in it, as many levels deep; lists and dicts are changed in place."""
    if isinstance(value, nn.Module):
        return replacements.get(id(value), value)
    if depth and isinstance(value, (dict, list)):
        for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
            new = _replaced(item, replacements, depth - 1)
            if new is not item:
                value[key] = new
    elif depth and isinstance(value, tuple):
        items = [_replaced(item, replacements, depth - 1) for item in value]
        if any(a is not b for a, b in zip(items, value)):
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


@torch.no_grad()
def collapse(model: Model, *, mode: str = "exact", member: int | None = None) -> Model:
    """Average the members of an expanded model into the plain model it came from, in place, or keep one of them.

    Keys and shapes of the state dict are the original ones. Optimizers still hold the members: make new ones.

    Args:
        model: expanded; it is changed.
        mode: "exact" (each layer answers, in eval mode, with the average of its members' outputs: for inference) or
            "weights" (every tensor is averaged: for further training). Identical members give back their bits in both.
        member: keep this one, with its statistics, instead of the average; the same in both modes.

    Returns:
        model.

    Raises:
        TypeError: model is wrapped or no module, or member no int.
        ValueError: an unknown mode or member, or model itself is a member module.
        RuntimeError: model is not expanded, other ranks have members of it, or SyncBatchNorm was put in after expand.
    """
    check_not_wrapped("collapse", model)
    check_mode(mode)
    if isinstance(model, Routed):
        raise ValueError(f"collapse: the model itself is a {type(model).__name__}; call its own collapse()")
    expanded = [(name, module) for name, module in model.named_modules() if isinstance(module, Routed)]
    if not expanded:
        raise RuntimeError("collapse: model is not expanded; call expand first")
    for _, module in expanded:
        if module.routing is not None:
            module.routing.check_whole("collapse")
    _check_foreign_norms(model)
    if member is not None:
        _keep(member, [module for _, module in expanded])
    replacements = {module: module.collapse(mode) for _, module in expanded}
    for _, module in expanded:
        for name, new in replacements[module]._parameters.items():
            old = module._parameters.get(name)
            if old is not None and new is not None and old is not new:
                copy_marks(old, new)
    _tie_plain(expanded, replacements)
    unfuse(model)
    replace_modules(model, replacements)
    open_fast_paths(model)
    mark_replaced({p for _, module in expanded for p in module.parameters()}.difference(model.parameters()), "collapse")
    mark_stale(model, "collapse")
    return model


def _keep(member: int, modules: list[Routed]) -> None:
    """Give all members the weights and statistics of one: their average is that member, bit for bit."""
    if isinstance(member, bool) or not isinstance(member, int):
        raise TypeError(f"collapse: member must be an int or None, got {type(member).__name__}")
    num_members = modules[0].num_members
    if not 0 <= member < num_members:
        raise ValueError(f"collapse: member must be within range({num_members}), got {member}; member 0 is the first")
    for module in modules:
        if not isinstance(module, MemberModule):  # all members share what it has
            continue
        for tensor in (*module.replicated_parameters().values(), *module._buffers.values()):
            if tensor is not None:
                tensor.copy_(tensor[member].clone())


def _check_foreign_norms(model: nn.Module) -> None:
    """Warn of a batch norm that was put into the model after expand; raise if it holds the members' weights."""
    for name, module in model.named_modules():
        if not isinstance(module, _BatchNorm) or isinstance(module, Routed):
            continue
        kind = type(module).__name__
        if module.weight is not None and module.weight.dim() > 1:
            raise RuntimeError(
                f"collapse: {name} ({kind}) has the weights of all members, {list(module.weight.shape)}, but "
                "normalizes them together; use convert_sync_batchnorm before expand"
            )
        warnings.warn(
            f"collapse: {name} ({kind}) was put into the model after expand; in training it has mixed the members",
            stacklevel=3,
        )


def _tie_plain(expanded: list[tuple[str, nn.Module]], replacements: Replacements) -> None:
    """Tie what was tied, where the averages are equal: exact collapse folds each layer's own statistics into them."""
    first: dict[nn.Parameter, nn.Parameter] = {}
    for module_name, module in expanded:
        if not isinstance(module, MemberModule):
            continue
        parameters = replacements[module]._parameters
        for name, parameter in module.replicated_parameters().items():
            if name not in parameters:  # rank-1 gains, multiplied into the weight
                continue
            tied = first.setdefault(parameter, parameters[name])
            if tied is parameters[name] or torch.equal(tied, parameters[name]):
                parameters[name] = tied
            else:
                warnings.warn(
                    f"collapse: {module_name}.{name} was tied to another layer and no longer is; "
                    'mode="weights" keeps it',
                    stacklevel=3,
                )
