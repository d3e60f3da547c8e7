"""Loads the compiled libraries and picks the backend of a call: native, triton or reference."""

import ctypes
import importlib.util
import os
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor

BACKENDS = ("native", "triton", "reference", "auto")
_LIBRARY_FOLDER = Path(__file__).parent / "lib"
_SUPPORTED_DTYPES = {
    "cpu": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}

_load_failures: dict[str, str] = {}  # device type → why its compiled kernels are missing
_ops: set[str] = set()  # all registered
_missing_ops: dict[tuple[str, str], str] = {}  # (op, device type) → why a library that did load cannot run it
_native: set[tuple] = set()  # (dtype, device, op) found to run natively under the choice in force
_choice = "auto"
_warned: set[str] = set()


def _load(device: str) -> str | None:
    """Load one compiled library; return None, or why it is not there."""
    path = _LIBRARY_FOLDER / f"liblatephase_{device}.so"
    if device == "cuda" and torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA"
    if not path.exists():
        if sys.platform == "win32":
            return f"{path.name} was not built: the kernels are for Linux and macOS; on Windows, WSL has them"
        compiler = "nvcc" if device == "cuda" else "a C++ compiler"
        return (
            f"{path.name} was not built: {compiler} was missing at installation, or LATEPHASE_WITHOUT_KERNELS set; "
            "mend that and reinstall"
        )
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:
        return (
            f"{path} did not load: {error.__cause__ or error}\n"
            f"Likely causes: (1) this torch ({torch.__version__}) is older than 2.10; (2) the library was built for "
            "another processor or C library; (3) the file is damaged. "
            "Reinstalling latephase_kernels beside this torch mends all three"
        )
    return _driver_failure(path) if device == "cuda" else None


def _driver_version() -> int:
    """The CUDA version that the driver runs, 1000 · major + 10 · minor; 0 without a driver.

    Of the driver itself: the runtime would initialize it, and a process forked after that cannot use the GPU.
    """
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return 0
    return version.value


def _driver_failure(path: Path) -> str | None:
    """Why the driver cannot run the CUDA library, which needs one of the major version that it was compiled with."""
    library, driver = ctypes.CDLL(str(path)), _driver_version()
    try:
        compiled = library.latephase_cuda_runtime_version()
    except AttributeError:
        return f"{path.name} is older than the package; reinstall latephase_kernels"
    if driver == 0 or driver // 1000 >= compiled // 1000:  # 0: there is none
        return None
    return (
        f"the GPU's driver runs CUDA up to {driver // 1000}.{driver % 1000 // 10}, and {path.name} was compiled with "
        f"{compiled // 1000}.{compiled % 1000 // 10}; update the driver, or reinstall with nvcc of an older CUDA"
    )


def _load_all() -> None:
    for device in ("cpu", "cuda"):
        failure = _load(device)
        if failure is not None:
            _load_failures[device] = failure


def _interprets_triton() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _triton_failure(tensor: Tensor) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if tensor.device.type != "cuda" and not _interprets_triton():
        return f"Triton does not run on {tensor.device.type} tensors (TRITON_INTERPRET=1 interprets it there, slowly)"
    return None


def note_op(op: str, *, composite: bool) -> None:
    """Remember a registered op, and on which devices the loaded libraries lack it, as older ones than the package may.

    composite: it runs where they do, too.
    """
    _ops.add(op)
    if composite:
        return
    for device in ("cpu", "cuda"):
        implemented = torch._C._dispatch_has_kernel_for_dispatch_key(f"latephase_kernels::{op}", device.upper())
        if device not in _load_failures and not implemented:
            _missing_ops[op, device] = f"the compiled {device} library is older than {op}; reinstall latephase_kernels"


def _native_failure(device: str, op: str | None) -> str | None:
    return _load_failures.get(device) or (_missing_ops.get((op, device)) if op is not None else None)


def _failure(backend: str, tensor: Tensor, op: str | None) -> str | None:
    """Why `backend` cannot run `op` (None: ops in general) on this tensor; None if it can."""
    if backend == "reference":
        return None
    device = tensor.device.type
    if device not in _SUPPORTED_DTYPES:
        return f"there are no kernels for {device} tensors"
    if tensor.dtype not in _SUPPORTED_DTYPES[device]:
        return f"there are no {device} kernels for {tensor.dtype}"
    return _triton_failure(tensor) if backend == "triton" else _native_failure(device, op)


def backend_for(tensor: Tensor, op: str | None = None) -> str:
    """Return "native", "triton" or "reference": the backend that an op on `tensor` runs on now.

    Inside `torch.jit.trace`, which cannot follow the compiled ops, that is the reference unless set_backend chose.

    Args:
        tensor: its device and type decide.
        op: the registered name of the op; None: any op that every library has.

    Raises:
        ValueError: op is not registered.
        RuntimeError: set_backend chose one that cannot run this tensor.
    """
    kind = (tensor.dtype, tensor.device, op)
    if torch.jit.is_tracing() and _choice == "auto":
        return "reference"
    remembers = not torch.compiler.is_compiling()  # a graph that guards what grows would soon be compiled again
    if remembers and kind in _native:
        return "native"
    if op is not None and op not in _ops:
        raise ValueError(f'backend_for: op must be None or the name of a registered op, as "member_gain", got {op!r}')
    if _choice != "auto":
        failure = _failure(_choice, tensor, op)
        if failure is not None:
            raise RuntimeError(
                f'backend_for: set_backend("{_choice}") is in force, but {failure}; call set_backend("auto")'
            )
        return _choice
    candidates = ("native", "triton") if tensor.device.type == "cuda" else ("native",)
    for candidate in candidates:
        if _failure(candidate, tensor, op) is None:
            if candidate == "native" and remembers:
                _native.add(kind)
            return candidate
    _warn_once(tensor.device.type, op)
    return "reference"


def _warn_once(device: str, op: str | None) -> None:
    if torch.compiler.is_compiling():  # no warning in a graph
        return
    failure = _native_failure(device, op)
    if failure is not None and failure not in _warned:
        _warned.add(failure)
        warnings.warn(
            f"latephase_kernels runs on the reference path (plain PyTorch, slower) for {device} tensors: {failure}",
            stacklevel=5,
        )


def set_backend(backend: str) -> None:
    """Choose the backend of every op from now on: "native", "triton", "reference" or "auto" (the fastest there is).

    Raises:
        ValueError: not one of these names.
        RuntimeError: it cannot run at all here; the message says why.
    """
    global _choice
    if backend not in BACKENDS:
        raise ValueError(f"set_backend: backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "native" and {"cpu", "cuda"} <= _load_failures.keys():
        reasons = "; ".join(f"{device}: {why}" for device, why in _load_failures.items())
        raise RuntimeError(f"set_backend: no compiled kernels could be loaded: {reasons}")
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        raise RuntimeError("set_backend: the package triton is not installed; pip install triton")
    if backend == "triton" and not torch.cuda.is_available() and not _interprets_triton():
        raise RuntimeError(
            "set_backend: Triton needs a GPU, and torch finds none; TRITON_INTERPRET=1, set before Python starts, "
            "interprets its kernels on the CPU, slowly"
        )
    _choice = backend
    _native.clear()


_load_all()
