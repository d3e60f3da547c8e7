"""Modules whose parameters, [K, …], and statistics exist once for every member."""

from .batch_norm import EnsembleBatchNorm1d, EnsembleBatchNorm2d, EnsembleBatchNorm3d
from .linear import MemberLinear
from .shared_batch_norm import SharedBatchNorm1d, SharedBatchNorm2d, SharedBatchNorm3d

__all__ = [
    "EnsembleBatchNorm1d",
    "EnsembleBatchNorm2d",
    "EnsembleBatchNorm3d",
    "MemberLinear",
    "SharedBatchNorm1d",
    "SharedBatchNorm2d",
    "SharedBatchNorm3d",
]
