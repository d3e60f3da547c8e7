"""The error that values and gradients may have against float64: the same for every op; and activations in PyTorch."""

import torch
import torch.nn.functional as F

ACTIVATIONS = {"none": lambda z: z, "relu": F.relu, "relu6": F.relu6, "silu": F.silu, "hardswish": F.hardswish}
STANDALONE = ("relu6", "silu", "hardswish")  # neither with a residual nor with an output gain
KINKS = {"relu": (0,), "relu6": (0, 6), "hardswish": (-3, 3)}  # where the derivative jumps


def assert_close(result, plain, truth, scales=None):
    """At most twice PyTorch's own error on the same inputs, plus one output rounding at the tensor's scale.

    In float64 there is no truer truth than PyTorch's own result: there, 64 roundings.
    scales: of single tensors, in place of their largest value: Σ|·| for a sum of terms that are rounded themselves.
    """
    for name, value in result.items():
        true = truth[name]
        scale = (scales or {}).get(name, true.abs().max().item())
        error = (value.double() - true).abs().max().item()
        own = (plain[name].double() - true).abs().max().item()
        roundings = 64 if value.dtype == torch.float64 else 1
        assert error <= 2 * own + roundings * torch.finfo(value.dtype).eps * scale, f"{name}: {error}, PyTorch: {own}"
