"""The types that sums and formulas are evaluated in."""

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of statistics and sums: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def working_dtype(input: Tensor) -> torch.dtype:
    """The type the formula is evaluated in: float64 on the CPU, where PyTorch's own kernels accumulate in it too."""
    return torch.float64 if input.device.type == "cpu" else accumulation_dtype(input.dtype)
