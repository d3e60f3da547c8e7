"""nn.SyncBatchNorm as late-phase weights: each member's statistics are those of its rows on all ranks of a group.

Every rank of process_group must have the same members. In one process it computes what batch norm does.

Shapes: K members, B rows a member, C channels. Stacked input is [K·B, C, *] with any number of further dimensions.
"""

import torch.distributed
from torch import Tensor, nn

from ..ops.ensemble_batch_norm_synchronized import StatisticsGroup
from .batch_norm import _documented, _EnsembleBatchNorm
from .shared_batch_norm import _SharedBatchNorm


class _SyncBatchNorm:
    """What the two classes have in common; before the batch norm in the order of methods."""

    _plain = nn.SyncBatchNorm
    _check_input_dim = nn.SyncBatchNorm._check_input_dim
    process_group = None  # as in nn.SyncBatchNorm: None is the default group

    def _statistics_ranks(self) -> StatisticsGroup | None:
        if self.statistics_group is not None:
            return self.statistics_group
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        return StatisticsGroup(self.process_group) if several else None

    def forward(self, input: Tensor, *arguments, **options) -> Tensor:
        """Return the normalized input, as the batch norm without "Sync" does."""
        if input.dim() <= 5:
            return super().forward(input, *arguments, **options)
        flat = [argument.flatten(4) if isinstance(argument, Tensor) else argument for argument in arguments]
        options = {key: value.flatten(4) if isinstance(value, Tensor) else value for key, value in options.items()}
        return super().forward(input.flatten(4), *flat, **options).unflatten(4, input.shape[4:])


class EnsembleSyncBatchNorm(_SyncBatchNorm, _EnsembleBatchNorm):
    __doc__ = _documented(" over [K·B, C, *]")

    def collapse(self, mode: str = "exact") -> nn.SyncBatchNorm:
        """Return the one nn.SyncBatchNorm, with its process group; see the base class."""
        plain = super().collapse(mode)
        plain.process_group = self.process_group
        return plain


class SharedSyncBatchNorm(_SyncBatchNorm, _SharedBatchNorm):
    """nn.SyncBatchNorm over [K·B, C, *] with one set of weights that normalizes each member by itself.

    Made by from_module.

    Args:
        module: of from_module: the nn.SyncBatchNorm whose weights and statistics [C] it shares.
        num_members: of from_module: K.
    """
