"""The memory formats that kernels take."""

import torch
from torch import Tensor


def dense(tensor: Tensor) -> Tensor:
    """Return tensor, or its copy, in the memory format PyTorch's batch norm gives its output."""
    if tensor.is_contiguous():
        return tensor
    return tensor.contiguous(memory_format=torch._prims_common.suggest_memory_format(tensor))


def dense_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return tensor in the strides of the dense tensor `like` of the same shape."""
    if tensor.stride() == like.stride():
        return tensor
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


def contiguous(parameter: Tensor | None) -> Tensor | None:
    """Return parameter, or its contiguous copy."""
    return parameter if parameter is None or parameter.is_contiguous() else parameter.contiguous()


def rows_of_channels(input: Tensor) -> bool:
    """Whether a run of memory holds the channels of one position, rather than the positions of one channel."""
    return input.shape[2:].numel() == 1 or not input.is_contiguous()
