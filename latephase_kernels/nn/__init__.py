"""Modules whose parameters, [K, …], and statistics exist once for every member."""

from .batch_norm import EnsembleBatchNorm1d, EnsembleBatchNorm2d, EnsembleBatchNorm3d
from .hypernetwork import HyperConv2d, HyperLinear, MemberHyperConv2d, MemberHyperLinear, TemplateBank
from .linear import MemberLinear
from .memberwise import Memberwise
from .norm_act import EnsembleBatchNormAct2d, EnsembleSyncBatchNormAct, SharedBatchNormAct2d, SharedSyncBatchNormAct
from .norms import EnsembleGroupNorm, EnsembleLayerNorm, EnsembleLayerNorm2d, EnsembleRMSNorm
from .rank1 import Rank1Conv1d, Rank1Conv2d, Rank1Conv3d, Rank1Linear
from .rank1_lstm import Rank1LSTM
from .shared_batch_norm import SharedBatchNorm1d, SharedBatchNorm2d, SharedBatchNorm3d
from .sync_batch_norm import EnsembleSyncBatchNorm, SharedSyncBatchNorm

__all__ = [
    "EnsembleBatchNorm1d",
    "EnsembleBatchNorm2d",
    "EnsembleBatchNorm3d",
    "EnsembleBatchNormAct2d",
    "EnsembleGroupNorm",
    "EnsembleLayerNorm",
    "EnsembleLayerNorm2d",
    "EnsembleRMSNorm",
    "EnsembleSyncBatchNorm",
    "EnsembleSyncBatchNormAct",
    "HyperConv2d",
    "HyperLinear",
    "MemberHyperConv2d",
    "MemberHyperLinear",
    "MemberLinear",
    "Memberwise",
    "Rank1Conv1d",
    "Rank1Conv2d",
    "Rank1Conv3d",
    "Rank1LSTM",
    "Rank1Linear",
    "SharedBatchNorm1d",
    "SharedBatchNorm2d",
    "SharedBatchNorm3d",
    "SharedBatchNormAct2d",
    "SharedSyncBatchNorm",
    "SharedSyncBatchNormAct",
    "TemplateBank",
]
