"""Watches a forward while it is traced: what it reads and calls beside its arguments.

A trace bakes in whatever Python decided, read or did on the way. What the forward may ask (the training flag, the type
of an argument) is a question that is assumed an answer for; what it reads from modules is noted as a condition;
anything else that could differ at another call (globals, random numbers, attributes set, grad mode, contexts) is
refused. The model's code is what is neither torch's nor Python's own; torch is known to look at its arguments alone in
the files listed here.
"""

import builtins
import dis
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import BuiltinFunctionType, CodeType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn

_TORCH = os.path.dirname(torch.__file__) + os.sep
_PYTHON = os.path.dirname(os.__file__) + os.sep
_PACKAGES = (_PYTHON + "site-packages", _PYTHON + "dist-packages")
_THIS = os.path.dirname(__file__) + os.sep + "fuse"  # and its siblings
_FX, _MODULES, *_FUNCTIONS = (
    _TORCH + path.replace("/", os.sep)
    for path in ("fx/", "nn/modules/", "nn/functional.py", "functional.py", "_jit_internal.py", "_tensor.py")
)
_KNOWN_PYTHON = (_FX, _MODULES, *_FUNCTIONS, _THIS)
_MODULE_METHODS = frozenset(  # of nn.Module itself; the others change it
    "children named_children modules named_modules parameters named_parameters buffers named_buffers".split()
)
_KNOWN_PACKAGES = ("math", "operator", "_operator", "builtins", "torch")
_KNOWN_BUILTINS = frozenset(
    "abs all any bool dict divmod enumerate filter float frozenset getattr hasattr int isinstance issubclass iter len "
    "list map max min next range reversed round set slice sorted str sum super tuple zip".split()
)
_CONSTANTS = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device, torch.memory_format)
_MACHINERY = frozenset(vars(nn.Module())) - {"training"}
_STORES = ("STORE_GLOBAL", "DELETE_GLOBAL", "STORE_ATTR", "DELETE_ATTR")
CONTAINERS = (list, tuple, dict, set, str, range)


class Absent:
    """As a value: there is no such attribute."""


class Untraceable(BaseException):
    """Why a forward cannot be traced; no Exception, so that a forward's own except clauses let it through."""


class Question(BaseException):
    """The forward asks for something that was not assumed."""


def is_constant(value: Any) -> bool:
    """Whether value can neither change nor hold anything that does."""
    if isinstance(value, tuple):
        return all(is_constant(entry) for entry in value)
    return isinstance(value, (*_CONSTANTS, type, FunctionType, BuiltinFunctionType))


class Silent:
    """First base of the classes made by subclass: the class they stand for does not hear of them."""

    stands_for: type

    def __init_subclass__(cls, **_):
        pass


def subclass(cls: type, base: type, names: dict[str, Any]) -> type:
    """Return a subclass of (base, cls), base being Silent, that goes by cls's name."""
    own = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__, "stands_for": cls}
    return type(cls)(cls.__name__, (base, cls), {**own, **names})


def own_class(module: nn.Module) -> type:
    """Return module's class, or the one that it stands for."""
    return type(module).stands_for if isinstance(module, Silent) else type(module)


def is_models(frame: FrameType | None) -> bool:
    """Whether the frame runs the model's code, rather than torch's, Python's own or this package's here."""
    if frame is None or frame.f_code.co_filename.startswith((_TORCH, _THIS, "<frozen")):
        return False
    path = frame.f_code.co_filename
    return not path.startswith(_PYTHON) or path.startswith(_PACKAGES)


def _asks(frame: FrameType | None) -> bool:
    """Whether the model asks, by itself or through methods of nn.Module, rather than torch.fx."""
    while frame is not None and frame.f_code.co_filename.startswith(_MODULES):
        frame = frame.f_back
    return frame is not None and not frame.f_code.co_filename.startswith(_FX)


