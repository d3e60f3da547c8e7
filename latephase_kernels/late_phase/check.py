"""Whether the members of an expanded model are independent: each answers beside the others as it does alone."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..nn.member_module import MemberModule
from ..nn.routing import Routed, routings_of
from ..reference.precision import wide, widest_dtype
from .convert import collapse
from .kept_state import buffers_kept, random_numbers_kept
from .members import members

_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3}  # of the largest value


def check_members(model: nn.Module, *args: Any, dim: int = 0, **kwargs: Any) -> None:
    """Raise if something in an expanded model's forward mixes its members, or gives one the samples of another.

    A copy of the model with all parameters moved a little runs in float64 and in train mode without dropout, on the
    stacked batch and then member by member; on the CPU where a device has no float64; in float32, and then less
    sharply, where float64 fails. Worth a call once for every model, before it is trained; the model, its buffers and
    random numbers stay.

    Args:
        model: expanded; not yet wrapped or compiled.
        args, kwargs: the model's arguments: a small stacked batch [K·B, …], member-major, of samples that differ.
            Floating tensors take the copy's type. What has as many entries in `dim` as the answer has samples, or a
            multiple of that (masks of attention heads), is divided among the members; all else is given to each.
        dim: of the samples in what comes in and goes out; 1 for sequences [T, K·B, …].

    Raises:
        RuntimeError: model is not expanded; a member's answers differ (the message names the first module where they
            do); the model answers the same batch differently each time, with nothing finite, or with no tensor that
            has the samples; it fails in float64 and float32, or on a member's samples alone (the message names the
            module that fails); it cannot be copied; collapse would change a weight that others than its layer read.
        ValueError: no argument has samples for every member in `dim`.
    """
    num_members = routings_of("check_members", model)[0].num_members
    sizes = [x.size(dim) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim() > dim]
    candidates = sorted({size for size in sizes if size and size % num_members == 0}, reverse=True)
    if not candidates:
        raise ValueError(
            f"check_members: the model's arguments must have the samples of {num_members} members in dim {dim}, got "
            f"tensors of {sizes} there"
        )
    with torch.no_grad(), random_numbers_kept(model):
        dtype, device = torch.float64, _device_for_float64(model)
        copied = _prepared(model, dtype, device)
        inside: list[str] = []  # the modules that run, the innermost last

        def answer(which: str | int) -> Any:
            """Call the copy with its own arguments: all samples, or those of a member."""

            def own(x: Any) -> Any:
                if not isinstance(x, Tensor):
                    return x
                x = x.to(device or x.device, dtype if x.is_floating_point() else x.dtype)
                if isinstance(which, str) or x.dim() <= dim or x.size(dim) == 0 or x.size(dim) % samples:
                    return x.clone()
                rows = x.size(dim) // num_members
                return x.narrow(dim, which * rows, rows).clone()

            return copied(*tree_map(own, args), **tree_map(own, kwargs))

        def run(which: str | int) -> tuple[list, list]:
            with members(copied, which), buffers_kept(copied):
                return _recorded(copied, functools.partial(answer, which), inside)

        try:
            together, calls = run("stacked")
        except (RuntimeError, ValueError) as error:
            hint = " (is another type written into its code?)" if isinstance(error, RuntimeError) else ""
            where = f" at {inside[-1]}" if inside else ""
            dtype, device = torch.float32, None
            copied = _prepared(model, dtype, device)
            try:
                together, calls = run("stacked")
            except (RuntimeError, ValueError):
                raise RuntimeError(
                    f"check_members: the model fails on this batch in float64{where}{hint}: {error}"
                ) from error
        agree = functools.partial(_agree, tolerance=_TOLERANCES[dtype])
        if not all(agree(a, b) for a, b in zip(together, run("stacked")[0], strict=True)):
            raise RuntimeError(
                "check_members: the model answers the same batch differently each time (a function's dropout, or other "
                "noise?); switch that off for this call, or check the parts of the model before and behind it"
            )
        samples = next((size for size in candidates if _answers(together, size, dim)), candidates[0])
        _check_answers(together, samples, dim)
        for member in range(num_members):
            try:
                alone, alone_calls = run(member)
            except (RuntimeError, ValueError, IndexError) as error:
                raise RuntimeError(
                    f"check_members: the model fails on the samples of member {member} alone, at "
                    f"{inside[-1] if inside else 'its own code'}: {error}; what has not {samples} samples in dim {dim} "
                    "was given whole. Where samples refer to each other, as in graphs, let the members take turns: "
                    "lp.members(model, k)"
                ) from error
            if all(_agrees(agree, a, b, member, num_members, dim) for a, b in zip(together, alone, strict=True)):
                continue
            parted = (
                f"{name} ({kind})"
                for (name, kind, a), (_, _, b) in zip(calls, alone_calls)
                if not _agrees(agree, a, b, member, num_members, dim)
            )
            raise RuntimeError(
                f"check_members: member {member} answers differently beside the others and alone, first at "
                f"{next(parted, 'the output')}; before or in it something mixes the samples of a batch, or dim {dim} "
                "is not the batch in order"
            )
        if any(isinstance(module, MemberModule) and module.shared_names for module in copied.modules()):
            _check_collapse(copied, functools.partial(answer, "average"), agree)


def _check_collapse(model: nn.Module, answer: Callable[[], Any], agree: Callable) -> None:
    """Raise if a model with gains answers otherwise after collapse, which multiplies weights by them; changes it."""
    routing = routings_of("check_members", model)[0]
    if isinstance(model, Routed) or routing.num_members != routing.total_members:
        return
    model.eval()
    try:
        with members(model, "average"), buffers_kept(model):
            average = tree_leaves(answer())
    except (RuntimeError, ValueError):  # it takes something else in eval mode
        return
    with buffers_kept(collapse(model)):
        collapsed = tree_leaves(answer())
    if not all(agree(a, b) for a, b in zip(average, collapsed)):
        raise RuntimeError(
            "check_members: collapsed, the model answers otherwise than as the average of its members: something reads "
            "the weight of a layer with rank-1 gains without calling the layer; choose other targets"
        )


_NOISY = ("Drop", "StochasticDepth", "RReLU")  # in the names of classes whose training flag switches noise alone


def _device_for_float64(model: nn.Module) -> torch.device | None:
    """Return where all of a model can be float64, None for where it is."""
    tensors = (*model.parameters(), *model.buffers())
    there = all(widest_dtype(tensor.device) == torch.float64 for tensor in tensors)
    return None if there else torch.device("cpu")


def _prepared(model: nn.Module, dtype: torch.dtype, device: torch.device | None) -> nn.Module:
    """Return a copy in this type and train mode, without noise, whose members and branches all tell.

    device: of the copy; None: where the model is.
    """
    try:
        copied = copy.deepcopy(model)
    except RuntimeError as error:  # torch.nn.utils.weight_norm and spectral_norm keep a weight of the last pass
        raise RuntimeError(
            f"check_members: the model cannot be copied: {error}; call it once under torch.no_grad() before"
        ) from error
    copied = copied if device is None else copied.to(device)
    copied = copied.double() if dtype == torch.float64 else copied.float()
    if not copied.training:
        copied.train()
    for module in copied.modules():
        noisy = any(word in type(module).__name__ for word in _NOISY)
        if noisy or isinstance(module, (nn.RNNBase, nn.MultiheadAttention)):
            module.eval()
    for parameter in copied.parameters():  # members may be equal yet, and a branch's last weight zero
        if parameter.is_floating_point():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return copied


def _answers(answers: list, samples: int, dim: int) -> list[Tensor]:
    """Return those with so many samples in `dim`, or in front, each once or several times."""
    tensors = [x for x in answers if isinstance(x, Tensor) and x.dim()]
    return [x for x in tensors if any(n and n % samples == 0 for n in (x.size(min(dim, x.dim() - 1)), x.size(0)))]


def _check_answers(answers: list, samples: int, dim: int) -> None:
    compared = _answers(answers, samples, dim)
    if not compared:
        raise RuntimeError(
            f"check_members: the model's answer must hold a tensor with the {samples} samples in dim {dim}, got "
            f"{[list(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in answers]}; give it the part of "
            "the model before its loss; where several rows are one sample (graphs), let the members take turns: "
            "lp.members(model, k)"
        )
    if not any(torch.isfinite(x).any() for x in compared):
        raise RuntimeError("check_members: the model's answer has no finite value")


def _recorded(model: nn.Module, run: Callable[[], Any], inside: list[str]) -> tuple[list, list[tuple[str, str, Any]]]:
    """Return the leaves of the model's answer and what its modules put out meanwhile: (name, type, first leaf).

    `inside` holds the names of the modules that run meanwhile, also when one has failed.
    """
    calls: list[tuple[str, str, Any]] = []
    inside.clear()

    def enter(name: str, module: nn.Module, args: tuple) -> None:
        inside.append(f"{name} ({type(module).__name__})")

    def leave(name: str, module: nn.Module, args: tuple, output: Any) -> None:
        inside.pop()
        calls.append((name, type(module).__name__, next(iter(tree_leaves(output)), None)))

    hooks = []
    for name, module in model.named_modules():
        if name:
            hooks.append(module.register_forward_pre_hook(functools.partial(enter, name)))
            hooks.append(module.register_forward_hook(functools.partial(leave, name)))
    try:
        return tree_leaves(run()), calls
    finally:
        for hook in hooks:
            hook.remove()


def _agrees(agree: Callable, together: Any, alone: Any, member: int, num_members: int, dim: int) -> bool:
    """Whether a member's rows of what all put out are what it puts out alone, as far as the shapes tell."""
    if not isinstance(together, Tensor) or not isinstance(alone, Tensor) or together.dim() != alone.dim():
        return True
    for d in dict.fromkeys((dim, *range(alone.dim()))):  # a module inside, or one of several answers, may have another
        if d < alone.dim() and alone.size(d) and together.size(d) == num_members * alone.size(d):
            return agree(together.narrow(d, member * alone.size(d), alone.size(d)), alone)
    return together.dim() == 0 or agree(together, alone)


def _agree(a: Any, b: Any, tolerance: float) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return True
    if a.shape != b.shape:
        return False
    a, b = wide(a), wide(b)
    if not torch.equal(a.isfinite(), b.isfinite()):
        return False
    a, b = a.nan_to_num(posinf=0.0, neginf=0.0), b.nan_to_num(posinf=0.0, neginf=0.0)
    return a.numel() == 0 or bool((a - b).abs().max() <= tolerance * max(a.abs().max().item(), b.abs().max().item()))
