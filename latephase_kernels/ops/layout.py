"""The memory formats that kernels take."""

import torch
from torch import Tensor


def _format(tensor: Tensor) -> torch.memory_format:
    """The memory format PyTorch's batch norm gives its output; for a dense tensor without its strides, which
    torch.compile cannot always see.
    """
    if tensor.is_contiguous():
        return torch.contiguous_format
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
    if channels_last is not None and tensor.is_contiguous(memory_format=channels_last):
        return channels_last
    return torch._prims_common.suggest_memory_format(tensor)


def dense(tensor: Tensor) -> Tensor:
    """Return tensor, or its copy, in the memory format of a batch norm's output."""
    return tensor.contiguous(memory_format=_format(tensor))


def dense_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return tensor, or its copy, in the memory format of `like`, of the same shape."""
    return tensor.contiguous(memory_format=_format(like))


def contiguous(parameter: Tensor | None) -> Tensor | None:
    """Return parameter, or its contiguous copy."""
    return parameter if parameter is None or parameter.is_contiguous() else parameter.contiguous()


def rows_of_channels(input: Tensor) -> bool:
    """Whether a run of memory holds the channels of one position, rather than the positions of one channel."""
    return input.shape[2:].numel() == 1 or not input.is_contiguous()
