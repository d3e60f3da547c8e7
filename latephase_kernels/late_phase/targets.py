"""Which modules of a model become late-phase weights, and whether the model can be expanded at all."""

import functools
import inspect
import re
from collections.abc import Callable, Iterable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..nn import (
    EnsembleBatchNorm1d,
    EnsembleBatchNorm2d,
    EnsembleBatchNorm3d,
    EnsembleBatchNormAct2d,
    EnsembleGroupNorm,
    EnsembleLayerNorm,
    EnsembleRMSNorm,
    EnsembleSyncBatchNorm,
    EnsembleSyncBatchNormAct,
    HyperConv2d,
    HyperLinear,
    MemberHyperConv2d,
    MemberHyperLinear,
    MemberLinear,
    Memberwise,
    Rank1Conv1d,
    Rank1Conv2d,
    Rank1Conv3d,
    Rank1Linear,
    Rank1LSTM,
    SharedBatchNorm1d,
    SharedBatchNorm2d,
    SharedBatchNorm3d,
    SharedBatchNormAct2d,
    SharedSyncBatchNorm,
    SharedSyncBatchNormAct,
)
from ..nn.norm_act import norm_act_class
from ..nn.norms import is_layer_norm, is_rms_norm
from ..nn.routing import Routed

MEMBER_TYPES: dict[type, type] = {
    nn.BatchNorm1d: EnsembleBatchNorm1d,
    nn.BatchNorm2d: EnsembleBatchNorm2d,
    nn.BatchNorm3d: EnsembleBatchNorm3d,
    nn.SyncBatchNorm: EnsembleSyncBatchNorm,
    nn.Linear: MemberLinear,
    nn.LayerNorm: EnsembleLayerNorm,
    nn.GroupNorm: EnsembleGroupNorm,
    nn.RMSNorm: EnsembleRMSNorm,
    HyperConv2d: MemberHyperConv2d,
    HyperLinear: MemberHyperLinear,
}
RANK1_TYPES: dict[type, type] = {
    nn.Linear: Rank1Linear,
    nn.Conv1d: Rank1Conv1d,
    nn.Conv2d: Rank1Conv2d,
    nn.Conv3d: Rank1Conv3d,
    nn.LSTM: Rank1LSTM,
}
SHARED_TYPES: dict[type, type] = {
    nn.BatchNorm1d: SharedBatchNorm1d,
    nn.BatchNorm2d: SharedBatchNorm2d,
    nn.BatchNorm3d: SharedBatchNorm3d,
    nn.SyncBatchNorm: SharedSyncBatchNorm,
}
_WITH_ACTIVATION: dict[type, type] = {  # for timm's subclasses
    EnsembleBatchNorm2d: EnsembleBatchNormAct2d,
    EnsembleSyncBatchNorm: EnsembleSyncBatchNormAct,
    SharedBatchNorm2d: SharedBatchNormAct2d,
    SharedSyncBatchNorm: SharedSyncBatchNormAct,
}
_WRAPPERS = {
    "DataParallel": "give model.module, and wrap it afterwards",
    "DistributedDataParallel": "give model.module, and make a new DistributedDataParallel afterwards",
    "FSDPModule": (
        "give the model before fully_shard; to collapse, load the full state dict into an expanded model that is not "
        "sharded"
    ),
    "FullyShardedDataParallel": "give the model before it is wrapped",
    "OptimizedModule": "give model._orig_mod, and compile it afterwards",
}


def check_not_wrapped(where: str, model: nn.Module) -> None:
    """Raise if model is, or contains, a wrapper whose insides must not be replaced.

    Raises:
        TypeError: model is no module, or wrapped; the message says what to do.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{where}: model must be an nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        remedy = next((_WRAPPERS[cls.__name__] for cls in type(module).__mro__ if cls.__name__ in _WRAPPERS), None)
        if remedy is not None:
            at = f" ({name})" if name else ""
            raise TypeError(f"{where}: model must be a plain module, got {type(module).__name__}{at}; {remedy}")


def _head(model: nn.Module) -> list[nn.Module]:
    """Return the classification head: what timm's get_classifier names, else the last linear layer; [] if none."""
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    named = model.get_classifier() if hasattr(model, "get_classifier") else None
    return [named] if any(named is module for module in linear) else linear[-1:]


@functools.cache
def _forward_source(cls: type) -> str:
    """Return the source of a module's forward and of the methods that it calls, without comments."""
    sources: dict[str, str] = {}
    names = ["forward"]
    while names:
        name = names.pop()
        if name in sources or not hasattr(cls, name):
            continue
        try:
            sources[name] = re.sub("#.*", "", inspect.getsource(getattr(cls, name)))
        except (OSError, TypeError):
            sources[name] = ""
        names += re.findall(r"\bself\.(\w+)\(", sources[name])
    return "\n".join(sources.values())


# What is asked of a weight that stays as it is, rather than computed with it.
_ASKED = ("dtype", "device", "shape", "requires_grad", "numel", "size", "ndim", "dim")


