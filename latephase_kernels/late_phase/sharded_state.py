"""State of a model and its optimizers in several ranks, for torch.distributed.checkpoint.

Tensors with a dimension of members become DTensors [K, …] of which each member rank has its k rows: a checkpoint holds
every member once, and can be read by another number of ranks, or by one process.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .member_shards import member_tensor_names
from .optimizers import member_parameters

if TYPE_CHECKING:
    from .distributed import Distributed


def _sharded(distributed: "Distributed", tensor: Tensor) -> Tensor:
    """Return [k, …] as this rank's part of [K, …]."""
    if distributed.mesh is None or distributed.member_ranks == 1:
        return tensor
    from torch.distributed.tensor import DTensor, Shard  # which imports sympy

    return DTensor.from_local(tensor, distributed.mesh["member"], [Shard(0)], run_check=False)


def _own(distributed: "Distributed", tensor: Tensor) -> Tensor:
    """Return this rank's members of [K, …]."""
    from torch.distributed.tensor import DTensor

    if isinstance(tensor, DTensor):
        return tensor.to_local()
    members = distributed.members
    return tensor if members is None or len(members) == tensor.size(0) else tensor[members.start : members.stop]


def model_state(distributed: "Distributed", model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of the model, or of a copy: members sharded, each rank's own statistics as their mean."""
    means, replicated = distributed.mean_statistics(model), member_tensor_names(model)
    state = {**model.state_dict(), **means}
    return {name: _sharded(distributed, t) if name in replicated else t for name, t in state.items()}


def load_model_state(distributed: "Distributed", model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load a state dict whose tensors are sharded, or whole, into the model or a copy."""
    replicated = member_tensor_names(model)
    model.load_state_dict({name: _own(distributed, t) if name in replicated else t for name, t in state.items()})


def _of_members(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[int, torch.Size]:
    """Return the places, in optimizer's state dict, of the model's replicated parameters, with their shapes."""
    replicated = set(member_parameters(model))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {place: parameter.shape for place, parameter in enumerate(parameters) if parameter in replicated}


def optimizer_state(distributed: "Distributed", optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the optimizer's state dict, members sharded."""
    of_members, state = _of_members(distributed.model, optimizer), optimizer.state_dict()
    return {
        **state,
        "state": {
            place: {
                key: _sharded(distributed, v) if isinstance(v, Tensor) and v.shape == of_members.get(place) else v
                for key, v in values.items()
            }
            for place, values in state["state"].items()
        },
    }


def load_optimizer_state(distributed: "Distributed", optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state dict whose tensors are sharded, or whole."""
    of_members = _of_members(distributed.model, optimizer)

    def own(place: int, value: Any) -> Any:
        shape = of_members.get(place)
        has_members = isinstance(value, Tensor) and shape is not None and value.shape[1:] == shape[1:] and value.dim()
        return _own(distributed, value) if has_members else value

    optimizer.load_state_dict(
        {
            **state,
            "state": {
                place: {key: own(place, value) for key, value in values.items()}
                for place, values in state["state"].items()
            },
        }
    )
