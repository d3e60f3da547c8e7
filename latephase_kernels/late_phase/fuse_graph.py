"""Finds BN → activation and BN → add → ReLU in the graph of a forward; each becomes one call of the batch norm.

A rank-1 layer whose output goes straight into a batch norm leaves its output gain to the norm; one that alone takes a
batch norm's output, rectified or not, its input gain.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..nn.batch_norm import OP_ACTIVATIONS, _EnsembleBatchNorm
from ..nn.member_module import is_observed
from ..nn.rank1 import Rank1Conv1d, Rank1Conv2d, Rank1Conv3d, Rank1Linear
from ..nn.rank1_batch_norm import Gain, input_gain_for, without_output_gain
from ..nn.shared_batch_norm import _SharedBatchNorm
from ..reference.activation import STANDALONE
from .fuse_trace import IN_PLACE

BATCH_NORMS = (_EnsembleBatchNorm, _SharedBatchNorm)
ACTIVATED = {name: f"BN → {cls.__name__}" for cls, name in OP_ACTIVATIONS.items()}
ADD_RELU = "BN → add → ReLU"
GAIN, TO_GAIN = "gain → ", " → gain"  # before any of them, or before "BN" alone; behind the first, or "BN"

_FUNCTIONS: dict[Any, str] = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_), "relu"),
    **{F.relu6: "relu6", F.silu: "silu", F.hardswish: "hardswish"},
}
_ADD_FUNCTIONS: dict[Any, str] = {operator.add: "add", torch.add: "add", IN_PLACE["iadd"]: "iadd"}
_ADD_METHODS = {"add": "add", "add_": "iadd"}
_ADDS: dict[str, Callable] = {"add": operator.add, "iadd": operator.iadd, "radd": lambda y, residual: residual + y}
_RANK1 = (Rank1Conv1d, Rank1Conv2d, Rank1Conv3d, Rank1Linear)
# Their output shares memory with nothing else.
_FRESH = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear),
    *_RANK1,
)


def batch_norm_add_relu(
    norm: nn.Module, input: Tensor, residual: Any, add: str, input_gain: Gain | None = None
) -> Tensor:
    """Return relu(norm(input) + residual): one op where residual is like input, else as the model has it.

    Args:
        norm: an ensemble or shared batch norm.
        input: [K·B, C, *].
        residual: whatever the model adds.
        add: "add", "iadd" (in place) or "radd" (residual comes first).
        input_gain: the norm's.
    """
    if (
        isinstance(residual, Tensor)
        and residual.shape == input.shape
        and residual.dtype == input.dtype
        and residual.device == input.device
        and residual.layout == torch.strided
    ):
        return norm(input, residual, "relu", input_gain)
    return F.relu(_ADDS[add](norm(input, input_gain=input_gain), residual))


def why_not(norm: nn.Module) -> str:
    """Say why a batch norm cannot be part of any chain, or ""."""
    if type(norm).forward not in [cls.forward for cls in BATCH_NORMS]:
        return "it has a forward of its own"
    if getattr(norm, "activation", "none") != "none":
        return "it has an activation of its own"
    return "it has hooks or a forward set on it" if is_observed(norm) else ""


class _Left(Exception):
    """Why a batch norm stays as it is."""


class Chains:
    """Rewrites the graph of one forward.

    Attributes:
        sites: (batch norm's path, pattern or "", reason if ""), in the order of the calls. Patterns: those
            of ACTIVATED and ADD_RELU, each perhaps after GAIN, and GAIN + "BN"; BN → ReLU, and "BN", perhaps before
            TO_GAIN.
        silent: the modules on whose calls the graph relies without making them all: they must not be observed.
    """

    def __init__(self, module: nn.Module, graph: fx.Graph):
        self.graph, self.children = graph, dict(module.named_modules())
        self.sites: list[tuple[str, str, str]] = []
        self.silent: list[nn.Module] = []
        # Backwards: where both operands of an add are batch norms, the later one takes the other as its residual.
        for node in reversed(list(graph.nodes)):
            if isinstance(self._child(node), BATCH_NORMS):
                plain = len(node.args) == 1 and not node.kwargs and not why_not(self.children[node.target])
                source, path = node.args[0] if plain else None, str(node.target)
                pattern, reason = "", ""
                try:
                    pattern, call = self._fuse(node)
                except _Left as why:
                    reason, call = str(why), node
                if self._leaves_gain(source, call, self.children[path]):
                    pattern, reason = GAIN + (pattern or "BN"), ""
                if plain and self._takes_input_gain(call):
                    pattern, reason = (pattern or "BN") + TO_GAIN, ""
                self.sites.insert(0, (path, pattern, reason))

    def _child(self, node: fx.Node) -> nn.Module | None:
        """Return the module that node calls."""
        return self.children[node.target] if node.op == "call_module" else None  # type: ignore[index]

    def _leaves_gain(self, source: Any, call: fx.Node, norm: nn.Module) -> bool:
        """Let the rank-1 layer that source calls leave its output gain to call, the norm's; whether that can be."""
        layer = self._child(source) if isinstance(source, fx.Node) else None
        if type(layer) not in _RANK1 or len(source.users) != 1 or len(source.args) != 1:
            return False
        if source.kwargs or is_observed(layer):
            return False
        with self.graph.inserting_before(source):
            modules = [
                self.graph.create_node("get_attr", target)
                for target in (source.target, next(name for name, child in self.children.items() if child is norm))
            ]
            pair = self.graph.call_function(without_output_gain, (*modules, *source.args))
            product, gain = (self.graph.call_function(operator.getitem, (pair, i)) for i in range(2))
        source.replace_all_uses_with(product)
        self.graph.erase_node(source)
        call.kwargs = {**call.kwargs, "input_gain": gain}
        self.silent += [layer, norm]
        return True

    def _takes_input_gain(self, call: fx.Node) -> bool:
        """Let the rank-1 layer that alone takes call, a norm's, leave its input gain to it; whether that can be."""
        silent: list[fx.Node] = []
        if call.kwargs.get("activation") in STANDALONE:
            return False
        try:
            value, user = self._follow(call, silent)
        except _Left:
            return False
        target = user.target
        if user.target is without_output_gain and user.args[2] is value:
            target = user.args[0].target
        elif user.op != "call_module" or user.args != (value,) or user.kwargs:
            return False
        layer = self.children.get(target)
        if call.op != "call_module" or type(layer) not in _RANK1 or is_observed(layer):
            return False
        between = [node for node in self._between(call, user) if node not in user.all_input_nodes]
        if self._touching(layer, target, between):
            return False  # it may change the gain, which is read earlier now
        with self.graph.inserting_before(call):
            modules = [self.graph.create_node("get_attr", name) for name in (target, call.target)]
            gain = self.graph.call_function(input_gain_for, (*modules, call.args[0]))
        with self.graph.inserting_before(user):
            multiplied = self.graph.call_function(operator.is_not, (gain, None))
        call.kwargs = {**call.kwargs, "output_gain": gain}
        user.kwargs = {"multiplied": multiplied}
        self.silent += [layer, self._child(call), *map(self._child, silent)]
        return True

    def _fuse(self, norm: fx.Node) -> tuple[str, fx.Node]:
        """Rewrite the chain that begins with norm and return its pattern and the call that stands for it.

        Raises:
            _Left: it cannot be proved to mean the same; nothing is changed.
        """
        silent = [self._batch_norm(norm)]
        chain: list[fx.Node] = []  # what goes: nn.Identity calls, the add, the activation
        value, user = self._follow(norm, chain)
        activation = self._activation(user, value)
        if activation is not None:
            chain.append(user)
            norm.kwargs = {"activation": activation}
            user.replace_all_uses_with(norm)
            pattern, call = ACTIVATED[activation], norm
        else:
            kind, residual = self._add(user, value)
            chain.append(user)
            total, relu = self._follow(user, chain)
            if self._activation(relu, total) != "relu":
                raise _Left(f"no ReLU follows the add, but {self._name(relu)}")
            chain.append(relu)
            silent += self._check_move(norm, user, chain)
            with self.graph.inserting_before(user):
                module = self.graph.create_node("get_attr", norm.target)
                call = self.graph.call_function(batch_norm_add_relu, (module, norm.args[0], residual, kind))
            relu.replace_all_uses_with(call)
            chain.insert(0, norm)
            pattern = ADD_RELU
        self.silent += silent + [child for child in map(self._child, chain) if child is not None]
        for node in reversed(chain):
            self.graph.erase_node(node)
        return pattern, call

    def _batch_norm(self, norm: fx.Node) -> nn.Module:
        """Return the module that norm calls, if one call of it can do more."""
        module = self._child(norm)
        assert module is not None
        reason = why_not(module)
        if reason:
            raise _Left(reason)
        if len(norm.args) != 1 or norm.kwargs:
            raise _Left("it is called with more than its input")
        return module

    def _follow(self, node: fx.Node, chain: list[fx.Node]) -> tuple[fx.Node, fx.Node]:
        """Return the last node with node's value, behind any nn.Identity, and the one node that uses it."""
        while True:
            if len(node.users) != 1:
                raise _Left(f"{len(node.users)} operations use the output of {self._name(node)}")
            (user,) = node.users
            child = self._child(user)
            if type(child) is not nn.Identity or user.args != (node,):
                return node, user
            if is_observed(child):
                raise _Left(f"{self._name(user)} has hooks or a forward set on it")
            chain.append(user)
            node = user

    def _activation(self, node: fx.Node, value: fx.Node) -> str | None:
        """Return which of the op's activations node applies to value."""
        child = self._child(node)
        if type(child) in OP_ACTIVATIONS:
            if is_observed(child):
                raise _Left(f"{self._name(node)} has hooks or a forward set on it")
            return OP_ACTIVATIONS[type(child)]
        if node.op == "call_function":
            return _FUNCTIONS.get(node.target) if node.args[:1] == (value,) else None
        return "relu" if node.op == "call_method" and node.target in ("relu", "relu_") else None

    def _add(self, node: fx.Node, value: fx.Node) -> tuple[str, Any]:
        """Return how node adds to value, a key of _ADDS, and what."""
        names: dict[Any, str] = {"call_function": _ADD_FUNCTIONS, "call_method": _ADD_METHODS}.get(node.op, {})
        kind = names.get(node.target)
        if kind is None or len(node.args) != 2 or node.kwargs:
            known = ", ".join(cls.__name__ for cls in OP_ACTIVATIONS)
            raise _Left(f"neither {known} nor a plain add follows, but {self._name(node)}")
        if node.args[0] is node.args[1]:
            raise _Left("it is added to itself")
        if node.args[0] is value:
            return kind, node.args[1]
        if kind == "iadd":
            raise _Left("it is added to another value in place")
        return "radd", node.args[0]

    def _check_move(self, norm: fx.Node, add: fx.Node, chain: list[fx.Node]) -> list[nn.Module]:
        """Return what else must be silent for norm to run where add is: what is between must not touch it or its input.

        Raises:
            _Left: it may.
        """
        between = [node for node in self._between(norm, add) if node not in chain]
        if not between:
            return []
        source = norm.args[0]
        child = self._child(source) if isinstance(source, fx.Node) else None
        if child is None or type(child) not in _FRESH or len(source.users) != 1 or is_observed(child):
            raise _Left("the residual is computed after it, and may change its input")
        touched = self._touching(self._child(norm), norm.target, between)
        if touched:
            raise _Left(f"it is {touched} again before the add")
        return [child]

    def _between(self, first: fx.Node, last: fx.Node) -> list[fx.Node]:
        """Return the nodes behind first and before last."""
        nodes = list(self.graph.nodes)
        return nodes[nodes.index(first) + 1 : nodes.index(last)]

    def _touching(self, module: nn.Module | None, path: Any, nodes: list[fx.Node]) -> str:
        """Say whether module is "called" by one of nodes, perhaps inside of another module, "used", in parts, or ""."""
        for node in nodes:
            called = self._child(node)
            if called is not None and any(child is module for child in called.modules()):
                return "called"
            if node.op == "get_attr" and f"{node.target}.".startswith(f"{path}."):
                return "used"
        return ""

    def _name(self, node: fx.Node) -> str:
        """What to call a node in a reason."""
        if node.op == "output":
            return "the end of the forward"
        if node.op == "call_module":
            return f"{node.target} ({type(self._child(node)).__name__})"
        return getattr(node.target, "__name__", str(node.target)).removeprefix("in_place_")
