"""Autocast in and around an op."""

import contextlib

import torch
from torch import Tensor


def _enabled(device: torch.device) -> bool:
    return device.type != "meta" and torch.is_autocast_enabled(device.type)  # which raises for meta


def autocast_dtype(input: Tensor) -> torch.dtype | None:
    """Return the type that autocast gives a tensor like input; None: its own, as float64 keeps it."""
    if input.dtype == torch.float64 or not _enabled(input.device):
        return None
    return torch.get_autocast_dtype(input.device.type)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Return a context without autocast: an op's types are settled when it runs, and its sums are float32."""
    return torch.autocast(device.type, enabled=False) if _enabled(device) else contextlib.nullcontext()
