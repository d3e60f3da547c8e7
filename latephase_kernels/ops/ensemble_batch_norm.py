"""Ensemble batch norm: batch norm with statistics and affine weights of each member's own.

    y = activation( (x − mean_k) · rstd_k · weight_k + bias_k + residual ),   rstd_k = 1 / √(var_k + eps)

Shapes: K members, B rows a member, C channels, S = product of the spatial sizes, n = B·S values a statistic.
Row i of input [K·B, C, *] belongs to member k = i // B. Per-member tensors are [K, C].

Registered ops, the same in both namespaces (`registry.py`); their tensors are dense, contiguous or channels_last:

    ensemble_batch_norm           the whole forward                ensemble_batch_norm_backward   the whole backward
    …_statistics  →  …_apply      its two halves                   …_backward_reduce  →  …_backward_apply
    …_update                      the forward in training, which moves the running statistics as well

The halves exist for statistics that are synchronized over processes between them (ensemble_batch_norm_synchronized.py).
Only …_update changes an argument: eager training calls it, so that running statistics take no launch of their own;
compiled graphs are functional.
"""

import torch
from torch import Tensor

from .. import backend as _backend
from ..reference import ensemble_batch_norm as reference
from . import registry
from .double_backward import aliases
from .ensemble_batch_norm_checks import check_arguments
from .ensemble_batch_norm_synchronized import StatisticsGroup, normalize_synchronized
from .layout import dense, dense_like

# ---------------------------------------------------------------------------------------------- layout


def _rows_of_channels(input: Tensor) -> bool:
    """Whether a run of memory holds the channels of one position, rather than the positions of one channel."""
    return input.shape[2:].numel() == 1 or not input.is_contiguous()


def mask_shape(input: Tensor, residual: Tensor | None, activation: str) -> list[int]:
    """Shape of the packed ReLU mask, [rows, ⌈columns / 8⌉]: a row is the run of memory that shares its first byte.

    Contiguous input with S > 1: rows = K·B·C, columns = S. Otherwise rows = K·B·S, columns = C.
    Bit j % 8 of byte j // 8 says whether column j passed the ReLU. [0] where no mask is needed.
    """
    if residual is None or activation == "none":
        return [0]
    columns = input.size(1) if _rows_of_channels(input) else input.shape[2:].numel()
    return [input.numel() // columns if columns else 0, (columns + 7) // 8]


# ---------------------------------------------------------------------------------------------- schemas and fakes


def _statistic(input: Tensor, num_members: int) -> Tensor:
    return input.new_empty((num_members, input.size(1)), dtype=reference.accumulation_dtype(input.dtype))


def _fake_statistics(input, num_members):
    return _statistic(input, num_members), _statistic(input, num_members)


def _fake_apply(input, mean, rstd, weight, bias, residual, num_members, activation):
    mask = input.new_empty(mask_shape(input, residual, activation), dtype=torch.uint8)
    return torch.empty_like(input), mask


def _fake_forward(input, running_mean, running_var, weight, bias, residual, training, eps, num_members, activation):
    y, mask = _fake_apply(input, None, None, weight, bias, residual, num_members, activation)
    return y, *(_statistic(input, num_members) for _ in range(3)), mask


def _fake_update(
    input,
    running_mean,
    running_var,
    num_batches_tracked,
    weight,
    bias,
    residual,
    momentum,
    eps,
    num_members,
    activation,
):
    return _fake_forward(input, None, None, weight, bias, residual, True, eps, num_members, activation)


def _fake_backward_reduce(dy, input, mean, rstd, weight, bias, mask, num_members, activation):
    return _fake_statistics(input, num_members)


def _fake_backward_apply(
    dy, input, mean, rstd, weight, bias, mask, sum_dz, sum_dz_xhat, count, num_members, activation, residual_grad
):
    return torch.empty_like(input), torch.empty_like(input) if residual_grad else input.new_empty([0])


def _fake_backward(dy, input, mean, rstd, weight, bias, mask, training, num_members, activation, residual_grad):
    dresidual = torch.empty_like(input) if residual_grad else input.new_empty([0])
    return torch.empty_like(input), *_fake_statistics(input, num_members), dresidual


_SAVED = "Tensor dy, Tensor input, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, Tensor mask"

for _name, _schema, _fake in (
    (
        "ensemble_batch_norm",
        "(Tensor input, Tensor? running_mean, Tensor? running_var, Tensor? weight, Tensor? bias, Tensor? residual, "
        "bool training, float eps, int num_members, str activation) "
        "-> (Tensor y, Tensor mean, Tensor rstd, Tensor var, Tensor mask)",
        _fake_forward,
    ),
    (
        "ensemble_batch_norm_update",
        "(Tensor input, Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!)? num_batches_tracked, "
        "Tensor? weight, Tensor? bias, Tensor? residual, float momentum, float eps, int num_members, str activation) "
        "-> (Tensor y, Tensor mean, Tensor rstd, Tensor var, Tensor mask)",
        _fake_update,
    ),
    (
        "ensemble_batch_norm_backward",
        f"({_SAVED}, bool training, int num_members, str activation, bool residual_grad) "
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
        "str activation) -> (Tensor y, Tensor mask)",
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
        "bool residual_grad) -> (Tensor dx, Tensor dresidual)",
        _fake_backward_apply,
    ),
):
    registry.define(_name, _schema, _fake, op_file="ensemble_batch_norm")

# ---------------------------------------------------------------------------------------------- autograd


def _affine_grad(grad: Tensor, parameter: Tensor | None, needed: bool) -> Tensor | None:
    """Turn a [K, C] sum into the gradient of a [K, C] or shared [C] parameter, or None."""
    if parameter is None or not needed:
        return None
    return (grad if parameter.dim() == 2 else grad.sum(0)).to(parameter.dtype)


def _gradients(ctx, namespace: str, dy: Tensor) -> tuple:
    """Return the gradients of (input, weight, bias, residual) for the context that _save filled."""
    input, weight, bias, mean, rstd, mask = ctx.saved_tensors
    needs_input, needs_weight, needs_bias, needs_residual = ctx.needs
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (dy, input, weight, bias)):
        return _differentiable_gradients(ctx, dy)
    dy = dense_like(dy, input)
    write_dresidual = needs_residual and ctx.activation != "none"
    dx, dweight, dbias, dresidual = registry.op(namespace, "ensemble_batch_norm_backward")(
        dy, input, mean, rstd, weight, bias, mask, ctx.training, ctx.num_members, ctx.activation, write_dresidual
    )
    return (
        dx if needs_input else None,
        _affine_grad(dweight, weight, needs_weight),
        _affine_grad(dbias, bias, needs_bias),
        (dresidual if write_dresidual else dy) if needs_residual else None,
    )


