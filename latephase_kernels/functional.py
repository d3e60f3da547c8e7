"""The ops as functions: every argument checked, gradients by autograd."""

from .ops.ensemble_batch_norm import ensemble_batch_norm
from .ops.member_gain import member_gain
from .ops.rank1_linear import rank1_linear
from .ops.rank1_lstm import rank1_lstm

__all__ = ["ensemble_batch_norm", "member_gain", "rank1_linear", "rank1_lstm"]
