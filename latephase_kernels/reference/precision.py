"""The types that sums and formulas are evaluated in."""

import torch
from torch import Tensor

_WITH_FLOAT64 = ("cpu", "cuda", "meta")  # Apple's mps has none, nor have some of Intel's xpu


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of statistics and sums: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def working_dtype(input: Tensor) -> torch.dtype:
    """The type the formula is evaluated in: float64 on the CPU, where PyTorch's own kernels accumulate in it too."""
    return torch.float64 if input.device.type == "cpu" else accumulation_dtype(input.dtype)


def widest_dtype(device: torch.device) -> torch.dtype:
    """The type of sums that stay on a device: float64, float32 where it may have none."""
    return torch.float64 if device.type in _WITH_FLOAT64 else torch.float32


def wide(tensor: Tensor) -> Tensor:
    """Return tensor in float64, on the CPU where its device may have none."""
    return (tensor if tensor.device.type in _WITH_FLOAT64 else tensor.cpu()).double()


def typed_like(value: Tensor, like: Tensor) -> Tensor:
    """Return a value, computed from what wide returned, in the type of like and on its device."""
    # Only where it must, for what is traced would keep the device.
    return value.to(like.dtype) if value.device == like.device else value.to(like)