def _differentiable_gradients(ctx, dy: Tensor) -> tuple:
    """The same gradients by the reference formula, so that they can be differentiated again."""
    input, weight, bias, mean, rstd, mask = aliases(ctx.saved_tensors)
    running_var = None if ctx.training else rstd.double().pow(-2).to(rstd.dtype) - ctx.eps
    y, _, _ = reference.ensemble_batch_norm(
        input, mean, running_var, weight, bias, None, ctx.training, ctx.eps, ctx.num_members, "none"
    )
    if mask.numel():
        passed = _unpack_mask(mask, input)
    else:
        passed = ~(y.detach() <= 0) if ctx.activation == "relu" else torch.ones_like(dy, dtype=torch.bool)
    dz = dy * passed
    inputs = [t if t is not None and needed else None for t, needed in zip((input, weight, bias), ctx.needs[:3])]
    found = (
        iter(torch.autograd.grad(y, [t for t in inputs if t is not None], dz, create_graph=True))
        if any(t is not None for t in inputs)
        else iter(())
    )
    return (*(None if t is None else next(found) for t in inputs), dz if ctx.needs[3] else None)


def _unpack_mask(mask: Tensor, input: Tensor) -> Tensor:
    """Return the packed ReLU mask as booleans in input's shape."""
    bits = (mask.unsqueeze(-1) >> torch.arange(8, device=mask.device, dtype=torch.uint8)) & 1
    if _rows_of_channels(input):
        return bits.flatten(1)[:, : input.size(1)].reshape(input.movedim(1, -1).shape).movedim(-1, 1).bool()
    return bits.flatten(1)[:, : input.shape[2:].numel()].reshape(input.shape).bool()


def _save(ctx, input, weight, bias, mean, rstd, mask, residual, training, eps, num_members, activation):
    ctx.save_for_backward(input, weight, bias, mean, rstd, mask)
    ctx.training, ctx.eps, ctx.num_members, ctx.activation = training, eps, num_members, activation
    ctx.needs = tuple(t is not None and t.requires_grad for t in (input, weight, bias, residual))
    ctx.set_materialize_grads(False)


class _EnsembleBatchNorm(torch.autograd.Function):
    """The eager path: less overhead a call than the registered op's generated autograd."""

    @staticmethod
    def forward(
        ctx, namespace, input, running_mean, running_var, weight, bias, residual,
        training, eps, num_members, activation, momentum=None, num_batches_tracked=None,
    ):  # fmt: skip
        """With a momentum, the running statistics move in the same call."""
        with torch._C._AutoDispatchBelowAutograd():
            if momentum is None:
                y, mean, rstd, var, mask = registry.op(namespace, "ensemble_batch_norm")(
                    input, running_mean, running_var, weight, bias, residual, training, eps, num_members, activation
                )
            else:
                y, mean, rstd, var, mask = registry.op(namespace, "ensemble_batch_norm_update")(
                    input, running_mean, running_var, num_batches_tracked, weight, bias, residual,
                    momentum, eps, num_members, activation,
                )  # fmt: skip
        _save(ctx, input, weight, bias, mean, rstd, mask, residual, training, eps, num_members, activation)
        ctx.namespace = namespace
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx, dy, *_):
        if dy is None:
            return (None,) * 13
        dx, dweight, dbias, dresidual = _gradients(ctx, ctx.namespace, dy)
        return None, dx, None, None, dweight, dbias, dresidual, *(None,) * 6


