"""Late-phase weights for PyTorch: ensemble batch norm kernels and the training tools around them."""

from . import functional, nn
from .backend import backend_for, set_backend
from .late_phase import (
    Distributed,
    SequentialTrainer,
    check_members,
    clip_grad_norm_,
    collapse,
    ensemble_probabilities,
    expand,
    fuse,
    fusions,
    map_members,
    member_disagreement,
    member_loss,
    members,
    param_groups,
    predict,
    predictive_entropy,
    set_base_grad_scale,
    stack_batches,
    update_bn,
)

__version__ = "0.1.0"
__all__ = [
    "Distributed",
    "SequentialTrainer",
    "backend_for",
    "check_members",
    "clip_grad_norm_",
    "collapse",
    "ensemble_probabilities",
    "expand",
    "functional",
    "fuse",
    "fusions",
    "map_members",
    "member_disagreement",
    "member_loss",
    "members",
    "nn",
    "param_groups",
    "predict",
    "predictive_entropy",
    "set_backend",
    "set_base_grad_scale",
    "stack_batches",
    "update_bn",
]
