"""Ensemble batch norm: batch norm with statistics and affine weights of each member's own.

    y = activation( (x − mean_k) · rstd_k · weight_k + bias_k + residual ) · gain_k,   rstd_k = 1 / √(var_k + eps)

Shapes: K members, B rows a member, C channels, S = product of the spatial sizes, n = B·S values a statistic.
Row i of input [K·B, C, *] belongs to member k = i // B. Per-member tensors are [K, C].

Registered ops, the same in both namespaces (`registry.py`); their tensors are dense, contiguous or channels_last:

    ensemble_batch_norm           the whole forward                ensemble_batch_norm_backward   the whole backward
    …_statistics  →  …_apply      its two halves                   …_backward_reduce  →  …_backward_apply
    …_update                      the forward in training, which moves the running statistics as well
    …_with_gain                   the forward in training of input · gain (ensemble_batch_norm_gain.py)

The halves exist for what comes between them: statistics that are synchronized over processes
(ensemble_batch_norm_synchronized.py), and …_with_gain where it has no kernel.
Only …_update changes an argument: eager training calls it, so that running statistics take no launch of their own;
compiled graphs are functional.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..reference import ensemble_batch_norm as reference
from ..reference.precision import accumulation_dtype
from . import registry
from .checks import DTYPES
from .ensemble_batch_norm_autograd import Normalize, NormalizeAndUpdate, backward, setup_context
from .ensemble_batch_norm_checks import check_arguments
from .ensemble_batch_norm_gain import forward_in_halves, normalize_with_gain
from .ensemble_batch_norm_synchronized import StatisticsGroup, normalize_synchronized
from .layout import contiguous, dense, dense_like
from .relu_mask import mask_shape

# ---------------------------------------------------------------------------------------------- schemas and fakes


def _statistic(input: Tensor, num_members: int) -> Tensor:
    return input.new_empty((num_members, input.size(1)), dtype=accumulation_dtype(input.dtype))


def _fake_statistics(input, num_members):
    return _statistic(input, num_members), _statistic(input, num_members)


def _fake_apply(input, mean, rstd, weight, bias, residual, num_members, activation, output_gain=None):
    mask = input.new_empty(mask_shape(input, residual, activation), dtype=torch.uint8)
    return torch.empty_like(input), mask


def _fake_forward(
    input, running_mean, running_var, weight, bias, residual, training, eps, num_members, activation, output_gain=None
):
    y, mask = _fake_apply(input, None, None, weight, bias, residual, num_members, activation)
    return y, *(_statistic(input, num_members) for _ in range(3)), mask


def _fake_update(
    input, running_mean, running_var, num_batches_tracked, weight, bias, residual, momentum, eps, num_members,
    activation, output_gain=None,
):  # fmt: skip
    others = (running_mean, running_var, num_batches_tracked, weight, bias, residual, output_gain)
    if any(tensor is not None and tensor.device != input.device for tensor in others):  # where one of them is on meta
        raise RuntimeError("ensemble_batch_norm: all tensors must be on input's device")
    y, mask = _fake_apply(input, None, None, weight, bias, residual, num_members, activation)
    return y, *_fake_statistics(input, num_members), mask


def _fake_with_gain(input, input_gain, weight, bias, residual, eps, num_members, activation, output_gain=None):
    return _fake_forward(input, None, None, weight, bias, residual, True, eps, num_members, activation)


def _fake_backward_reduce(dy, input, mean, rstd, weight, bias, mask, num_members, activation):
    return _fake_statistics(input, num_members)


def _fake_backward_apply(
    dy, input, mean, rstd, weight, bias, mask, sum_dz, sum_dz_xhat, count, num_members, activation, residual_grad,
    output_gain=None,
):  # fmt: skip
    return torch.empty_like(input), torch.empty_like(input) if residual_grad else input.new_empty([0])


def _fake_backward(
    dy, input, mean, rstd, weight, bias, mask, training, num_members, activation, residual_grad, output_gain=None
):
    dresidual = torch.empty_like(input) if residual_grad else input.new_empty([0])
    return torch.empty_like(input), *_fake_statistics(input, num_members), dresidual


_STATISTIC = {dtype: accumulation_dtype(dtype) for dtype in DTYPES}  # the type of an input's statistics
_SAVED = "Tensor dy, Tensor input, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, Tensor mask"
# [K, C] or [C]; not with a residual. dweight, dbias and the sums are those of what it multiplies.
_GAIN = "Tensor? output_gain=None"

for _name, _schema, _fake in (
    (
        "ensemble_batch_norm",
        "(Tensor input, Tensor? running_mean, Tensor? running_var, Tensor? weight, Tensor? bias, Tensor? residual, "
        f"bool training, float eps, int num_members, str activation, {_GAIN}) "
        "-> (Tensor y, Tensor mean, Tensor rstd, Tensor var, Tensor mask)",
        _fake_forward,
    ),
    (
        "ensemble_batch_norm_update",
        "(Tensor input, Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!)? num_batches_tracked, "
        "Tensor? weight, Tensor? bias, Tensor? residual, float momentum, float eps, int num_members, str activation, "
        f"{_GAIN}) "
        "-> (Tensor y, Tensor mean, Tensor rstd, Tensor mask)",
        _fake_update,
    ),
    (
        "ensemble_batch_norm_backward",
        f"({_SAVED}, bool training, int num_members, str activation, bool residual_grad, {_GAIN}) "
        "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)",
        _fake_backward,
    ),
    (
        "ensemble_batch_norm_statistics",
        "(Tensor input, int num_members) -> (Tensor mean, Tensor var)",
        _fake_statistics,
    ),
    (
        "ensemble_batch_norm_apply",
        "(Tensor input, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, Tensor? residual, int num_members, "
        f"str activation, {_GAIN}) -> (Tensor y, Tensor mask)",
        _fake_apply,
    ),
    (
        "ensemble_batch_norm_backward_reduce",
        f"({_SAVED}, int num_members, str activation) -> (Tensor sum_dz, Tensor sum_dz_xhat)",
        _fake_backward_reduce,
    ),
    (
        "ensemble_batch_norm_backward_apply",
        f"({_SAVED}, Tensor sum_dz, Tensor sum_dz_xhat, float count, int num_members, str activation, "
        f"bool residual_grad, {_GAIN}) -> (Tensor dx, Tensor dresidual)",
        _fake_backward_apply,
    ),
):
    registry.define(_name, _schema, _fake, op_file="ensemble_batch_norm")

registry.define(
    "ensemble_batch_norm_with_gain",
    "(Tensor input, Tensor input_gain, Tensor? weight, Tensor? bias, Tensor? residual, float eps, int num_members, "
    f"str activation, {_GAIN}) -> (Tensor y, Tensor mean, Tensor var, Tensor rstd, Tensor mask)",
    _fake_with_gain,
    op_file="ensemble_batch_norm",
    composite=partial(forward_in_halves, registry.NATIVE),
)

registry.register_autograd("ensemble_batch_norm", backward, setup_context)
for _name in ("ensemble_batch_norm_update", "ensemble_batch_norm_backward"):  # called inside of other functions alone
    registry.below_autograd(_name)

# ---------------------------------------------------------------------------------------------- public


def normalize(
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
    group: StatisticsGroup | None = None,
    input_gain: tuple[Tensor, Tensor | None] | None = None,
    output_gain: Tensor | None = None,
    move: Callable[[Tensor, Tensor], None] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y, mean [K, C], biased variance [K, C]); the running statistics are move's; arguments unchecked.

    Args:
        input_gain: (r, shift): of input · r + shift, in training and on one rank.
        move: called with the detached mean and variance; in eager before the last tensor is kept for backward, where
            the second forward of torch.utils.checkpoint ends.
    """
    early, late = (None, move) if torch.compiler.is_compiling() else (move, None)
    running, settings = (running_mean, running_var), (training, eps, num_members, activation)
    namespace = registry.namespace_for(input, "ensemble_batch_norm")
    if input_gain is not None:
        found = normalize_with_gain(
            input, *input_gain, weight, bias, residual, eps, num_members, activation, output_gain, early
        )
    elif training and group is not None and group.size > 1:
        found = normalize_synchronized(
            input, weight, bias, residual, eps, num_members, activation, group, output_gain, early
        )
    elif namespace is None or torch._C._are_functorch_transforms_active():
        found = reference.ensemble_batch_norm(
            input, *running, weight, bias, residual, training, eps, num_members, activation, output_gain, early
        )
    else:
        input = dense(input)
        if residual is not None:
            residual = dense_like(residual, input)
        weight, bias, output_gain = contiguous(weight), contiguous(bias), contiguous(output_gain)
        if not torch.compiler.is_compiling():
            return Normalize.apply(input, weight, bias, residual, output_gain, namespace, running, settings, early)
        operands = (input, *running, weight, bias, residual)
        y, mean, _, var, _ = registry.op(namespace, "ensemble_batch_norm")(*operands, *settings, output_gain)
        found = y, mean, var
    if late is not None:
        late(found[1].detach(), found[2].detach())
    return found


