"""Late-phase weights for PyTorch: ensemble batch norm kernels and the training tools around them."""

from . import functional, nn
from .backend import backend_for, set_backend
from .late_phase import (
    collapse,
    expand,
    member_loss,
    members,
    param_groups,
    predict,
    set_base_grad_scale,
    stack_batches,
    update_bn,
)

__version__ = "0.1.0"
__all__ = [
    "backend_for",
    "collapse",
    "expand",
    "functional",
    "member_loss",
    "members",
    "nn",
    "param_groups",
    "predict",
    "set_backend",
    "set_base_grad_scale",
    "stack_batches",
    "update_bn",
]
