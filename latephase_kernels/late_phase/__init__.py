"""Late-phase training of any model: expand it, run it, collapse it."""

from .batches import StackedBatches, stack_batches
from .check import check_members
from .convert import collapse, expand
from .distributed import Distributed
from .fuse import Fusion, fuse, fusions
from .gradients import clip_grad_norm_, set_base_grad_scale
from .members import map_members, member_loss, members
from .optimizers import param_groups
from .prediction import ensemble_probabilities, member_disagreement, predict, predictive_entropy
from .sequential import SequentialTrainer
from .update_bn import update_bn

__all__ = [
    "Distributed",
    "Fusion",
    "SequentialTrainer",
    "StackedBatches",
    "check_members",
    "clip_grad_norm_",
    "collapse",
    "ensemble_probabilities",
    "expand",
    "fuse",
    "fusions",
    "map_members",
    "member_disagreement",
    "member_loss",
    "members",
    "param_groups",
    "predict",
    "predictive_entropy",
    "set_base_grad_scale",
    "stack_batches",
    "update_bn",
]
