"""CIFAR's Python files without the `pickle` module: a reader of the few opcodes that they are made of.

A pickle is a program for a small stack machine, and the standard machine calls whatever function the program names.
The one below knows dicts, lists, tuples, integers, strings and arrays of unsigned bytes. Names of functions are only
compared with the three that an array of bytes needs; nothing is imported, looked up or called.

Reads what Python 2 wrote for the official archives (protocol 2, numpy 1), and the same re-saved by Python 3 (protocols
2 to 4, numpy 1 and 2).
"""

import io
import pickletools
from typing import Any

import numpy as np

# CIFAR-100's training file, the longest, takes 200,000, and 500,000 where Python 3 saved it with names as bytes. Every
# opcode makes one small object at most, so this bounds the memory beside that of the file's own bytes. (Objects of the
# file are never printed: sharing lets a short file describe one whose text is endless.)
_MAX_OPCODES = 600_000
_UINT8 = ("u1", "|u1")

_IGNORED = {"PROTO", "FRAME"}
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1"),
    *("SHORT_BINSTRING", "BINSTRING", "BINUNICODE", "SHORT_BINUNICODE", "SHORT_BINBYTES", "BINBYTES"),
}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = object()


class _Global:
    """The name of a function or class, never the thing itself."""

    def __init__(self, name: str):
        self.name = name


class _Array:
    """An array whose content a BUILD opcode will bring."""

    values: np.ndarray | None = None


class _ByteType:
    """numpy's dtype of unsigned bytes."""


# What the module of a name was called in numpy 1 and numpy 2, and in Python 3's pickles of bytes at protocol 2.
_GLOBALS = {
    "numpy.core.multiarray _reconstruct": "reconstruct",
    "numpy._core.multiarray _reconstruct": "reconstruct",
    "numpy ndarray": "ndarray",
    "numpy dtype": "dtype",
    "_codecs encode": "encode",
}


class _Machine:
    """The stack, its marks and the memo."""

    def __init__(self, size: int) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        # Bytes converted: an honest file has none of its own converted more than twice (by a codec, into an array).
        self.conversions_left = 2 * size

    def pop_to_mark(self) -> list[Any]:
        for position in reversed(range(len(self.stack))):
            if self.stack[position] is _MARK:
                values = self.stack[position + 1 :]
                del self.stack[position:]
                return values
        raise ValueError("a mark is missing")

    def step(self, name: str, argument: Any) -> None:
        """Do what an opcode says.

        Raises:
            ValueError, IndexError, KeyError: it is not one that CIFAR's files need, or not in its place.
        """
        stack = self.stack
        if name in _LITERALS:
            stack.append(argument)
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "TUPLE":
            stack.append(tuple(self.pop_to_mark()))
        elif name in _TUPLES:
            stack.append(tuple([stack.pop() for _ in range(_TUPLES[name])][::-1]))
        elif name in ("APPEND", "APPENDS"):
            values = [stack.pop()] if name == "APPEND" else self.pop_to_mark()
            self.container(list).extend(values)
        elif name in ("SETITEM", "SETITEMS"):
            values = [stack.pop(-2), stack.pop()] if name == "SETITEM" else self.pop_to_mark()
            keys = [self.as_bytes(key).decode("ascii") for key in values[::2]]
            self.container(dict).update(zip(keys, values[1::2], strict=True))
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            full_name = argument if name == "GLOBAL" else " ".join([stack.pop(-2), stack.pop()])
            if full_name not in _GLOBALS:
                raise ValueError(f"it names {full_name[:100]!r}, which may do anything")
            stack.append(_Global(_GLOBALS[full_name]))
        elif name == "REDUCE":
            arguments = stack.pop()
            stack.append(self.call(stack.pop(), arguments))
        elif name == "BUILD":
            state = stack.pop()
            self.build(stack[-1], state)
        elif name not in _IGNORED:
            raise ValueError(f"it has the opcode {name}, which CIFAR's files have not")

    def as_bytes(self, value: Any) -> bytes:
        # Python 2's strings were bytes: pickletools hands them over decoded as Latin-1, which keeps every byte.
        if not isinstance(value, (str, bytes)):
            raise ValueError("bytes stand where something else is")
        self.conversions_left -= len(value)
        if self.conversions_left < 0:
            raise ValueError("it uses the same bytes again and again")
        return value if isinstance(value, bytes) else value.encode("latin-1")

    def call(self, function: Any, arguments: Any) -> Any:
        """What REDUCE may make: an empty array, the type of unsigned bytes, or bytes written as a string."""
        name = function.name if isinstance(function, _Global) else None
        match name, arguments:
            case "reconstruct", (_Global(name="ndarray"), (0,), kind) if self.as_bytes(kind) == b"b":
                return _Array()
            case "dtype", (kind, *_) if kind in _UINT8:
                return _ByteType()
            case "encode", (str(text), "latin1"):
                return self.as_bytes(text)
        raise ValueError("something other than an array of unsigned bytes is constructed")

    def build(self, target: Any, state: Any) -> None:
        """What BUILD may fill: an array, from (version, (rows, columns), dtype, is_fortran, content)."""
        if isinstance(target, _ByteType):
            return  # its byte order and flags, which say nothing for single bytes
        match target, state:
            case _Array(values=None), (1, (int(rows), int(columns)), _ByteType(), int(is_fortran), content):
                buffer = self.as_bytes(content)
                if rows < 0 or columns < 0 or rows * columns != len(buffer):
                    raise ValueError(f"an array's {len(buffer)} bytes do not fit its shape")
                values = np.frombuffer(buffer, dtype=np.uint8)
                target.values = values.reshape(rows, columns, order="F" if is_fortran else "C")
                return
        raise ValueError("something other than an array of unsigned bytes is filled")

    def container(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise ValueError(f"values are put into something that is no {kind.__name__}")
        return self.stack[-1]


def read_cifar_pickle(content: bytes) -> dict[str, Any]:
    """Read the dict that a file of CIFAR's Python version holds.

    Args:
        content: the whole file.

    Returns:
        Its entries: lists, strings or bytes, integers, and two-dimensional uint8 arrays (read-only).

    Raises:
        ValueError: it is no such file; the text says what was met.

    Cost:
        About three times the file's size in memory, and two seconds for CIFAR-100's training file.
    """
    machine = _Machine(len(content))
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(io.BytesIO(content))):
            if count == _MAX_OPCODES:
                raise ValueError(f"it has more than {_MAX_OPCODES} opcodes")
            if opcode.name == "STOP":
                break
            machine.step(opcode.name, argument)
        (result,) = machine.stack
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"not a pickle as CIFAR's files are: {error!s:.200}") from error
    if not isinstance(result, dict):
        raise ValueError(f"not a pickle as CIFAR's files are: it holds a {type(result).__name__}, not a dict")
    return {key: value.values if isinstance(value, _Array) else value for key, value in result.items()}
