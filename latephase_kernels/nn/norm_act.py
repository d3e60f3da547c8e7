"""timm's BatchNormAct2d and SyncBatchNormAct as late-phase weights: batch norm, then drop, then act.

    y = act(drop(batch_norm_k(x_k)))

drop and act stay the module's own children: their keys, hooks and parameters (a PReLU's, say) are base weights.
Known by name: timm is never imported.
"""

from torch import Tensor, nn

from .batch_norm import OP_ACTIVATIONS, EnsembleBatchNorm2d
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
        activation = self._fused()
        if activation is not None:
            return super().forward(input, activation=activation)
        y = super().forward(input)
        for name in _CHILDREN:
            child = self._modules.get(name)
            if child is not None:
                y = child(y)
        return y

    def _fused(self) -> str | None:
        """What the op can apply: act, where drop does nothing."""
        drop, act = (self._modules.get(name) for name in _CHILDREN)
        if any(child is not None and is_observed(child) for child in (drop, act)):
            return None
        return OP_ACTIVATIONS.get(type(act)) if drop is None or type(drop) is nn.Identity else None


class EnsembleBatchNormAct2d(_NormAct, EnsembleBatchNorm2d):
    """timm's BatchNormAct2d with statistics and weights of each member's own; made by from_module."""


class EnsembleSyncBatchNormAct(_NormAct, EnsembleSyncBatchNorm):
    """timm's SyncBatchNormAct with statistics and weights of each member's own; made by from_module."""


class SharedBatchNormAct2d(_NormAct, SharedBatchNorm2d):
    """timm's BatchNormAct2d with one set of weights that normalizes each member by itself; made by from_module."""


class SharedSyncBatchNormAct(_NormAct, SharedSyncBatchNorm):
    """timm's SyncBatchNormAct with one set of weights that normalizes each member by itself; made by from_module."""
