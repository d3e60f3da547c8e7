"""DistributedDataParallel around a model that expand or collapse has changed: it would reduce what is gone."""

import functools
import gc

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def mark_stale(model: nn.Module, by: str) -> None:
    """Let every DistributedDataParallel that holds model, at any depth, raise at its next pass in training."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    for wrapper in gc.get_objects():
        # Not isinstance, which asks the object itself: a weak reference's proxy may be dead.
        if issubclass(type(wrapper), DistributedDataParallel) and any(module is model for module in wrapper.modules()):
            wrapper.register_forward_pre_hook(functools.partial(_refuse, by=by))


def _refuse(wrapper: nn.Module, args: tuple, by: str) -> None:
    if wrapper.training and torch.is_grad_enabled():
        raise RuntimeError(
            f"{type(wrapper).__name__}: {by} has replaced parameters of the model in it after it was made, whose "
            f"gradients it does not reduce: ranks would part; make a new one after {by}"
        )
