"""Modules other than batch norm that let the samples of a batch, and so members of a stacked one, see each other."""

import warnings
from collections.abc import Container

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

_BATCH_STATISTICS = (
    "normalizes all members by the statistics of the whole batch",
    "use nn.BatchNorm2d and an activation, or a norm of single samples",
)
# Known by name, so that no library is imported: package, class → what it does in a stacked pass, what to do about it.
_MIXING: dict[tuple[str, str], tuple[str, str]] = {
    ("torchvision", "StochasticDepth"): ("drops all members' samples together", 'use mode="row"'),
    ("timm", "DropBlock2d"): ("drops the same blocks of all members' samples", "use batchwise=False"),
    ("timm", "VOLO"): ("mixes tokens of one member's samples into another's", "set its mix_token to False"),
    **{("timm", f"EvoNorm2dB{i}"): _BATCH_STATISTICS for i in range(3)},
    ("timm", "InplaceAbn"): _BATCH_STATISTICS,
    **{("inplace_abn", name): _BATCH_STATISTICS for name in ("ABN", "InPlaceABN", "InPlaceABNSync")},
    **{
        ("torch", name): ("divides gradients by counts in all members' samples", "use scale_grad_by_freq=False")
        for name in ("Embedding", "EmbeddingBag")
    },
}


def _mixes(name: str, module: nn.Module) -> bool:
    """Whether a module of the table is set to do what the table says.

    (A DropBlock that draws blocks for each sample only shares its scale, which depends on no data.)
    """
    if name == "StochasticDepth":
        return module.mode == "batch" and module.p > 0
    if name == "DropBlock2d":
        return bool(getattr(module, "batchwise", False) and module.drop_prob)
    if name in ("Embedding", "EmbeddingBag"):
        return module.scale_grad_by_freq
    return name != "VOLO" or module.mix_token


def check_not_mixing(model: nn.Module, targets: Container[nn.Module]) -> None:
    """Raise if a module mixes samples, unless it is a target; warn of running statistics in one that is not known.

    Raises:
        NotImplementedError: the message names the module and what to do.
    """
    unknown = []
    for path, module in model.named_modules():
        classes = [(cls.__module__.partition(".")[0], cls.__name__) for cls in type(module).__mro__]
        at = f"{path or 'the model'} ({type(module).__module__}.{type(module).__qualname__})"
        known = next((key for key in classes if key in _MIXING and _mixes(key[1], module)), None)
        if known is not None and module not in targets:
            effect, remedy = _MIXING[known]
            raise NotImplementedError(f"expand: {at} {effect}; {remedy}")
        statistics = [getattr(module, name, None) for name in ("running_mean", "running_var")]
        frozen = any("Frozen" in name for _, name in classes)
        if any(buffer is not None for buffer in statistics) and not isinstance(module, _BatchNorm) and not frozen:
            unknown.append(at)
    if unknown:
        others = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        warnings.warn(
            f"expand: {unknown[0]}{others} with running statistics, but no batch norm of torch.nn: stays as it is; if "
            "it normalizes by the statistics of the batch, members mix",
            stacklevel=3,
        )
