"""What the arguments of ensemble_batch_norm must be; nothing is changed before all of it holds."""

import math

from torch import Tensor

from ..reference.activation import ACTIVATIONS, STANDALONE
from .checks import check_activation, check_input, check_num_members, check_per_member, check_strided

_OP = "ensemble_batch_norm"


def check_eps(op: str, eps: float, training: bool) -> None:
    """Raise unless eps is a finite number, > 0 in training and ≥ 0 otherwise."""
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"{op}: eps must be a float, got {type(eps).__name__}")
    if not 0 <= eps < math.inf or (training and eps == 0):
        raise ValueError(f"{op}: eps must be finite and {'> 0 in training' if training else '>= 0'}, got {eps}")


def check_momentum(op: str, momentum: float | Tensor, num_members: int) -> None:
    """Raise unless momentum is a finite number or a tensor of shape [] or [K, 1]."""
    if isinstance(momentum, Tensor):
        if momentum.dim() > 0 and tuple(momentum.shape) != (num_members, 1):
            raise ValueError(
                f"{op}: momentum must be a float, or a tensor of shape [] or [{num_members}, 1] (one a member), "
                f"got shape {list(momentum.shape)}; of one value a member, pass momentum.view({num_members}, 1)"
            )
        return
    if isinstance(momentum, bool) or not isinstance(momentum, (int, float)):
        raise TypeError(
            f"{op}: momentum must be a float or a Tensor, got {type(momentum).__name__}; for a cumulative average "
            "(momentum=None) use the modules in latephase_kernels.nn, or pass 1 / (batches seen so far)"
        )
    if not -math.inf < momentum < math.inf:
        raise ValueError(f"{op}: momentum must be finite, got {momentum}")


def _check_input(input: Tensor, num_members: int) -> None:
    check_input(_OP, input)
    if not 2 <= input.dim() <= 5:
        raise ValueError(
            f"{_OP}: input must be [K·B, C] with 0 to 3 spatial dimensions behind, got shape {tuple(input.shape)}"
        )
    if input.size(0) % num_members:
        raise ValueError(
            f"{_OP}: input.size(0)={input.size(0)} is not divisible by num_members={num_members}; "
            f"stack {num_members} equal minibatches along dim 0"
        )


def _check_running(running_mean: Tensor | None, running_var: Tensor | None, input: Tensor, shape, training) -> None:
    if (running_mean is None) != (running_var is None):
        missing = "running_mean" if running_mean is None else "running_var"
        raise ValueError(f"{_OP}: {missing} is None but the other is not; pass both or neither")
    if running_mean is None or running_var is None:
        if not training:
            raise ValueError(f"{_OP}: running_mean and running_var must be given when training=False")
        return
    for name, running in (("running_mean", running_mean), ("running_var", running_var)):
        check_per_member(_OP, name, running, input, (shape,))
        if not training:
            continue
        if running.requires_grad:
            raise ValueError(f"{_OP}: {name} is updated in place, so it must not require grad; use a buffer")
        if any(stride == 0 and size > 1 for stride, size in zip(running.stride(), running.shape)):
            raise ValueError(f"{_OP}: {name} is updated in place but its values share memory; .clone() it")
    if training and running_mean is running_var:
        raise ValueError(f"{_OP}: running_mean and running_var are the same tensor; pass two buffers")


def _check_residual(residual: Tensor, input: Tensor) -> None:
    if not isinstance(residual, Tensor):
        raise TypeError(f"{_OP}: residual must be a Tensor or None, got {type(residual).__name__}")
    if residual.shape != input.shape:
        raise ValueError(f"{_OP}: residual must have input's shape {list(input.shape)}, got {list(residual.shape)}")
    check_strided(_OP, "residual", residual)
    if residual.dtype != input.dtype:
        raise NotImplementedError(
            f"{_OP}: residual must have input's type {input.dtype}, got {residual.dtype}; "
            f"convert it with .to({input.dtype})"
        )
    if residual.device != input.device:
        raise ValueError(f"{_OP}: residual is on {residual.device}, input on {input.device}; move one of them")


def check_arguments(
    input,
    running_mean,
    running_var,
    weight,
    bias,
    training,
    momentum,
    eps,
    num_members,
    residual,
    activation,
    ranks=1,
    output_gain=None,
) -> None:
    """Raise the exception that names the first argument that does not fit, what was expected, and the remedy.

    `ranks` is how many hold as many rows as input has, where their statistics are common.
    """
    check_num_members(_OP, num_members)
    _check_input(input, num_members)
    if not isinstance(training, bool):
        raise TypeError(f"{_OP}: training must be a bool, got {type(training).__name__}")
    check_eps(_OP, eps, training)
    check_momentum(_OP, momentum, num_members)
    check_activation(_OP, activation, ACTIVATIONS)
    per_member = (num_members, input.size(1))
    _check_running(running_mean, running_var, input, per_member, training)
    for name, parameter in (("weight", weight), ("bias", bias), ("output_gain", output_gain)):
        if parameter is not None:
            check_per_member(_OP, name, parameter, input, (per_member, per_member[1:]))
    if residual is not None:
        _check_residual(residual, input)
        if output_gain is not None:
            raise ValueError(
                f"{_OP}: output_gain must be None where there is a residual, got shape {list(output_gain.shape)}; "
                "multiply the result by member_gain"
            )
    if activation in STANDALONE and (residual is not None or output_gain is not None):
        given = "output_gain" if residual is None else "residual"
        raise ValueError(
            f"{_OP}: {given} must be None with activation={activation!r}; "
            f"apply F.{activation} to what activation='none' gives"
        )
    if training and 0 < input.numel() * ranks == num_members * input.size(1):
        raise ValueError(
            f"{_OP}: training needs more than one value a channel and member, got input of shape {list(input.shape)} "
            f"with num_members={num_members}; give each member a larger batch, or call with training=False"
        )
