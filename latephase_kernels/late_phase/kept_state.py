"""What a call on the side must leave as it was: random numbers, buffers, training flags."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def random_numbers_kept(model: nn.Module) -> Iterator[None]:
    """Behind the block, the random number generators of the CPU and of model's devices are as before."""
    with contextlib.ExitStack() as kept:
        kept.enter_context(torch.random.fork_rng([]))
        for device in {parameter.device for parameter in model.parameters()}:
            if hasattr(getattr(torch, device.type, None), "get_rng_state"):  # neither the CPU nor meta
                kept.enter_context(torch.random.fork_rng([device.index], device_type=device.type))
        yield


@contextlib.contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Behind the block, model has the buffers it had, of the same values, if they were written or replaced in it."""
    registered = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffers, own in registered:
            buffers.update(own)
        for buffer, value in before:
            buffer.copy_(value)


@contextlib.contextmanager
def training_flags_kept(model: nn.Module) -> Iterator[None]:
    """Behind the block, every module of model has the training flag it had."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training