@functools.cache
def _paths_read(cls: type) -> list[list[str]]:
    """Return what a module's forward takes from itself, as names: self.body[0].weight.T is body, 0, weight, T."""
    part = r"""\.\w+|\[-?\d+\]|\["\w+"\]|\['\w+'\]"""
    paths = re.findall(rf"(?<!isinstance\()\bself((?:{part})+)", _forward_source(cls))
    return [re.findall(r"-?\w+", path) for path in paths]


def _read_by(parent: nn.Module) -> set[nn.Module]:
    """Return the modules inside parent whose parameters its forward takes without calling them.

    Some attentions do, and what shares a weight between an encoder and a decoder.
    """
    if isinstance(parent, nn.TransformerEncoderLayer):  # its fast path does; expand closes it
        return set()
    found = set()
    for names in _paths_read(type(parent)):
        module: nn.Module | None = parent
        for name, following in zip(names, [*names[1:], ""]):
            if module is None or name in module._parameters:
                asked = following in _ASKED or following.startswith("is_")
                if module is not None and not asked:
                    found.add(module)
                break
            children = list(module._modules.values())
            negative = name.startswith("-") and int(name[1:]) <= len(children)
            module = children[int(name)] if negative else module._modules.get(name)
    return found - {parent}


def _uncalled(model: nn.Module) -> dict[nn.Module, str]:
    """Return the layers whose weights others take without calling them, with their names."""
    read = set().union(*(_read_by(module) for module in model.modules()))
    return {
        module: name
        for name, module in model.named_modules()
        if module in read and (isinstance(module, tuple(RANK1_TYPES)) or not isinstance(module, tuple(MEMBER_TYPES)))
    }


def _rank1(model: nn.Module) -> list[nn.Module]:
    """Return the linear layers, convolutions and LSTMs, exactly of these types, whose parents call them."""
    uncalled = _uncalled(model)
    return [module for module in model.modules() if type(module) in RANK1_TYPES and module not in uncalled]


def _norms(model: nn.Module, is_norm: Callable[[nn.Module], bool]) -> list[nn.Module]:
    """Return the norms that have weights to replicate."""
    return [module for module in model.modules() if is_norm(module) and getattr(module, "weight", None) is not None]


_NAMED: dict[str, Callable[[nn.Module], list[nn.Module]]] = {
    "batch_norm": lambda model: [module for module in model.modules() if isinstance(module, _BatchNorm)],
    "head": _head,
    "layer_norm": lambda model: _norms(model, is_layer_norm),
    "group_norm": lambda model: _norms(model, lambda module: isinstance(module, nn.GroupNorm)),
    "rms_norm": lambda model: _norms(model, is_rms_norm),
    "rank1": _rank1,
    "rank1_bias": _rank1,
    "embedding": lambda model: [module for module in model.modules() if isinstance(module, (HyperConv2d, HyperLinear))],
}

# What becomes of a target; of what several targets make of one module, the last here holds.
RANK1_KINDS = ("rank1", "rank1_bias")
_KINDS = (*RANK1_KINDS, "replicated")
Kinds = dict[nn.Module, str]  # by targeted module, one of _KINDS


def _select(model: nn.Module, target: str | Callable) -> Kinds:
    """Return what becomes of the modules that the target chooses."""
    if callable(target):
        answers = {module: target(name, module) for name, module in model.named_modules()}
        strange = next((a for a in answers.values() if isinstance(a, str) and a not in RANK1_KINDS), None)
        if strange is not None:
            raise ValueError(f'expand: a callable target must return a bool, "rank1" or "rank1_bias", got {strange!r}')
        return {module: a if isinstance(a, str) else "replicated" for module, a in answers.items() if a}
    if target not in _NAMED:
        names = ", ".join(f'"{name}"' for name in _NAMED)
        raise ValueError(f"expand: targets must be {names} or a callable (name, module) -> bool, got {target!r}")
    kind = target if target in _KINDS else "replicated"
    return dict.fromkeys(_NAMED[target](model), kind)


def _check_batch_dimension(model: nn.Module, kinds: Kinds) -> None:
    """Raise NotImplementedError if a target beside an LSTM with batch_first=False would split time among members."""
    named = [(name, module) for name, module in model.named_modules() if module in kinds]
    lstms = (name for name, m in named if isinstance(m, nn.LSTM) and kinds[m] in RANK1_KINDS and not m.batch_first)

    def is_free(module: nn.Module) -> bool:
        """Whether it may stand beside one; a replicated head behind it usually takes one step, so rows of the batch."""
        head = isinstance(module, nn.Linear) and kinds[module] == "replicated"
        return head or isinstance(module, (_BatchNorm, nn.LSTM))

    lstm, other = next(lstms, None), next((name for name, module in named if not is_free(module)), None)
    if lstm is not None and other is not None:
        raise NotImplementedError(
            f"expand: {lstm} has batch_first=False, but {other} takes dim 0 for the batch; make the LSTM with "
            'batch_first=True, or target it alone: targets=lambda name, module: "rank1" if name == '
            f'"{lstm}" else False'
        )


