"""The ops as functions: every argument checked, gradients by autograd."""

from .ops.ensemble_batch_norm import ensemble_batch_norm

__all__ = ["ensemble_batch_norm"]