@dataclass
class Watch:
    """Sees everything that one run of a forward reads and calls; refuses what may differ at another call.

    Attributes:
        module: whose forward runs.
        assumed: the answers to its questions.
        reads: (module, attribute, value), see Trace.
        parents: modules whose children it looked up or listed.
        stop: the first refusal or question, should the forward swallow the exception.
        scanned: the code that was looked through.
    """

    module: nn.Module
    assumed: dict[str, Any]
    reads: list[tuple[nn.Module, str, Any]] = field(default_factory=list)
    parents: list[nn.Module] = field(default_factory=list)
    stop: BaseException | None = None
    scanned: set[CodeType] = field(default_factory=set)

    def refuse(self, reason: str) -> None:
        self.note(reason)
        raise Untraceable(reason)

    def note(self, reason: str) -> None:
        """Refuse later: in a profile function, or where more is looked through."""
        self.stop = self.stop or Untraceable(reason)

    def raise_if_refused(self) -> None:
        if self.stop is not None:
            raise self.stop

    def answer(self, key: str) -> Any:
        """Return what is assumed of "training", or of an argument's type.

        Raises:
            Question: nothing is.
        """
        if key not in self.assumed:
            self.stop = self.stop or Question(key)
            raise self.stop
        return self.assumed[key]

    def watched(self, cls: type) -> type:
        """Return a subclass of a module class that reports what is read and set."""
        watch = self

        def read(module, name):
            value = cls.__getattribute__(module, name)  # type: ignore[call-arg]
            if name == "_modules" and _asks(sys._getframe(1)):
                watch.parents.append(module)
            if name in _MACHINERY or (name.startswith("__") and name not in ("__class__", "__dict__")):
                return value
            return watch.read(module, name, value, sys._getframe(1))

        def read_registered(module, name):
            try:
                value = cls.__getattr__(module, name)  # type: ignore[attr-defined]
            except AttributeError:
                watch.reads.append((module, name, Absent))
                raise
            if isinstance(value, nn.Module):
                watch.parents.append(module)
            else:
                watch.reads.append((module, name, None if value is None else ...))
            return value

        def write(module, name, *_):
            watch.refuse(f"its forward sets the attribute {name}")

        names = {"__getattribute__": read, "__getattr__": read_registered, "__setattr__": write, "__delattr__": write}
        return subclass(cls, Silent, names)

    def read(self, module: nn.Module, name: str, value: Any, frame: FrameType) -> Any:
        """Return what a frame gets that reads a plain attribute."""
        if name in ("__class__", "__dict__"):
            if is_models(frame):
                self.refuse(f"its forward reads {name}")
            return value
        if name == "training" and module is self.module:
            return self.answer(name)
        if isinstance(value, (nn.Module, fx.Proxy)):  # a proxy is what a property computed
            return value
        if isinstance(value, Tensor):
            self.reads.append((module, name, ...))
            return value
        if isinstance(value, (MethodType, FunctionType)) and name not in vars(module):
            return value
        if not is_constant(value):
            self.refuse(f"its forward reads the attribute {name}, a {type(value).__name__} that can change")
        self.reads.append((module, name, value))
        return value

    def __call__(self, frame: FrameType, event: str, called: Any) -> None:
        """As sys.setprofile wants it: see every call, before it runs, so that what is refused leaves no traces."""
        code = frame.f_code
        if event == "call" and is_models(frame):
            self.scan(frame)
        elif event == "call" and is_models(frame.f_back):
            known = code.co_filename.startswith(_KNOWN_PYTHON)
            if code.co_filename == f"{_MODULES}module.py":
                known = code.co_name in _MODULE_METHODS
            if not known:
                self.note(f"its forward calls {code.co_name} of {os.path.basename(code.co_filename)}")
        elif event == "c_call" and is_models(frame):
            owner = getattr(called, "__self__", None)
            if isinstance(owner, ModuleType):
                known = owner.__name__ != "torch._C" and owner.__name__.split(".")[0] in _KNOWN_PACKAGES
            else:
                known = owner is None or isinstance(owner, CONTAINERS) or _is_container_type(owner)
            if not known:
                self.note(f"its forward calls {getattr(called, '__qualname__', called)}")
        self.raise_if_refused()

    def scan(self, frame: FrameType) -> None:
        """Look through the code that a frame is about to run for what depends on more than its arguments."""
        code = frame.f_code
        if code in self.scanned:
            return
        self.scanned.add(code)
        if frame.f_back is None or code not in frame.f_back.f_code.co_consts:  # else its closure is the caller's
            for name in set(code.co_freevars) - {"__class__"}:
                self.check_global(name, frame.f_locals.get(name))
        before = None
        for instruction in dis.get_instructions(code):
            operation, name = instruction.opname, instruction.argval
            if operation == "LOAD_GLOBAL":
                self.check_global(name, frame.f_globals.get(name, getattr(builtins, name, None)))
            elif operation == "LOAD_ATTR" and before is not None and before.opname in ("LOAD_GLOBAL", "LOAD_DEREF"):
                names = frame.f_globals if before.opname == "LOAD_GLOBAL" else frame.f_locals
                if isinstance(names.get(before.argval), (type, FunctionType)):
                    self.note(f"its forward reads {before.argval}.{name}")
            elif operation == "IS_OP" and not (before.opname == "LOAD_CONST" and before.argval is None):
                self.note("its forward compares identities")
            elif operation == "IMPORT_NAME" or operation in _STORES:
                self.note(f"its forward {'imports' if operation == 'IMPORT_NAME' else 'changes'} {name}")
            elif operation.startswith("MATCH_"):
                self.note("its forward matches patterns")
            before = instruction

    def check_global(self, name: str, value: Any) -> None:
        """Refuse a global or outer variable but for functions, classes and the known modules and builtins."""
        if isinstance(value, ModuleType):
            known = value.__name__.split(".")[0] in _KNOWN_PACKAGES
        elif getattr(builtins, name, Absent) is value:
            known = name in _KNOWN_BUILTINS or (isinstance(value, type) and issubclass(value, BaseException))
        elif isinstance(value, BuiltinFunctionType):
            owner = value.__self__
            in_package = isinstance(owner, (ModuleType, type(None))) and _home(value) in _KNOWN_PACKAGES
            known = in_package or _is_container_type(owner)
        else:
            known = isinstance(value, (FunctionType, type))
        if not known:
            self.note(f"its forward uses {name} from outside of it")


def _is_container_type(owner: Any) -> bool:
    return isinstance(owner, type) and owner in CONTAINERS


def _home(function: Callable) -> str:
    return (function.__module__ or "").split(".")[0]