def find_targets(model: nn.Module, targets) -> tuple[Kinds, list]:
    """Return what becomes of the targeted modules, in the model's order, and the targets that found none.

    A layer that "rank1" and another target name ("head", say) is the other's.

    Raises:
        TypeError, ValueError: an unknown target, or the root itself is one.
        NotImplementedError: a layer whose parent does not call it, or rank-1 gains for an LSTM whose batch is in dim 1,
            beside layers that have theirs in dim 0.
    """
    if isinstance(targets, str) or callable(targets):
        targets = (targets,)
    elif not isinstance(targets, Iterable):
        raise TypeError(f"expand: targets must be names or callables, got {type(targets).__name__}")
    kinds: Kinds = {}
    empty = []
    for target in targets:
        if isinstance(target, (type, nn.Module)):
            got = target.__name__ if isinstance(target, type) else type(target).__name__
            raise TypeError(
                f"expand: targets must be names or callables, got {got}; choose modules by "
                f"targets=lambda name, module: isinstance(module, {got})"
            )
        if not isinstance(target, str) and not callable(target):
            raise TypeError(f"expand: targets must be names or callables, got {type(target).__name__}")
        selected = _select(model, target)
        if not selected:
            empty.append(target)
        for module, kind in selected.items():
            if kind == "rank1_bias" and isinstance(module, nn.LSTM):  # whose biases stay shared
                kind = "rank1"
            kinds[module] = max(kind, kinds.get(module, kind), key=_KINDS.index)
    for module, name in _uncalled(model).items():
        if module in kinds:
            what = "have rank-1 gains" if kinds[module] in RANK1_KINDS else "be replicated"
            raise NotImplementedError(
                f"expand: {name} cannot {what}: the module it is in reads its weight without calling it; choose other "
                "targets"
            )
    _check_batch_dimension(model, kinds)
    if model in kinds:
        raise ValueError(
            f"expand: the model itself ({type(model).__name__}) is a target and cannot be replaced in place; "
            "wrap it in nn.Sequential"
        )
    return {module: kinds[module] for module in model.modules() if module in kinds}, empty


def build(name: str, module: nn.Module, types: dict[type, type], *arguments) -> nn.Module:
    """Return module's replacement by the type that fits; the error names the module.

    Raises:
        NotImplementedError: there is none, or it would not compute the same.
    """
    cls = f"{type(module).__module__}.{type(module).__qualname__}"
    if any(nn.parameter.is_lazy(tensor) for tensor in [*module.parameters(), *module.buffers()]):
        raise NotImplementedError(f"expand: {name} ({cls}) is not initialized; run one batch through the model first")
    plain = next((plain for plain in types if isinstance(module, plain)), None)
    if plain is None and nn.RMSNorm in types:  # other libraries' classes have other parents
        plain = nn.RMSNorm if is_rms_norm(module) else nn.LayerNorm if is_layer_norm(module) else None
    if plain is None and types is not MEMBER_TYPES:
        raise NotImplementedError(
            f"expand: {name} is a {cls}, which cannot be expanded, only "
            f"{', '.join(accepted.__name__ for accepted in types)} can"
        )
    replacement = Memberwise if plain is None else types[plain]
    if norm_act_class(module) is not None:
        replacement = _WITH_ACTIVATION.get(replacement, replacement)
    try:
        return replacement.from_module(module, *arguments)
    except (NotImplementedError, TypeError) as error:
        raise NotImplementedError(f"expand: {name}: {error}") from None


def check_not_expanded(model: nn.Module) -> None:
    """Raise RuntimeError if model holds a module of an expanded model."""
    for name, module in model.named_modules():
        if isinstance(module, Routed):
            at = f'at "{name}"' if name else type(module).__name__
            raise RuntimeError(f"expand: model is already expanded ({at}); collapse it first")


def check_ties(model: nn.Module, kinds: Kinds) -> None:
    """Raise ValueError if a parameter of a target also belongs to a module that stays as it is, or keeps it shared."""
    tied: dict[int, list[tuple[str, nn.Module]]] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                tied.setdefault(id(parameter), []).append((f"{module_name}.{name}", module))
    for owners in tied.values():
        multiplied = next((name for name, owner in owners if kinds.get(owner) in RANK1_KINDS), None)
        if multiplied is not None and len(owners) > 1:
            other = next(name for name, _ in owners if name != multiplied)
            raise ValueError(
                f"expand: {multiplied} is tied to {other}, but collapse multiplies rank-1 gains into it alone; "
                "untie them, or choose the other layers by a callable target: lambda name, module: "
                f'"rank1" if type(module) is nn.Linear and name != "{multiplied.rpartition(".")[0]}" else False'
            )
        late = next((name for name, owner in owners if owner in kinds), None)
        staying = next((name for name, owner in owners if owner not in kinds), None)
        if late is not None and staying is not None:
            raise ValueError(
                f"expand: {late} is tied to {staying}, which is no target; untie them, or target both or none of them"
            )
