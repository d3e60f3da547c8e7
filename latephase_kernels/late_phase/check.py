"""Whether the members of an expanded model are independent: each answers beside the others as it does alone."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..nn.routing import routings_of
from .running import members

_TOLERANCE = 1e-6  # of the largest value, in float64


def check_members(model: nn.Module, *args: Any, dim: int = 0, **kwargs: Any) -> None:
    """Raise if something in an expanded model's forward mixes its members, or gives one the samples of another.

    A copy of the model runs in float64 and in train mode without dropout, on the stacked batch and then member by
    member. Worth a call once for every model, before it is trained; the model, its buffers and random numbers stay.

    Args:
        model: expanded; not yet wrapped or compiled.
        args, kwargs: the model's arguments: a small stacked batch [K·B, …], member-major; floating tensors become
            float64, and what is no tensor, or a tensor without the K·B samples in `dim`, is given to all alike.
        dim: of the samples in what comes in and goes out; 1 for sequences [T, K·B, …].

    Raises:
        RuntimeError: model is not expanded; a member's answers differ (the message names the first module where they
            do); or the model answers the same batch differently each time.
        ValueError: no argument has samples for every member in `dim`.
    """
    num_members = routings_of("check_members", model)[0].num_members
    copied = copy.deepcopy(model).double()
    if not copied.training:
        copied.train()
    for module in copied.modules():
        if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)) or "Drop" in type(module).__name__:
            module.eval()  # what their flag says is dropout alone
    args, kwargs = tree_map(_to_double, (args, kwargs))
    sizes = [x.size(dim) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim() > dim]
    samples = next((size for size in sizes if size and size % num_members == 0), 0)
    if samples == 0:
        raise ValueError(
            f"check_members: the model's arguments must have the samples of {num_members} members in dim {dim}, got "
            f"tensors of {sizes} there"
        )
    rows = samples // num_members

    def run(which: str | int) -> tuple[list, list]:
        def of_members(x: Any) -> Any:
            if not isinstance(x, Tensor) or x.dim() <= dim or x.size(dim) != samples:
                return x
            return x.clone() if isinstance(which, str) else x.narrow(dim, which * rows, rows).clone()

        with members(copied, which):
            return _recorded(copied, lambda: copied(*tree_map(of_members, args), **tree_map(of_members, kwargs)))

    devices = {tensor.device.index for tensor in model.parameters() if tensor.device.type == "cuda"}
    with torch.no_grad(), torch.random.fork_rng(sorted(devices)):
        together, again = run("stacked"), run("stacked")
        if not all(_agree(a, b) for a, b in zip(together[0], again[0], strict=True)):
            raise RuntimeError(
                "check_members: the model answers the same batch differently each time (dropout by a function?); "
                "switch that off for this call"
            )
        for member in range(num_members):
            alone = run(member)
            if all(_agrees(a, b, member, num_members, dim) for a, b in zip(together[0], alone[0], strict=True)):
                continue
            parted = (
                f"{name} ({kind})"
                for (name, kind, a), (_, _, b) in zip(together[1], alone[1])
                if not _agrees(a, b, member, num_members, dim)
            )
            raise RuntimeError(
                f"check_members: member {member} answers differently beside the others and alone, first at "
                f"{next(parted, 'the output')}; before or in it something mixes the samples of a batch, or dim {dim} "
                "is not the batch in order"
            )


def _to_double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def _recorded(model: nn.Module, run: Callable[[], Any]) -> tuple[list, list[tuple[str, str, Any]]]:
    """Return the leaves of the model's answer and what its modules put out meanwhile: (name, type, first leaf)."""
    calls: list[tuple[str, str, Any]] = []

    def record(name: str) -> Callable:
        return lambda module, _, output: calls.append(
            (name, type(module).__name__, next(iter(tree_leaves(output)), None))
        )

    hooks = [module.register_forward_hook(record(name)) for name, module in model.named_modules() if name]
    try:
        return tree_leaves(run()), calls
    finally:
        for hook in hooks:
            hook.remove()


def _agrees(together: Any, alone: Any, member: int, num_members: int, dim: int) -> bool:
    """Whether a member's rows of what all put out are what it puts out alone, as far as the shapes tell."""
    if not isinstance(together, Tensor) or not isinstance(alone, Tensor) or together.dim() != alone.dim():
        return True
    for d in dict.fromkeys((dim, 0)):
        if d < alone.dim() and alone.size(d) and together.size(d) == num_members * alone.size(d):
            return _agree(together.narrow(d, member * alone.size(d), alone.size(d)), alone)
    return together.dim() == 0 or _agree(together, alone)


def _agree(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return True
    if a.shape != b.shape:
        return False
    if a.numel() == 0:
        return True
    a, b = a.double().nan_to_num(), b.double().nan_to_num()
    return bool((a - b).abs().max() <= _TOLERANCE * max(a.abs().max().item(), b.abs().max().item()))
