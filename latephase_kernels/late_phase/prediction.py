"""Prediction with an expanded model, and what the members' spread says of its uncertainty.

Shapes: K members, N rows of an ordinary batch.
"""

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.rank1_lstm import Rank1LSTM
from ..nn.routing import routings_of
from .batches import map_leaves, repeat, rows_of
from .kept_state import training_flags_kept
from .members import members as _members  # predict's argument has the same name


@torch.no_grad()
def predict(model: nn.Module, x: Any, *args: Any, members: str | int = "average", **kwargs: Any) -> Any:
    """Return an expanded model's answer to an ordinary batch, in eval mode and without gradients.

    All of the model is in eval mode, dropout too: for MC-dropout call the model itself inside `members`.
    Several threads may call it for one model, each for members of its choice: they take turns.

    Args:
        model: expanded; its training flags are the same afterwards.
        x: [N, …], or a tuple, list or dict of such tensors: the model's first argument.
        args, kwargs: its other ones. Of these, too, tensors with N rows belong to the samples.
        members: "average" (what the collapsed model answers), "all", or one member. "all" puts K copies of the samples
            behind each other: samples that see one another (nodes of a graph, by its edges), or that a model takes in
            lists (detectors), are for one member after the other.

    Returns:
        The model's output [N, …]; for "all" each tensor in it is [K, N, …], [K, m·N, …] where it has m rows a sample.

    Raises:
        RuntimeError: model is not expanded, or other ranks have some of its members.
        TypeError, ValueError: members is none of these, or an output's dim 0 is not the batch.
        NotImplementedError: "all" with a recurrent layer whose batch is in dim 1.
    """
    routings = routings_of("predict", model)
    routing = routings[0]
    routing.check_whole("predict")
    num_members = routing.num_members
    if members != "all" and members != "average" and (isinstance(members, bool) or not isinstance(members, int)):
        raise ValueError(f'predict: members must be "average", "all" or an int, got {members!r}')
    with contextlib.ExitStack() as turn:
        for each in sorted(routings, key=id):  # in one order: no two threads wait for each other
            turn.enter_context(each.turn)
        if members == "average" and routing.override is None and not any(m.training for m in model.modules()):
            return model(x, *args, **kwargs)  # as it stands
        return _predict(model, x, args, kwargs, members, num_members)


def _predict(model: nn.Module, x: Any, args: tuple, kwargs: dict, members: str | int, num_members: int) -> Any:
    """predict in this thread's turn, arguments checked."""
    with training_flags_kept(model), _members(model, "stacked" if members == "all" else members):
        model.eval()
        if members != "all":
            return model(x, *args, **kwargs)
        rows = rows_of(x, "predict")
        args, kwargs = map_leaves(
            lambda t: repeat(t, num_members) if isinstance(t, Tensor) and t.dim() and t.size(0) == rows else t,
            (args, kwargs),
        )
        with _rows_in_front(model, num_members * rows):
            output = model(repeat(x, num_members), *args, **kwargs)
    return map_leaves(functools.partial(_by_member, num_members=num_members, rows=rows), output)


@contextlib.contextmanager
def _rows_in_front(model: nn.Module, rows: int) -> Iterator[None]:
    """Inside, raise if a recurrent layer whose batch is in dim 1 has not that many rows there."""

    def check(name: str, layer: nn.Module, inputs: tuple) -> None:
        if inputs[0].dim() == 3 and inputs[0].size(1) != rows:
            raise NotImplementedError(
                f'predict: members="all" repeats the samples in dim 0, but {name} has batch_first=False and got '
                f"{list(inputs[0].shape)}; predict with one member after the other"
            )

    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, Rank1LSTM) and not m.batch_first]
    hooks = [layer.register_forward_pre_hook(functools.partial(check, name)) for name, layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _by_member(output: Any, num_members: int, rows: int) -> Any:
    if not isinstance(output, Tensor):
        parts = output if isinstance(output, (list, tuple)) else getattr(output, "__dict__", {}).values()
        if any(isinstance(part, Tensor) for part in parts):
            raise TypeError(
                f'predict: with members="all" outputs must be tensors, or tuples, lists or dicts of them, got '
                f"{type(output).__name__}; register it with torch.utils._pytree, or return a dict"
            )
        return output
    if output.dim() == 0:
        return output
    if rows and output.size(0) % (num_members * rows):
        raise ValueError(
            f'predict: with members="all" each output must have the batch in dim 0 ({num_members} members × {rows} '
            f"rows), got shape {list(output.shape)}; return it with the batch in front, or not at all, or predict with "
            "one member after the other"
        )
    return output.unflatten(0, (num_members, -1))


def ensemble_probabilities(logits: Tensor, *, dim: int = -1) -> Tensor:
    """Return the ensemble's class probabilities: the mean over members of softmax(logits_k).

    Args:
        logits: [K, N, …], as predict(model, x, members="all") gives them; any floating type.
        dim: of the classes; not 0.

    Returns:
        [N, …], float32 or float64.

    Raises:
        TypeError, ValueError: logits or dim does not fit.

    Source: von Oswald et al., ICLR 2021, section 3 (ensembles of late-phase weights).
    """
    return _log_probabilities("ensemble_probabilities", logits, dim).exp()


def predictive_entropy(logits: Tensor, *, dim: int = -1) -> Tensor:
    """Return the entropy of the ensemble's class probabilities p, −Σ_c p_c log p_c, in nats: high where in doubt.

    Args:
        logits: [K, N, …]; for one model's [N, …], give logits.unsqueeze(0).
        dim: of the classes; not 0.

    Returns:
        [N] (logits' shape without the members and the classes), from 0 to log(number of classes).

    Raises:
        TypeError, ValueError: logits or dim does not fit.
    """
    log_p = _log_probabilities("predictive_entropy", logits, dim)
    class_dim = dim if dim < 0 else dim - 1
    return 0.0 - torch.where(log_p == -math.inf, 0.0, log_p.exp() * log_p).sum(class_dim)  # certain: 0, not −0


def member_disagreement(logits: Tensor, *, dim: int = -1) -> Tensor:
    """Return the share of pairs of members that predict different classes: 0 where all agree, at most 1.

    Args:
        logits: [K, N, …].
        dim: of the classes; not 0.

    Returns:
        [N] (logits' shape without the members and the classes); zeros for one member.

    Raises:
        TypeError, ValueError: logits or dim does not fit.
    """
    _check_logits("member_disagreement", logits, dim)
    num_members = logits.size(0)
    votes = torch.nn.functional.one_hot(logits.argmax(dim), logits.size(dim)).sum(0)  # [N, …, classes]
    agreeing = (votes * (votes - 1)).sum(-1)
    return 1.0 - agreeing / (num_members * (num_members - 1)) if num_members > 1 else agreeing.float()


def _check_logits(where: str, logits: Tensor, dim: int) -> None:
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        got = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"{where}: logits must be a floating-point tensor, got {got}")
    if logits.dim() < 2 or logits.size(0) < 1:
        raise ValueError(
            f"{where}: logits must be [K, N, …] with K >= 1, got shape {list(logits.shape)}; "
            'take predict(model, x, members="all")'
        )
    if not -logits.dim() < dim < logits.dim() or dim == 0:
        raise ValueError(f"{where}: dim must be a dimension of logits other than 0, got {dim}")


def _log_probabilities(where: str, logits: Tensor, dim: int) -> Tensor:
    """log mean_k softmax(logits_k), [N, …]."""
    _check_logits(where, logits, dim)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return torch.logsumexp(torch.log_softmax(logits.to(dtype), dim), 0) - math.log(logits.size(0))
