"""Blocks: modules whose forward calls batch norms, and the class that runs their rewritten graphs.

The class of a fused block is a subclass of its own class: isinstance, keys, names, copies and pickles are as before.
Its forward runs a graph wherever all that the trace relied on still holds, and the original forward everywhere else.
"""

import contextlib
import copy
import copyreg
import functools
import itertools
import linecache
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..nn.member_module import is_observed
from .fuse_graph import BATCH_NORMS, Chains, why_not
from .fuse_trace import Trace, trace_forward
from .fuse_watch import Absent, Silent, subclass

_source_numbers = itertools.count()


@dataclass(frozen=True)
class _Variant:
    """One rewritten graph, as a function of the block and its arguments, and when it holds."""

    training: bool | None  # None for either
    types: tuple[type | None, ...]  # of the arguments; None where the forward does not ask
    function: Callable

    def fits(self, training: bool, args: tuple) -> bool:
        """Whether the trace assumed a call like this."""
        if len(args) != len(self.types) or self.training not in (None, training):
            return False
        # A trace took each argument for something that is not None, True, ….
        return all(
            isinstance(arg, (Tensor, list, tuple, dict)) if cls is None else type(arg) is cls
            for arg, cls in zip(args, self.types)
        )


@dataclass
class Graphs:
    """The variants of one block, and what they rely on beside their arguments."""

    variants: tuple[_Variant, ...] = ()
    sites: tuple[tuple[str, str, str], ...] = ()  # batch norm's path, pattern or "", reason
    structure: tuple[tuple[nn.Module, tuple], ...] = ()  # module, its children by name; the block comes first
    silent: tuple[nn.Module, ...] = ()  # must not be observed
    reads: tuple[tuple[nn.Module, str, Any], ...] = ()  # as in a Trace

    def __reduce__(self):
        return Graphs, ()  # a pickle traces again: functions made here have no name to be found by

    def __deepcopy__(self, memo):
        return Graphs(**{name: copy.deepcopy(value, memo) for name, value in vars(self).items()})

    def hold(self) -> bool:
        """Whether all that the traces saw is as it was."""
        if _has_any_global_hook():
            return False
        for module in self.silent:
            if is_observed(module):
                return False
        for module, children in self.structure:
            if tuple(module._modules.items()) != children:
                return False
        for module, name, value in self.reads:
            now = getattr(module, name, Absent)
            if value is ... and now is not None and now is not Absent:
                continue
            if now is not value and (type(now) is not type(value) or now != value):
                return False
        return True

    def function_for(self, training: bool, args: tuple) -> Callable | None:
        """Return the function for this call, or None where no trace holds."""
        if self.hold():
            for variant in self.variants:
                if variant.fits(training, args):
                    return variant.function
        return None


class FusedForward(Silent):
    """First base of a fused block's class; the block's own class comes second."""

    _fused_graphs = Graphs()  # no variants, for an instance that nobody fused

    def __reduce_ex__(self, protocol):
        reduced = super().__reduce_ex__(max(protocol, 2))
        if reduced[0] is not copyreg.__newobj__:
            return reduced
        return _new, (self.stands_for,), *reduced[2:]

    def __setstate__(self, state):
        super().__setstate__(state)  # type: ignore[misc]
        graphs = self._fused_graphs
        if graphs.variants and graphs.structure[0][0] is self:
            return
        unfuse_block(self)  # a pickle, or a shallow copy, whose graphs watch over the block that it is a copy of
        with contextlib.suppress(AttributeError):  # a part of a model is pickled: what it is a part of is not there yet
            fuse_block(self)


@functools.cache
def _fused_class(cls: type) -> type:
    @functools.wraps(cls.forward)  # type: ignore[attr-defined]
    def forward(self, *args, **kwargs):
        function = None if kwargs else self._fused_graphs.function_for(self.training, args)
        return cls.forward(self, *args, **kwargs) if function is None else function(self, *args)

    return subclass(cls, FusedForward, {"forward": forward})


def _new(cls: type) -> nn.Module:
    fused = _fused_class(cls)
    return fused.__new__(fused)


@functools.lru_cache(maxsize=256)
def _code(source: str, name: str):
    """Compile a graph's source; blocks that read the same share the code object, as torch.compile likes it."""
    path = f"<fused {name}.forward {next(_source_numbers)}>"
    linecache.cache[path] = (len(source), None, source.splitlines(True), path)  # for tracebacks
    return compile(source, path, "exec")