def ensemble_batch_norm(
    input: Tensor,  # [K·B, C, *]
    running_mean: Tensor | None,  # [K, C]
    running_var: Tensor | None,  # [K, C]
    weight: Tensor | None = None,  # [K, C] or [C]
    bias: Tensor | None = None,  # [K, C] or [C]
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    *,
    num_members: int,
    residual: Tensor | None = None,  # [K·B, C, *]
    activation: str = "none",
    output_gain: Tensor | None = None,  # [K, C] or [C]
    group: StatisticsGroup | None = None,
) -> Tensor:
    """Normalize each member's rows by their own statistics; equals `F.batch_norm` on each member's slice.

        y = activation( (x − mean_k) / √(var_k + eps) · weight_k + bias_k + residual ) · gain_k

    Args:
        input: [K·B, C] or [K·B, C, *] with up to 3 spatial dimensions, member-major (row i is member i // B's);
            float32, bfloat16, float16, or float64 (CPU); any strides, contiguous and channels_last without a copy.
        running_mean, running_var: [K, C] or None; updated in place in training (with the unbiased variance), used
            instead of the batch's statistics otherwise.
        weight, bias: [K, C], or [C] shared by all members, or None; float32 or input's type.
        training: normalize by the batch's own statistics (biased variance).
        momentum: share of the new batch in the running statistics; a float, or a tensor of shape [] or [K, 1].
        eps: added to the variance; > 0 in training.
        num_members: K.
        residual: added before the activation; input's shape and type.
        activation: "none" or "relu" (NaN passes through); without residual and output_gain also "relu6", "silu",
            z / (1 + e⁻ᶻ), or "hardswish", z · min(max(z + 3, 0), 6) / 6.
        output_gain: multiplies what the activation gives, any sign; [K, C], [C] or None, typed like weight; without a
            residual only.
        group: ranks whose rows make the statistics in training, each with as many of its own; None: own rows alone.

    Returns:
        [K·B, C, *], in input's type and memory format.

    Raises:
        ValueError: a shape or value does not fit; also one value a channel and member in training.
        TypeError: an argument has the wrong Python type.
        NotImplementedError: a dtype, device or tensor layout without kernels.

    Cost:
        Saved for backward: input, two [K, C] float32 statistics and, with residual and ReLU together, one bit a value.

    Source: von Oswald et al., ICLR 2021, section 2 (BatchNorm as late-phase weights).
    """
    if group is not None and not isinstance(group, StatisticsGroup):
        raise TypeError(
            f"ensemble_batch_norm: group must be a StatisticsGroup or None, got {type(group).__name__}; "
            "make a StatisticsGroup(group) of a process group"
        )
    if training is True and running_mean is not None and running_var is not None:
        return normalize_and_update(
            input, running_mean, running_var, None, weight, bias, residual,
            momentum, eps, num_members, activation, group, output_gain=output_gain,
        )  # fmt: skip
    check_arguments(
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
        ranks=1 if group is None else group.size,
        output_gain=output_gain,
    )
    settings = (eps, num_members, activation, group)
    return normalize(
        input, running_mean, running_var, weight, bias, residual, training, *settings, output_gain=output_gain
    )[0]


