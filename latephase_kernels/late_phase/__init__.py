"""Late-phase training of any model: expand it, run it, collapse it."""

from .batches import StackedBatches, stack_batches
from .convert import collapse, expand
from .optimizers import param_groups, set_base_grad_scale
from .running import member_loss, members, predict, update_bn

__all__ = [
    "StackedBatches",
    "collapse",
    "expand",
    "member_loss",
    "members",
    "param_groups",
    "predict",
    "set_base_grad_scale",
    "stack_batches",
    "update_bn",
]
