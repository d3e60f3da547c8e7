"""An expanded model's members as it runs: which ones, their loss, transforms of each one's rows.

Shapes: K members, B rows a member.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..nn.routing import Model, routings_of
from ..ops.checks import check_num_members
from .batches import concatenate, map_leaves


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


def random_numbers_kept(model: nn.Module) -> contextlib.AbstractContextManager:
    """A context behind which the random number generators of the CPU and of model's devices are as before."""
    devices = {tensor.device.index for tensor in model.parameters() if tensor.device.type == "cuda"}
    return torch.random.fork_rng(sorted(devices))


@contextlib.contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)


@contextlib.contextmanager
def training_flags_kept(model: nn.Module) -> Iterator[None]:
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def repeat(batch: Any, num_members: int) -> Any:
    """Return the stacked batch in which every member gets the same samples."""
    return map_leaves(lambda x: torch.cat([x] * num_members) if isinstance(x, Tensor) and x.dim() else x, batch)


def member_loss(loss_fn: Callable[[Any, Any], Tensor], output: Any, target: Any, *, num_members: int) -> Tensor:
    """Return Σ_k mean_b loss_fn(output_k, target_k)_b: the sum over members of their means.

    Args:
        loss_fn: (output [B, …], target [B, …]) -> the mean over the batch, or the losses to average, as those of
            reduction="none"; called once a member. What else it returns as one number, such as a sum, is added up.
        output, target: [K·B, …] member-major, or tuples, lists and dicts of such tensors.
        num_members: K, or the number of members of a chunk.

    Returns:
        The sum, one number.

    Raises:
        ValueError: a tensor's first dimension is not divisible by num_members.
    """
    check_num_members("member_loss", num_members)
    outputs, targets = (
        _chunks("member_loss", "output", output, num_members),
        _chunks("member_loss", "target", target, num_members),
    )
    losses = [loss_fn(*parts) for parts in zip(outputs, targets)]
    total, *others = [loss.mean() if loss.dim() else loss for loss in losses]
    for loss in others:
        total = total + loss
    return total


def map_members(transform: Callable, *batch: Any, num_members: int) -> Any:
    """Apply what mixes the samples of a batch (mixup, CutMix) to each member's samples by themselves.

    Args:
        transform: called once a member with its parts of batch, [B, …] each; returns a tensor or structure of tensors.
        batch: stacked tensors [K·B, …], or tuples, lists and dicts of them.
        num_members: K.

    Returns:
        What transform returns, stacked again.

    Raises:
        ValueError: a tensor's first dimension is not divisible by num_members.
    """
    check_num_members("map_members", num_members)
    return concatenate([transform(*parts) for parts in _chunks("map_members", "batch", batch, num_members)])


def _chunks(where: str, name: str, stacked: Any, num_members: int) -> list:
    """Return the members' parts of every tensor in stacked, as num_members structures."""
    leaves, spec = tree_flatten(stacked)
    columns = []
    for leaf in leaves:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0:
            columns.append([leaf] * num_members)
            continue
        if leaf.size(0) % num_members:
            raise ValueError(
                f"{where}: {name}.size(0)={leaf.size(0)} is not divisible by num_members={num_members}; "
                f"stack {num_members} equal minibatches along dim 0"
            )
        columns.append(leaf.unflatten(0, (num_members, leaf.size(0) // num_members)).unbind(0))
    return [tree_unflatten([column[k] for column in columns], spec) for k in range(num_members)]
