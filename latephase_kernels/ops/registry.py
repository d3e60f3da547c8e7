"""Registers one op contract under the native and the Triton namespace alike.

C++ implements `latephase_kernels::*` for CPU and CUDA; `latephase_kernels_triton::*` is implemented by the functions
of the same names in `latephase_kernels/triton_kernels/<op file>.py`, imported at the first call.
"""

import importlib
from collections.abc import Callable

import torch

from .. import backend

NATIVE = "latephase_kernels"
TRITON = "latephase_kernels_triton"

_libraries = {namespace: torch.library.Library(namespace, "FRAGMENT") for namespace in (NATIVE, TRITON)}


def define(name: str, schema: str, fake: Callable, *, op_file: str) -> None:
    """Define `name` + `schema` in both namespaces, with its fake kernel and the Triton implementation."""

    def triton_implementation(*args):
        module = importlib.import_module(f"latephase_kernels.triton_kernels.{op_file}")
        return getattr(module, name)(*args)

    for namespace, library in _libraries.items():
        library.define(name + schema)
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
    for device in ("CUDA", "CPU"):  # CPU: Triton's interpreter
        _libraries[TRITON].impl(name, triton_implementation, device)
    backend.note_op(name)


def register_autograd(name: str, backward: Callable, setup_context: Callable) -> None:
    """Attach an autograd formula to `name` in both namespaces; `backward` receives the namespace first."""
    for namespace, library in _libraries.items():

        def bound_backward(ctx, *grads, _namespace=namespace):
            return backward(_namespace, ctx, *grads)

        torch.library.register_autograd(
            f"{namespace}::{name}", bound_backward, setup_context=setup_context, lib=library
        )


def op(namespace: str, name: str) -> torch._ops.OpOverload:
    """The callable of one registered op."""
    return getattr(getattr(torch.ops, namespace), name).default
