"""timm's BatchNormAct2d and SyncBatchNormAct as late-phase weights: batch norm, then drop, then act.

    y = act(drop(batch_norm_k(x_k)))

drop and act stay the module's own children: their keys, hooks and parameters (a PReLU's, say) are base weights.
Known by name: timm is never imported.
"""

from torch import Tensor, nn

from .batch_norm import EnsembleBatchNorm2d
from .member_module import check_standard_forward, is_observed
from .shared_batch_norm import SharedBatchNorm2d
from .sync_batch_norm import EnsembleSyncBatchNorm, SharedSyncBatchNorm

_CHILDREN = ("drop", "act")


def norm_act_class(module: nn.Module) -> type | None:
    """Return timm's norm-and-activation class that module is of, or None."""
    for cls in type(module).__mro__:
        home = cls.__module__
        if cls.__name__ in ("BatchNormAct2d", "SyncBatchNormAct") and home.startswith("timm.") and "norm_act" in home:
            return cls
    return None


def _is_plain(module: nn.Module | None, cls: type) -> bool:
    """Whether module is of exactly this class, unchanged, and nobody watches its calls by hooks."""
    return type(module) is cls and not is_observed(module)


class _NormAct:
    """What the four classes have in common; before the batch norm in the order of methods."""

    @classmethod
    def _check_plain(cls, where: str, module: nn.Module) -> None:
        plain = norm_act_class(module)
        if plain is None or not isinstance(module, cls._plain):
            raise TypeError(f"{where}: module must be timm's batch norm with activation, got {type(module).__name__}")
        check_standard_forward(module, plain, _CHILDREN)

    @classmethod
    def from_module(cls, module: nn.Module, *arguments, **options) -> nn.Module:
        """Return the module for num_members members, with module's own drop and act; see the base class."""
        new = super().from_module(module, *arguments, **options)
        vars(new)["_modules"] = module._modules  # the same dict: a child that expand replaces is replaced here too
        return new

    def collapse(self, mode: str = "exact") -> nn.Module:
        """Return the one plain module, with this module's drop and act; see the base class."""
        plain = super().collapse(mode)
        vars(plain)["_modules"] = self._modules
        return plain

    def forward(self, input: Tensor) -> Tensor:
        """Return act(drop(y)) of the normalized input y, in input's shape; see the base class."""
        if self._fuses_relu():
            return super().forward(input, activation="relu")
        y = super().forward(input)
        for name in _CHILDREN:
            child = self._modules.get(name)
            if child is not None:
                y = child(y)
        return y

    def _fuses_relu(self) -> bool:
        """Whether drop does nothing and act is a ReLU: then the op applies it."""
        drop, act = (self._modules.get(name) for name in _CHILDREN)
        return _is_plain(act, nn.ReLU) and (drop is None or _is_plain(drop, nn.Identity))


class EnsembleBatchNormAct2d(_NormAct, EnsembleBatchNorm2d):
    """timm's BatchNormAct2d with statistics and weights of each member's own; made by from_module."""


class EnsembleSyncBatchNormAct(_NormAct, EnsembleSyncBatchNorm):
    """timm's SyncBatchNormAct with statistics and weights of each member's own; made by from_module."""


class SharedBatchNormAct2d(_NormAct, SharedBatchNorm2d):
    """timm's BatchNormAct2d with one set of weights that normalizes each member by itself; made by from_module."""


class SharedSyncBatchNormAct(_NormAct, SharedSyncBatchNorm):
    """timm's SyncBatchNormAct with one set of weights that normalizes each member by itself; made by from_module."""