def normalize_and_update(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,  # [K]
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    momentum: float | Tensor,
    eps: float,
    num_members: int,
    activation: str,
    group: StatisticsGroup | None = None,
    input_gain: tuple[Tensor, Tensor | None] | None = None,
    output_gain: Tensor | None = None,
) -> Tensor:
    """Return y by the batch's statistics and move the running ones, in one kernel where it can.

    Raises:
        As ensemble_batch_norm. That op checks all that it is given; only if it refuses are the arguments looked at one
        by one, to name the wrong one.
    """
    running = (running_mean, running_var, num_batches_tracked)
    arguments = (running_mean, running_var, weight, bias, True, momentum, eps, num_members, residual, activation)
    ranks = 1 if group is None else group.size
    try:
        namespace = None
        if ranks == 1 and input_gain is None:
            namespace = _one_op(input, running_mean, running_var, residual, momentum, num_members)
        if namespace is not registry.NATIVE:
            check_arguments(input, *arguments, ranks, output_gain)
        if namespace is None:
            return _normalize_then_update(
                input, running, weight, bias, residual, momentum, eps, num_members, activation, group,
                input_gain, output_gain,
            )  # fmt: skip
        x = dense(input)
        y = NormalizeAndUpdate.apply(
            x, contiguous(weight), contiguous(bias), None if residual is None else dense_like(residual, x),
            contiguous(output_gain), (namespace, running, momentum, (True, eps, num_members, activation)),
        )  # fmt: skip
    except (RuntimeError, TypeError, AttributeError):
        check_arguments(input, *arguments, ranks, output_gain)
        raise
    torch.autograd.graph.increment_version([tensor for tensor in running if tensor is not None])
    return y


