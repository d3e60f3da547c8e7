"""What makes results the same in every run: what --deterministic switches on, and one thread."""

import contextlib
import os
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def determinism(demanded: bool) -> Iterator[None]:
    """Inside, demand results that are the same in every run on this machine, or let cuDNN time its algorithms instead.

    On a CPU a seed reproduces a run bit for bit in any case, given the number of threads. On a GPU some operators of
    PyTorch add up in an order that varies, and cuDNN's choice by time may differ from run to run; kernels of this
    package do neither. Where it is demanded, an operator without a reproducible form raises PyTorch's RuntimeError,
    which names it. PyTorch's settings are as before afterwards.

    Cost:
        On a CPU none (`benchmarks/bench_trainer.py` measures it); on a GPU that of slower convolution algorithms and of
        sums without atomics.
    """
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark,
    )
    try:
        if demanded:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA makes its first handle
            torch.use_deterministic_algorithms(True)
            # Filling every new tensor with NaN would cost a pass over it, and finds errors only.
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = not demanded
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = before[2]  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = before[3]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Inside, PyTorch computes with one thread, so that figures do not depend on the number of cores.

    What is small gains little from a second thread, and waits for it badly where the machine is busy.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