def _variant(block: nn.Module, trace: Trace) -> _Variant:
    python = trace.graph.python_code("self")
    names = dict(python.globals)
    exec(_code(python.src, type(block).__qualname__), names)
    types = tuple(trace.assumed.get(argument) for argument in trace.arguments)
    return _Variant(trace.assumed.get("training"), types, names["forward"])


def analyze(block: nn.Module) -> Graphs:
    """Trace a plain block and rewrite what can be; without variants if that is nothing."""
    norms = _batch_norms(block)
    if all(why_not(norm) for _, norm in norms):
        return Graphs(sites=tuple((name, "", why_not(norm)) for name, norm in norms))
    traces, refusals = trace_forward(block)
    variants, silent, parents = [], [], []
    reads: dict[tuple[nn.Module, str], Any] = {}
    found: dict[tuple[str, int], list[tuple[str, str]]] = {}
    for trace in traces:
        chains = Chains(block, trace.graph)
        if chains.silent:
            variants.append(_variant(block, trace))
        silent += chains.silent
        reads |= {(module, name): value for module, name, value in trace.reads}
        reads |= {(module, "activation"): "none" for module in chains.silent if hasattr(module, "activation")}
        parents += trace.parents
        for index, (norm, pattern, reason) in enumerate(chains.sites):
            key = (norm, [site[0] for site in chains.sites[:index]].count(norm))  # the how-manieth call of norm
            found.setdefault(key, []).append((pattern, reason))
    sites = []
    for (norm, _), outcomes in found.items():
        patterns = [pattern for pattern, _ in outcomes if pattern]
        reasons = [reason for _, reason in outcomes if reason] + refusals
        sites.append((norm, patterns[0] if patterns else "", reasons[0] if reasons else ""))
    called = {block.get_submodule(norm) for norm, _, _ in sites}
    uncalled = refusals[0] if refusals else "the forward of its parent does not call it"
    sites += [(name, "", uncalled) for name, norm in norms if norm not in called]
    return Graphs(
        tuple(variants),
        tuple(sites),
        tuple((module, tuple(module._modules.items())) for module in dict.fromkeys(parents)),
        tuple(dict.fromkeys(silent)),
        tuple((module, name, value) for (module, name), value in reads.items()),
    )


def fuse_block(block: nn.Module) -> bool:
    """Fuse what can be in one block; whether that changed it."""
    if isinstance(block, FusedForward):
        if block._fused_graphs.hold():
            return False
        unfuse_block(block)
    graphs = analyze(block)
    if not graphs.variants:
        return False
    vars(block)["_fused_graphs"] = graphs
    object.__setattr__(block, "__class__", _fused_class(type(block)))
    return True


def unfuse_block(block: FusedForward) -> None:
    """Give a fused block its own class and forward back."""
    object.__setattr__(block, "__class__", block.stands_for)
    vars(block).pop("_fused_graphs", None)


# ---------------------------------------------------------------------------------------------- finding blocks


def _has_forward(module: nn.Module) -> bool:
    return getattr(type(module), "forward", None) is not nn.Module.forward  # scripted modules keep theirs elsewhere


def _containers(module: nn.Module, prefix: str = "") -> Iterator[tuple[nn.Module, str]]:
    """Yield the children without a forward (ModuleList, ModuleDict) and theirs, with the prefix of their names."""
    for name, child in module._modules.items():
        if child is not None and not _has_forward(child):
            yield child, f"{prefix}{name}."
            yield from _containers(child, f"{prefix}{name}.")


def _batch_norms(block: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the batch norms that block's own forward may call: its children, and those in its containers."""
    found: dict[nn.Module, str] = {}
    for module, prefix in [(block, ""), *_containers(block)]:
        for name, child in module._modules.items():
            if isinstance(child, BATCH_NORMS):
                found.setdefault(child, f"{prefix}{name}")
    return [(name, norm) for norm, name in found.items()]


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the modules whose forward may call batch norms, with their names.

    One that has a fused block's class and no graphs gets its own class: Sequential makes such when it is sliced.
    """
    for module in model.modules():
        if isinstance(module, FusedForward) and not module._fused_graphs.variants:
            unfuse_block(module)
    return [
        (name, module)
        for name, module in model.named_modules()
        if (module is model or _has_forward(module)) and _batch_norms(module)
    ]
