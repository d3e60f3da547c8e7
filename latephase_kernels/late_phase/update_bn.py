"""update_bn: running statistics that belong to the weights, as after averaging over time.

Shapes: K members, N rows of an ordinary batch.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..nn.routing import routings_of
from .batches import StackedBatches, map_leaves, repeat, rows_of
from .kept_state import training_flags_kept
from .members import members


@torch.no_grad()
def update_bn(loader: Iterable, model: nn.Module, *, share: bool = False, turns: bool = False) -> None:
    """Recompute every running statistic of an expanded model as the average over a loader, in one stacked pass.

    Args:
        loader: yields input batches [N, …], or tuples and lists whose first entry is one. Where batches are dicts of a
            model's arguments by name: (batch["pixel_values"] for batch in loader).
        model: expanded; flags and momenta are the same afterwards.
        share: False: every member sees all the data (each batch is replicated K times). True: each sees 1/K of it,
            an approximation at 1/K of the cost; leftover and short batches are not used.
        turns: run the members one after the other, each on the batch as it is: for models whose members take turns
            because their rows are not equally many (graphs). The result is that of share=False.

    Raises:
        RuntimeError: model is not expanded.
        TypeError: a batch has no tensor (as a graph's), and turns is False.
        ValueError: share and turns are both True; or there was no batch (with share=True, not num_members full ones).
        Statistics are as before then.
    """
    num_members = routings_of("update_bn", model)[0].num_members
    if share and turns:
        raise ValueError("update_bn: share must be False with turns=True: every member sees every batch; leave out one")
    layers = [
        module for module in model.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]
    momenta = [layer.momentum for layer in layers]
    buffers = [buffer for layer in layers for buffer in layer._buffers.values() if buffer is not None]
    before = [(buffer, buffer.clone()) for buffer in buffers]
    device = next((buffer.device for buffer in buffers), None)
    batches = StackedBatches(loader, num_members) if share else loader
    passes = 0
    with training_flags_kept(model), members(model, "stacked"):
        try:
            model.train()
            for layer in layers:
                layer.reset_running_stats()
                layer.momentum = None
            for batch in batches:
                x = batch[0] if isinstance(batch, (list, tuple)) else batch
                x = map_leaves(lambda t: t.to(device) if isinstance(t, Tensor) else t, x)
                if turns:
                    for k in range(num_members):
                        with members(model, k):
                            model(x)
                else:
                    rows_of(x, "update_bn")  # of what holds no tensor no member would get a copy
                    model(x if share else repeat(x, num_members))
                passes += 1
            if not passes:
                needed = f"{num_members} batches of equal size" if share else "one batch"
                raise ValueError(f"update_bn: loader must yield at least {needed}")
        except BaseException:
            for buffer, value in before:
                buffer.copy_(value)
            raise
        finally:
            for layer, momentum in zip(layers, momenta):
                layer.momentum = momentum
