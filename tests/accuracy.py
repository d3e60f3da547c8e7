"""The error that values and gradients may have against float64: the same for every op."""

import torch


def assert_close(result, plain, truth):
    """At most twice PyTorch's own error on the same inputs, plus one output rounding at the tensor's scale.

    In float64 there is no truer truth than PyTorch's own result: there, 64 roundings.
    """
    for name, value in result.items():
        true, scale = truth[name], truth[name].abs().max().item()
        error = (value.double() - true).abs().max().item()
        own = (plain[name].double() - true).abs().max().item()
        roundings = 64 if value.dtype == torch.float64 else 1
        assert error <= 2 * own + roundings * torch.finfo(value.dtype).eps * scale, f"{name}: {error}, PyTorch: {own}"