def _setup_context(ctx, inputs, output):
    input, _, _, weight, bias, residual, training, eps, num_members, activation = inputs
    _, mean, rstd, var, mask = output
    ctx.mark_non_differentiable(mean, rstd, var, mask)
    _save(ctx, input, weight, bias, mean, rstd, mask, residual, training, eps, num_members, activation)


def _backward(namespace, ctx, dy, *_):
    if dy is None:
        return (None,) * 10
    dx, dweight, dbias, dresidual = _gradients(ctx, namespace, dy)
    return dx, None, None, dweight, dbias, dresidual, None, None, None, None


registry.register_autograd("ensemble_batch_norm", _backward, _setup_context)

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
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y, mean [K, C], biased variance [K, C]) without touching the running statistics; arguments unchecked."""
    if training and group is not None and group.size > 1:
        return normalize_synchronized(input, weight, bias, residual, eps, num_members, activation, group)
    arguments = (running_mean, running_var, weight, bias)
    backend = _backend.backend_for(input)
    if backend == "reference" or torch._C._are_functorch_transforms_active():
        return reference.ensemble_batch_norm(input, *arguments, residual, training, eps, num_members, activation)
    input = dense(input)
    if residual is not None:
        residual = dense_like(residual, input)
    namespace = registry.NATIVE if backend == "native" else registry.TRITON
    settings = (training, eps, num_members, activation)
    if torch.compiler.is_compiling():
        y, mean, _, var, _ = registry.op(namespace, "ensemble_batch_norm")(input, *arguments, residual, *settings)
        return y, mean, var
    return _EnsembleBatchNorm.apply(namespace, input, *arguments, residual, *settings)


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
    group: StatisticsGroup | None = None,
) -> Tensor:
    """Normalize each member's rows by their own statistics; equals `F.batch_norm` on each member's slice.

        y = activation( (x − mean_k) / √(var_k + eps) · weight_k + bias_k + residual )

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
        activation: "none" or "relu" (NaN passes through).
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
    )
    settings = (eps, num_members, activation, group)
    if training and running_mean is not None and running_var is not None:
        return normalize_and_update(input, running_mean, running_var, None, weight, bias, residual, momentum, *settings)
    return normalize(input, running_mean, running_var, weight, bias, residual, training, *settings)[0]


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
) -> Tensor:
    """Return y by the batch's statistics and move the running ones, in one kernel where it can; arguments unchecked."""
    backend = _backend.backend_for(input, "ensemble_batch_norm_update")
    running = (running_mean, running_var)
    ranks = 1 if group is None else group.size
    if ranks == 1 and _is_one_kernel(backend, input, running, momentum):
        input = dense(input)
        if residual is not None:
            residual = dense_like(residual, input)
        y, _, _ = _EnsembleBatchNorm.apply(
            registry.NATIVE if backend == "native" else registry.TRITON,
            input, *running, weight, bias, residual, True, eps, num_members, activation, momentum, num_batches_tracked,
        )  # fmt: skip
        changed = running if num_batches_tracked is None else (*running, num_batches_tracked)
        torch.autograd.graph.increment_version(changed)
        return y
    y, mean, var = normalize(input, *running, weight, bias, residual, True, eps, num_members, activation, group)
    if input.numel() > 0:
        n = input.numel() // mean.numel() * ranks
        update_running(running_mean, mean, momentum)
        update_running(running_var, var * (n / (n - 1)), momentum)
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    return y


def _is_one_kernel(backend: str, input: Tensor, running: tuple[Tensor, Tensor], momentum: float | Tensor) -> bool:
    """Whether the kernel that normalizes can move these running statistics as well."""
    if backend == "reference" or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    dtype = reference.accumulation_dtype(input.dtype)
    return (
        not isinstance(momentum, Tensor)
        and input.numel() > 0
        and all(statistic.dtype == dtype and statistic.is_contiguous() for statistic in running)
    )


def update_running(running: Tensor, new: Tensor, momentum: float | Tensor) -> None:
    """running ← (1 − momentum) · running + momentum · new, in place, computed in new's type."""
    new = new.detach()
    if running.dtype == new.dtype:
        running.lerp_(new, momentum)
    else:
        running.copy_(running.to(new.dtype).lerp(new, momentum))