def _normalize_then_update(
    input, running, weight, bias, residual, momentum, eps, num_members, activation, group, input_gain, output_gain
) -> Tensor:
    """normalize_and_update where no op does both; arguments unchecked."""
    running_mean, running_var, num_batches_tracked = running

    def move(mean: Tensor, var: Tensor) -> None:
        if input.numel() > 0:
            n = input.numel() // mean.numel() * (1 if group is None else group.size)
            update_running(running_mean, mean, momentum)
            update_running(running_var, var * (n / (n - 1)), momentum)
        if num_batches_tracked is not None:
            num_batches_tracked.add_(1)

    return normalize(
        input, running_mean, running_var, weight, bias, residual, True, eps, num_members, activation, group,
        input_gain, output_gain, move,
    )[0]  # fmt: skip


def _one_op(input, running_mean, running_var, residual, momentum, num_members) -> str | None:
    """The namespace whose op can move these running statistics as it normalizes, or None.

    The arguments may be anything (AttributeError); what is not asked here, the op checks.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return None
    statistic = _STATISTIC.get(input.dtype)
    if (
        statistic is None
        or running_mean.dtype is not statistic
        or running_var.dtype is not statistic
        or running_mean is running_var
        or running_mean.requires_grad
        or running_var.requires_grad
        or not running_mean.is_contiguous()
        or not running_var.is_contiguous()
        or type(momentum) not in (float, int)
        or type(num_members) is not int
        or input.numel() == 0
        or (residual is not None and (not isinstance(residual, Tensor) or residual.shape != input.shape))
    ):
        return None
    return registry.namespace_for(input, "ensemble_batch_norm_update")


def update_running(running: Tensor, new: Tensor, momentum: float | Tensor) -> None:
    """running ← (1 − momentum) · running + momentum · new, in place, computed in new's type."""
    new = new.detach()
    if running.dtype == new.dtype:
        running.lerp_(new, momentum)
    else:
        running.copy_(running.to(new.dtype).lerp(new, momentum))
