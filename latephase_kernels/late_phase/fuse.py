"""fuse: in an expanded model, BN → activation and BN → add → ReLU as one op each; the model's code stays.

The output gain of a rank-1 layer directly before a batch norm becomes part of the norm's statistics, the input gain of
one directly behind it, or behind its ReLU, a factor of its output.
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..nn.routing import Model, Routed
from .fuse_block import FusedForward, analyze, find_blocks, fuse_block, unfuse_block
from .fuse_graph import ACTIVATED, ADD_RELU, GAIN, TO_GAIN
from .kept_state import buffers_kept, random_numbers_kept
from .targets import check_not_wrapped

_log = logging.getLogger("latephase_kernels")


@dataclass(frozen=True)
class Fusion:
    """What became of one call of a batch norm; see fusions.

    Attributes:
        norm: the batch norm's name in the model.
        pattern: "BN → ReLU", "BN → ReLU6", "BN → SiLU", "BN → Hardswish" or "BN → add → ReLU", after "gain → " where
            the norm takes over a rank-1 layer's output gain, the first before " → gain" where it takes over one's input
            gain; "gain → BN", "BN → gain" or both where it does that alone; "" where nothing was found.
        module: the name of the block whose forward calls it.
        fused: whether it runs as one op.
        reason: why not, or which calls of the block are left out.
    """

    norm: str
    pattern: str
    module: str
    fused: bool
    reason: str


def fuse(model: Model, example: Any = None) -> Model:
    """Run BN → activation and BN → add → ReLU of an expanded model as one op each, in place, with rank-1 gains beside.

    Activations are ReLU, ReLU6, SiLU and Hardswish. Keys, parameters, hooks and the model's code stay; the values are
    equal to rounding. What cannot be proved to mean the same is left as it is, and `fusions` says why. A block that is
    changed afterwards (a child replaced, a hook on a fused module, an attribute that its forward reads) runs its
    original forward; fuse again to fuse it anew. `collapse` undoes it. Copies and pickles are fused as well. No other
    thread should run a model meanwhile.

    Args:
        model: expanded; it is changed.
        example: a batch in the form that the model takes now (stacked in train mode). If given, the model runs on it
            before and after, without a lasting effect, and everything is undone if the answers differ.

    Returns:
        model.

    Raises:
        TypeError: model is wrapped (DataParallel, DistributedDataParallel, compiled) or no module.
        RuntimeError: model is not expanded, or the answers to example differ.
    """
    check_not_wrapped("fuse", model)
    _check_expanded("fuse", model)
    before = None if example is None else _answer(model, example)
    changed = [block for _, block in find_blocks(model) if fuse_block(block)]
    if example is not None:
        difference = _difference(before, _answer(model, example))
        if difference is not None:
            for block in changed:
                unfuse_block(block)
            raise RuntimeError(f"fuse: the fused model answers differently to example: {difference}; it is as before")
    found = fusions(model)
    fused = [fusion.pattern.removeprefix(GAIN).removesuffix(TO_GAIN) for fusion in found if fusion.fused]
    counts = {name: fused.count(name) for name in (*ACTIVATED.values(), ADD_RELU)}
    listed = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    _log.info(
        "fuse: %d of %d batch norm calls fused%s; fusions(model) says why others are not",
        *(len(fused), len(found), listed and f" ({listed})"),
    )
    return model


def fusions(model: nn.Module) -> list[Fusion]:
    """Return what fuse has done in an expanded model, or would find: an entry for each call of a batch norm.

    Raises:
        TypeError: model is wrapped or no module.
        RuntimeError: model is not expanded.
    """
    check_not_wrapped("fusions", model)
    _check_expanded("fusions", model)
    found = []
    for name, block in find_blocks(model):
        if isinstance(block, FusedForward):
            graphs = block._fused_graphs
            missing = "" if graphs.hold() else "its block has changed"
        else:
            graphs, missing = analyze(block), "it has not been asked for"
        prefix = f"{name}." if name else ""
        for norm, pattern, reason in graphs.sites:
            why = f"{missing}; call fuse" if pattern and missing else reason
            found.append(Fusion(prefix + norm, pattern, name, bool(pattern) and not missing, why))
    return found


def unfuse(model: nn.Module) -> None:
    """Give every fused block of model its own class and forward back."""
    for module in model.modules():
        if isinstance(module, FusedForward):
            unfuse_block(module)


def _check_expanded(where: str, model: nn.Module) -> None:
    if not any(isinstance(module, Routed) for module in model.modules()):
        raise RuntimeError(f"{where}: model is not expanded; call expand first")


# ---------------------------------------------------------------------------------------------- the example


def _answer(model: nn.Module, example: Any) -> list:
    """Return the leaves of model's answer to a copy of example; buffers and random numbers are as before afterwards."""
    with torch.no_grad(), random_numbers_kept(model), buffers_kept(model):
        return tree_leaves(model(tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, example)))


def _difference(before: list, after: list) -> str | None:
    """Say how far the answers are apart, or None if that is rounding: √eps of the type, of the largest value."""
    if len(before) != len(after):
        return f"{len(after)} values in place of {len(before)}"
    for old, new in zip(before, after):
        if not isinstance(old, Tensor):
            continue
        if not isinstance(new, Tensor) or (old.shape, old.dtype) != (new.shape, new.dtype):
            return "a tensor of another shape or type"
        if not old.is_floating_point():
            continue
        largest = (old - new).abs().max().item() if old.numel() else 0.0
        allowed = torch.finfo(old.dtype).eps ** 0.5 * old.abs().max().item() if old.numel() else 0.0
        if not (largest <= allowed or torch.equal(old.nan_to_num(), new.nan_to_num())):
            return f"the largest difference is {largest:.3g}, rounding explains {allowed:.3g}"
    return None
