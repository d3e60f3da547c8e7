"""A rank's own members of an expanded model: cut out of all K, and gathered again.

Shapes: K members in all, k of them here (first … first + k − 1); a replicated tensor is [K, …] or [k, …].
"""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..nn.member_module import MemberModule
from ..nn.routing import Routed, routings_of
from ..ops.ensemble_batch_norm_synchronized import gather_ranks
from .optimizers import member_parameters


def member_tensor_names(model: nn.Module) -> set[str]:
    """Return the names, in the model's state dict, of the tensors whose dim 0 is the members."""
    return {
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules()
        if isinstance(module, MemberModule)
        for name in (*module.replicated_parameters(), *module._buffers)
        if name in module.state_dict(keep_vars=True)
    }


def _optimizer_tensors(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> Iterator[tuple[dict, str]]:
    """Yield (state, key) of every tensor [K, …] that an optimizer keeps for a replicated parameter."""
    replicated = set(member_parameters(model))
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for key, value in state.items() if parameter in replicated else ():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    yield state, key


def member_tensors(model: nn.Module) -> list[Tensor]:
    """Return all that has a dimension of members: the replicated parameters and the buffers beside them, each once."""
    found = {id(p): p for p in member_parameters(model)}
    for module in model.modules():
        if isinstance(module, MemberModule):
            found.update({id(buffer): buffer for buffer in module._buffers.values() if buffer is not None})
    return list(found.values())


def set_members(model: nn.Module, first: int, num_members: int, total: int) -> None:
    """Say which of all members the tensors hold."""
    for routing in routings_of("Distributed", model):
        routing.first_member, routing.num_members, routing.total_members = first, num_members, total
    for module in model.modules():
        if isinstance(module, Routed):
            module.num_members = num_members
        if isinstance(module, MemberModule):
            module._mark()


@torch.no_grad()
def keep_members(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer], own: range) -> None:
    """Reduce an expanded model of all K members, and its optimizers' state, to some of them, in place.

    Parameter and buffer objects stay. Gradients of replicated parameters are dropped.
    """
    total = routings_of("Distributed", model)[0].num_members
    rows = slice(own.start, own.stop)
    states = [(state, key, state[key][rows].clone()) for state, key in _optimizer_tensors(model, optimizers)]
    for tensor in member_tensors(model):
        tensor.grad = None
        tensor.data = tensor.data[rows].clone()
    for state, key, value in states:
        state[key] = value
    set_members(model, own.start, len(own), total)


@torch.no_grad()
def gather_members(model: nn.Module, group: "dist.ProcessGroup") -> None:
    """Give every rank of group all K members of the model, in place; gradients of replicated parameters are dropped."""
    routing = routings_of("Distributed", model)[0]
    tensors = member_tensors(model)
    for tensor, whole in zip(tensors, all_gathered(tensors, group)):
        tensor.grad = None
        tensor.data = whole
    set_members(model, 0, routing.total_members, routing.total_members)


def all_gathered(tensors: list[Tensor], group: "dist.ProcessGroup") -> list[Tensor]:
    """Return tensors [k, …] of every rank of group joined along dim 0 in the order of ranks, [R·k, …]."""
    ranks = dist.get_world_size(group)
    joined: list[Tensor] = list(tensors)
    alike: dict[tuple, list[int]] = {}
    for place, tensor in enumerate(tensors):
        alike.setdefault((tensor.dtype, tensor.device), []).append(place)
    for places in alike.values():
        flat = torch.cat([tensors[place].detach().reshape(-1) for place in places])
        gathered = gather_ranks(flat, ranks, group)
        for place, part in zip(places, gathered.split([tensors[place].numel() for place in places], dim=1)):
            joined[place] = part.reshape(-1, *tensors[place].shape[1:])
    return joined
