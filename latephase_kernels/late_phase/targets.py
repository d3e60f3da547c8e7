"""Which modules of a model become late-phase weights, and whether the model can be expanded at all."""

from collections.abc import Callable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..nn import (
    EnsembleBatchNorm1d,
    EnsembleBatchNorm2d,
    EnsembleBatchNorm3d,
    MemberLinear,
    SharedBatchNorm1d,
    SharedBatchNorm2d,
    SharedBatchNorm3d,
)
from ..nn.routing import Routed

MEMBER_TYPES: dict[type, type] = {
    nn.BatchNorm1d: EnsembleBatchNorm1d,
    nn.BatchNorm2d: EnsembleBatchNorm2d,
    nn.BatchNorm3d: EnsembleBatchNorm3d,
    nn.Linear: MemberLinear,
}
SHARED_TYPES: dict[type, type] = {
    nn.BatchNorm1d: SharedBatchNorm1d,
    nn.BatchNorm2d: SharedBatchNorm2d,
    nn.BatchNorm3d: SharedBatchNorm3d,
}
_WRAPPERS = {
    "DataParallel": "expand model.module and wrap it afterwards",
    "DistributedDataParallel": "expand model.module and wrap it afterwards",
    "FullyShardedDataParallel": "expand the model before wrapping it",
    "OptimizedModule": "expand model._orig_mod and compile it afterwards",
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
            raise TypeError(
                f"{where}: model must be a plain module, got {type(module).__name__}{at}; "
                f"{remedy.replace('expand', where, 1)}"
            )


def _head(model: nn.Module) -> list[nn.Module]:
    """Return the classification head: what timm's get_classifier names, else the last linear layer; [] if none."""
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    named = model.get_classifier() if hasattr(model, "get_classifier") else None
    return [named] if any(named is module for module in linear) else linear[-1:]


def _select(model: nn.Module, target: str | Callable) -> list[nn.Module]:
    if callable(target):
        return [module for name, module in model.named_modules() if target(name, module)]
    if target == "batch_norm":
        return [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if target == "head":
        return _head(model)
    raise ValueError(
        f'expand: targets must be "batch_norm", "head" or a callable (name, module) -> bool, got {target!r}'
    )


def find_targets(model: nn.Module, targets) -> tuple[dict[int, nn.Module], list]:
    """Return the targeted modules by id, in the model's order, and the targets that found none.

    Raises:
        TypeError, ValueError: an unknown target, or the root itself is one.
    """
    targets = (targets,) if isinstance(targets, str) or callable(targets) else tuple(targets)
    found: set[int] = set()
    empty = []
    for target in targets:
        if not isinstance(target, str) and not callable(target):
            raise TypeError(f"expand: targets must be names or callables, got {type(target).__name__}")
        selected = {id(module) for module in _select(model, target)}
        if not selected:
            empty.append(target)
        found |= selected
    if id(model) in found:
        raise ValueError(
            f"expand: the model itself ({type(model).__name__}) is a target and cannot be replaced in place; "
            "wrap it in nn.Sequential"
        )
    return {id(module): module for module in model.modules() if id(module) in found}, empty


def build(name: str, module: nn.Module, types: dict[type, type], *arguments) -> nn.Module:
    """Return module's replacement by the type that fits; the error names the module.

    Raises:
        NotImplementedError: there is none, or it would not compute the same.
    """
    cls = f"{type(module).__module__}.{type(module).__qualname__}"
    if any(nn.parameter.is_lazy(parameter) for parameter in module.parameters()):
        raise NotImplementedError(f"expand: {name} ({cls}) is not initialized; run one batch through the model first")
    plain = next((plain for plain in types if isinstance(module, plain)), None)
    if plain is None:
        hint = "; convert it back to a BatchNorm first" if isinstance(module, nn.SyncBatchNorm) else ""
        raise NotImplementedError(
            f"expand: {name} is a {cls}, which cannot be expanded, only "
            f"{', '.join(accepted.__name__ for accepted in types)} can{hint}"
        )
    try:
        return types[plain].from_module(module, *arguments)
    except (NotImplementedError, TypeError) as error:
        raise NotImplementedError(f"expand: {name}: {error}") from None


def check_not_expanded(model: nn.Module) -> None:
    """Raise RuntimeError if model holds a module of an expanded model."""
    for name, module in model.named_modules():
        if isinstance(module, Routed):
            at = name or type(module).__name__
            raise RuntimeError(f"expand: model is already expanded ({at}); collapse it first")


def check_ties(model: nn.Module, targets: dict[int, nn.Module]) -> None:
    """Raise ValueError if a parameter of a target also belongs to a module that stays as it is."""
    owned = {id(p): (name, t) for t in targets.values() for name, p in t._parameters.items() if p is not None}
    names = {id(module): name for name, module in model.named_modules()}
    for module_name, module in model.named_modules():
        if id(module) in targets:
            continue
        for name, parameter in module._parameters.items():
            if id(parameter) in owned:
                own_name, target = owned[id(parameter)]
                raise ValueError(
                    f"expand: {names[id(target)]}.{own_name} is tied to {module_name}.{name}, which is no target; "
                    "target both or untie them"
                )
