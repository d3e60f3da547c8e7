"""What --deterministic switches on, and what it costs."""

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
