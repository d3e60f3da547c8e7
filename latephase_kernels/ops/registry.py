"""Registers one op contract under the native and the Triton namespace alike.

C++ implements `latephase_kernels::*` for CPU and CUDA; where it does not, an op may have a composite implementation in
Python, of other operators. `latephase_kernels_triton::*` is implemented by the functions of the same names in
`latephase_kernels/triton_kernels/<op file>.py`, imported at the first call.
"""

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from .. import backend

NATIVE = "latephase_kernels"
TRITON = "latephase_kernels_triton"
_NAMESPACES = {"native": NATIVE, "triton": TRITON, "reference": None}  # by backend

_libraries = {namespace: torch.library.Library(namespace, "FRAGMENT") for namespace in (NATIVE, TRITON)}
_ops: dict[tuple[str, str], torch._ops.OpOverload] = {}


def define(
    name: str,
    schema: str,
    fake: Callable,
    *,
    op_file: str,
    composite: Callable | None = None,
    triton_fake: Callable | None = None,
) -> None:
    """Define `name` + `schema` in both namespaces, with its fake kernel and the Triton implementation.

    triton_fake: the Triton op's fake kernel where what it keeps for backward is not what the native op does.
    composite: what `latephase_kernels::<name>` runs on a device for which C++ has no kernel of it; None: C++ must.
    """

    def triton_implementation(*args):
        module = importlib.import_module(f"latephase_kernels.triton_kernels.{op_file}")
        return getattr(module, name)(*args)

    for namespace, library in _libraries.items():
        library.define(name + schema)
        own_fake = triton_fake if namespace == TRITON and triton_fake is not None else fake
        torch.library.register_fake(f"{namespace}::{name}", own_fake, lib=library)
        _ops[namespace, name] = getattr(getattr(torch.ops, namespace), name).default
    for device in ("CUDA", "CPU"):  # CPU: Triton's interpreter
        _libraries[TRITON].impl(name, triton_implementation, device)
    backend.note_op(name, composite=composite is not None)
    if composite is not None:
        _libraries[NATIVE].impl(name, composite, "CompositeExplicitAutograd")


def register_autograd(name: str, backward: Callable, setup_context: Callable) -> None:
    """Attach an autograd formula to `name` in both namespaces; `backward` receives the namespace first."""
    for namespace, library in _libraries.items():

        def bound_backward(ctx, *grads, _namespace=namespace):
            return backward(_namespace, ctx, *grads)

        torch.library.register_autograd(
            f"{namespace}::{name}", bound_backward, setup_context=setup_context, lib=library
        )


def below_autograd(name: str) -> None:
    """Let calls of `name` pass autograd by: it is called where another function has the formula; saves time a call."""
    for library in _libraries.values():
        library.impl(name, torch.library.fallthrough_kernel, "Autograd")


def op(namespace: str, name: str) -> torch._ops.OpOverload:
    """The callable of one registered op."""
    return _ops[namespace, name]


def namespace_for(tensor: Tensor, name: str) -> str | None:
    """The namespace of the backend that `name` runs on for this tensor; None: the reference."""
    return _NAMESPACES[backend.backend_for(tensor, name)]


def is_exporting() -> bool:
    """Whether the call is traced into a program for elsewhere, where ops of the library may be unknown."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()
