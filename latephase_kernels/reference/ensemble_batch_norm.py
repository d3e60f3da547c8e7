"""Ensemble batch norm in plain PyTorch.

    y = activation( (x − mean_k) · rstd_k · weight_k + bias_k + residual ) · gain_k,   rstd_k = 1 / √(var_k + eps)

Shapes: K members, B rows a member, C channels; input [K·B, C, *]; per-member tensors [K, C].
Differentiable to any order by autograd, and usable under every torch.func transform.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .activation import activate
from .precision import accumulation_dtype, working_dtype


def statistics(input: Tensor, num_members: int) -> tuple[Tensor, Tensor]:
    """Return (mean, biased variance) per member and channel, each [K, C], in the working type."""
    x = input.to(working_dtype(input)).unflatten(0, (num_members, -1 if input.size(0) else 0))
    dims = [1, *range(3, x.dim())]
    mean = x.mean(dims, keepdim=True)
    var = (x - mean).square().mean(dims)
    return mean.reshape(var.shape), var


def per_row(per_member: Tensor, input: Tensor) -> Tensor:
    """Expand [K, C] or [C] to a shape that broadcasts against input [K·B, C, *]."""
    if per_member.dim() == 2:
        # What repeat_interleave does, whose translation to ONNX is wrong where the number of rows is not fixed.
        per_member = per_member.unsqueeze(1).expand(-1, input.size(0) // per_member.size(0), -1).flatten(0, 1)
    else:
        per_member = per_member.unsqueeze(0)
    return per_member.reshape(*per_member.shape, *[1] * (input.dim() - 2))


def finish(z: Tensor, activation: str, output_gain: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return activation(z) · gain [K, C] or [C] in dtype; z as rounded to it decides what a ReLU or ReLU6 passes."""
    if activation in ("silu", "hardswish"):
        return activate(z, activation).to(dtype)
    if output_gain is None:
        return activate(z.to(dtype), activation)
    if activation == "relu":
        z = torch.where(z.to(dtype) <= 0, 0.0, z)  # NaN passes
    return (z * per_row(output_gain.to(z.dtype), z)).to(dtype)


def ensemble_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    training: bool,
    eps: float,
    num_members: int,
    activation: str,
    output_gain: Tensor | None = None,
    move: Callable[[Tensor, Tensor], None] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y, mean, biased variance): the batch's statistics in training, else the running ones.

    move is called with the statistics, detached, before they normalize.
    """
    dtype, statistic = working_dtype(input), accumulation_dtype(input.dtype)
    x = input.to(dtype)  # once: its gradient is rounded to input's type once, too
    if training:
        mean, var = statistics(x, num_members)
    else:
        assert running_mean is not None and running_var is not None
        mean, var = running_mean.to(dtype), running_var.to(dtype)
    if move is not None:
        move(mean.detach().to(statistic), var.detach().to(statistic))
    z = (x - per_row(mean, x)) * per_row((var + eps).rsqrt(), x)
    if weight is not None:
        z = z * per_row(weight.to(dtype), input)
    if bias is not None:
        z = z + per_row(bias.to(dtype), input)
    if residual is not None:
        z = z + residual.to(dtype)
    y = finish(z, activation, output_gain, input.dtype)
    return y, mean.to(statistic), var.to(statistic)
