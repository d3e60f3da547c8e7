"""An expanded model's members as it runs: which ones, their loss, transforms of each one's rows.

Shapes: K members, B rows a member.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..nn.routing import Model, routings_of
from ..ops.checks import check_num_members
from .batches import concatenate, find_rows, one_a_sample


@contextlib.contextmanager
def members(model: Model, which: str | int | range) -> Iterator[Model]:
    """Inside the with block, run an expanded model as these members, whatever its training flag.

    Args:
        model: expanded; a wrapper around it is fine.
        which: "stacked" (batches [K·B, …]), "average" (ordinary batches), one member, or a range of n members
            (batches [n·B, …]: a chunk of the stacked batch).

    Raises:
        RuntimeError: model is not expanded, or another thread is in such a block.
        TypeError, ValueError: which is none of these.
    """
    routings = routings_of("members", model)
    chosen = [(routing, routing.choice(which)) for routing in routings]
    with contextlib.ExitStack() as blocks:
        for routing, choice in chosen:
            blocks.callback(routing.leave, routing.enter(choice))
        yield model


def member_loss(loss_fn: Callable[[Any, Any], Tensor], output: Any, target: Any, *, num_members: int) -> Tensor:
    """Return Σ_k mean_b loss_fn(output_k, target_k)_b: the sum over members of their means.

    Args:
        loss_fn: (output [B, …], target [B, …]) -> the mean over the batch, or the losses to average, as those of
            reduction="none"; called once a member, so it may compare the samples with each other. What else it returns
            as one number, such as a sum, is added up.
        output, target: [K·B, …] member-major, or tuples, lists and dicts of such tensors, or lists of K·B samples.
            What is none of these (None, a number) goes to every member.
        num_members: K, or the number of members of a chunk.

    Returns:
        The sum, one number.

    Raises:
        TypeError: loss_fn returns no tensor.
        ValueError: a tensor's first dimension is not divisible by num_members.
    """
    check_num_members("member_loss", num_members)
    rows = find_rows((output, target))
    outputs, targets = (
        _chunks("member_loss", "output", output, num_members, rows),
        _chunks("member_loss", "target", target, num_members, rows),
    )
    losses = [loss_fn(*parts) for parts in zip(outputs, targets)]
    if not isinstance(losses[0], Tensor):
        raise TypeError(
            f"member_loss: loss_fn must return a tensor, got {type(losses[0]).__name__}; of several losses, return the "
            "sum"
        )
    total, *others = [loss.mean() if loss.dim() else loss for loss in losses]
    for loss in others:
        total = total + loss
    return total


def map_members(transform: Callable, *batch: Any, num_members: int) -> Any:
    """Apply what mixes the samples of a batch (mixup, CutMix) to each member's samples by themselves.

    Args:
        transform: called once a member with its parts of batch, [B, …] each; returns a tensor or structure of tensors.
        batch: stacked tensors [K·B, …], or tuples, lists and dicts of them, or lists of K·B samples.
        num_members: K.

    Returns:
        What transform returns, stacked again.

    Raises:
        ValueError: a tensor's first dimension is not divisible by num_members.
    """
    check_num_members("map_members", num_members)
    rows = find_rows(batch)
    parts = [_chunks("map_members", "batch", part, num_members, rows) for part in batch]
    results = [transform(*(part[k] for part in parts)) for k in range(num_members)]
    return concatenate(results, find_rows(results[0]))


def _chunks(where: str, name: str, stacked: Any, num_members: int, rows: int | None) -> list:
    """Return the members' parts of every tensor, and of every list of so many samples, as num_members structures."""
    leaves, spec = tree_flatten(stacked, is_leaf=lambda x: one_a_sample(x, rows))
    columns = []
    for leaf in leaves:
        if isinstance(leaf, Mapping):  # pytree takes it for a leaf
            rebuild: Any = type(leaf)
            columns.append([rebuild(part) for part in _chunks(where, name, dict(leaf), num_members, rows)])
            continue
        samples = isinstance(leaf, (list, tuple))
        if not samples and (not isinstance(leaf, (Tensor, np.ndarray)) or leaf.ndim == 0):
            columns.append([leaf] * num_members)
            continue
        size = len(leaf)
        if size % num_members:
            what = f"len({name})" if samples else f"{name}.size(0)"
            raise ValueError(
                f"{where}: {what}={size} is not divisible by num_members={num_members}; "
                f"stack {num_members} equal minibatches along dim 0"
            )
        if isinstance(leaf, Tensor):
            columns.append(leaf.unflatten(0, (num_members, size // num_members)).unbind(0))
        else:
            columns.append([leaf[k * size // num_members : (k + 1) * size // num_members] for k in range(num_members)])
    return [tree_unflatten([column[k] for column in columns], spec) for k in range(num_members)]
