"""Traces one module's forward into torch.fx graphs that mean the same as the forward, or says why it cannot.

torch.fx runs the forward once on proxies and keeps the operations. Here that run is watched (fuse_watch), and there is
one for each answer to what the forward asks.
"""

import builtins
import math
import operator
import sys
from collections.abc import Callable
from dataclasses import dataclass
from inspect import Parameter, signature
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .fuse_watch import CONTAINERS, Question, Untraceable, Watch, is_constant, is_models, own_class

_TRAINING, _TYPES = (True, False), (Tensor, list)  # the answers traced for the flag, and for an argument's type
_DATA = frozenset(("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "T", "mT", "H", "mH"))
_isinstance = isinstance


@dataclass
class Trace:
    """One graph of a forward.

    Attributes:
        assumed: "training" → bool, argument → type; the graph holds for these answers only.
        graph: of the required arguments, all children leaves.
        arguments: names of the required arguments.
        reads: (module, attribute, value) the graph depends on; the value may be Absent, or ... for anything but None.
        parents: the modules on whose children the graph depends.
    """

    assumed: dict[str, Any]
    graph: fx.Graph
    arguments: tuple[str, ...]
    reads: list[tuple[nn.Module, str, Any]]
    parents: list[nn.Module]


def trace_forward(module: nn.Module) -> tuple[list[Trace], list[str]]:
    """Return the traces of module's forward, one for each answer it distinguishes, and why others are missing.

    While it runs, torch.fx and this file replace parts of torch and Python: no other thread should run the model.
    """
    traces, refusals = [], []
    todo: list[dict[str, Any]] = [{}]
    while todo:
        assumed = todo.pop(0)
        try:
            traces.append(_trace(module, assumed))
        except Question as question:
            key = str(question)
            todo += [{**assumed, key: answer} for answer in (_TRAINING if key == "training" else _TYPES)]
            if len(todo) > 12:
                return [], ["its forward distinguishes too many cases"]
        except Untraceable as refusal:
            refusals.append(str(refusal))
    return traces, refusals


def _trace(module: nn.Module, assumed: dict[str, Any]) -> Trace:
    arguments = _required_arguments(module)
    watch = Watch(module, assumed)
    tracer = _Tracer(watch, arguments)
    classes = [(child, type(child)) for child in module.modules() if not isinstance(child, torch.jit.ScriptModule)]
    try:
        watched = {cls: watch.watched(cls) for cls in {own_class(child) for child, _ in classes}}
        for child, _ in classes:
            object.__setattr__(child, "__class__", watched[own_class(child)])
        graph = tracer.trace(module)
    except (Untraceable, Question):
        raise
    except Exception as error:  # fx raises nearly every type for what it cannot trace
        watch.raise_if_refused()
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Untraceable(f"its forward cannot be traced: {message}") from None
    finally:
        for child, cls in classes:
            object.__setattr__(child, "__class__", cls)
    watch.raise_if_refused()
    return Trace(assumed, graph, arguments, watch.reads, list(dict.fromkeys([module, *watch.parents])))


def _required_arguments(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments without a default; a trace holds for calls with these alone."""
    forward = type(module).forward
    if not isinstance(forward, FunctionType) or hasattr(forward, "__wrapped__") or "forward" in vars(module):
        raise Untraceable("its forward is decorated, replaced or no Python function")
    parameters = list(signature(forward).parameters.values())[1:]
    names = []
    for parameter in parameters:
        if parameter.default is not Parameter.empty:
            if not is_constant(parameter.default):
                raise Untraceable(f"the default of its argument {parameter.name} can change")
        elif parameter.kind is Parameter.KEYWORD_ONLY:
            raise Untraceable(f"its argument {parameter.name} must be a keyword")
        elif parameter.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
    return tuple(names)


class _TracedOnly(TorchFunctionMode):
    """Refuses torch functions on anything else than proxies: they would run now, and never again."""

    def __init__(self, watch: Watch):
        super().__init__()
        self.watch = watch

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not any(isinstance(value, fx.Proxy) for value in tree_leaves((args, kwargs))):
            self.watch.refuse(
                f"its forward calls {getattr(function, '__name__', function)} on other values than its own"
            )
        return function(*args, **kwargs)


class _Tracer(fx.Tracer):
    """Records a forward of the required arguments, with all children as leaves."""

    proxy_buffer_attributes = True

    def __init__(self, watch: Watch, arguments: tuple[str, ...]):
        super().__init__(autowrap_modules=(math,))
        self.watch, self.arguments = watch, arguments

    def is_leaf_module(self, m, module_qualified_name):
        return True

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        def watched(*args):
            profile, builtins.isinstance = sys.getprofile(), self.is_instance  # type: ignore[assignment]
            try:
                with _TracedOnly(self.watch):
                    sys.setprofile(self.watch)
                    return root_fn(*args)
            finally:
                sys.setprofile(profile)
                builtins.isinstance = _isinstance

        return watched, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in self.arguments)]

    def proxy(self, node):
        return _Proxy(node, self)

    def create_arg(self, a):
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter) and a not in self.tensor_attrs:
            self.watch.refuse("its forward uses a tensor that is no attribute of it")
        if isinstance(a, CONTAINERS) and type(a) not in (*CONTAINERS, torch.Size) and not hasattr(a, "_fields"):
            self.watch.refuse(f"its forward makes a {type(a).__name__}")
        return super().create_arg(a)

    def to_bool(self, obj):
        self.watch.refuse("its forward decides by the values or shapes of its input")

    def iter(self, obj):
        self.watch.refuse("its forward iterates over its input")

    def is_instance(self, value: Any, classes: Any) -> bool:
        """Stand in for isinstance: what the model asks of an argument is answered as it is assumed to be."""
        if type(value) is not _Proxy or not is_models(sys._getframe(1)):
            return _isinstance(value, classes)
        if value.node.op != "placeholder":
            self.watch.refuse("its forward asks for the type of a value that it computed")
        return issubclass(self.watch.answer(value.node.target), classes)


class _Proxy(fx.Proxy):
    """Records in-place operators as such, and refuses what it cannot record."""

    def __getattr__(self, k):
        if k in _DATA:
            return self.tracer.create_proxy("call_function", getattr, (self, k), {})
        if not callable(getattr(Tensor, k, None)):
            self.tracer.watch.refuse(f"its forward reads .{k} of a value")
        return super().__getattr__(k)

    def __refuse(self, *_):
        self.tracer.watch.refuse("its forward decides by the values or shapes of its input, or changes parts of it")

    __len__ = __int__ = __float__ = __complex__ = __index__ = __contains__ = __reversed__ = __refuse
    __setitem__ = __delitem__ = __refuse


def _in_place(name: str) -> Callable:
    """Return the in-place operator as a function that fx writes as a call: as `a += b` it would rebind a number."""
    in_place = getattr(operator, name)

    def function(a, b):
        return in_place(a, b)

    function.__name__ = function.__qualname__ = f"in_place_{name}"
    return function


IN_PLACE = {
    name: _in_place(name)
    for name in "iadd isub imul itruediv ifloordiv imod ipow imatmul iand ior ixor ilshift irshift".split()
}
for _name, _function in IN_PLACE.items():
    setattr(
        _Proxy,
        f"__{_name}__",
        lambda self, other, f=_function: self.tracer.create_proxy("call_function", f, (self, other), {}),
    )
