"""Ensemble batch norm whose statistics are those of every rank of a process group: the two halves, with sums between.

    forward     statistics of own rows → all-gather (of many ranks: two all-reduces) → Chan's merge → apply
    backward    own Σ dz, Σ dz·x̂ → all-reduce → apply, with the count of all ranks

Shapes: K members, C channels, R ranks; every rank holds the same number n of values a member and channel.
Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from ..reference import ensemble_batch_norm as reference
from . import registry
from .ensemble_batch_norm_autograd import affine_grad, through_gain
from .layout import contiguous, dense, dense_like

MOST_GATHERED = 16  # ranks: one gathering is sooner done than two reductions, but grows with the ranks


class StatisticsGroup:
    """The ranks that share the statistics of a batch norm.

    A process group can be neither copied nor pickled, the models that refer to it can be: a copy refers to the same
    ranks, and a pickled model forgets them.

    Args:
        group: of torch.distributed; None: the default group.
        alone: this rank by itself, whatever the group.
    """

    def __init__(self, group: "dist.ProcessGroup | None" = None, *, alone: bool = False):
        self.group = group
        self.size = 1 if alone else dist.get_world_size(group)  # R

    def __deepcopy__(self, memo: dict) -> "StatisticsGroup":
        return self

    def __reduce__(self) -> tuple:
        return type(None), ()


def gather_ranks(own: Tensor, ranks: int, group: "dist.ProcessGroup | None") -> Tensor:
    """Return every rank's tensor [n], as [ranks, n]."""
    gathered = own.new_empty(ranks, own.numel())
    dist.all_gather(list(gathered.unbind()), own, group=group)
    return gathered


def _merged(mean: Tensor, var: Tensor, n: int, group: StatisticsGroup) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance [K, C] over all ranks from those of each; the same bits on every rank.

    Raises:
        ValueError: the ranks hold different numbers of values (a CUDA device asserts it instead, without a wait).
    """
    count = mean.new_tensor([n % 1024])  # so that sums of many are exact
    if group.size <= MOST_GATHERED:
        gathered = gather_ranks(torch.cat([mean.flatten(), var.flatten(), count]), group.size, group.group)
        _check_counts(gathered[:, -1], count)
        means, variances = gathered[:, :-1].unflatten(1, (2, *mean.shape)).unbind(1)  # [R, K, C] each
        merged = means.mean(0)
        return merged, variances.mean(0) + (means - merged).square().mean(0)
    sums = torch.cat([mean.flatten(), count])
    dist.all_reduce(sums, group=group.group)
    sums /= group.size
    _check_counts(sums[-1:], count)
    merged = sums[:-1].view_as(mean)
    deviations = var + (mean - merged).square()
    dist.all_reduce(deviations, group=group.group)
    return merged, deviations / group.size


def _check_counts(counts: Tensor, own: Tensor) -> None:
    same = (counts == own).all()
    if same.is_cuda:
        torch._assert_async(same, "ensemble_batch_norm: every rank must hold the same number of rows")
    elif not same:
        raise ValueError(
            "ensemble_batch_norm: every rank must hold the same number of rows where statistics are synchronized, got "
            f"{counts.tolist()} values a channel (modulo 1024), here {own.item()}; drop what leaves them uneven"
        )


class _SynchronizedBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, namespace, group, input, weight, bias, residual, output_gain, eps, num_members, activation, move):
        with torch._C._AutoDispatchBelowAutograd():
            mean, var = registry.op(namespace, "ensemble_batch_norm_statistics")(input, num_members)
            n = input.numel() // mean.numel()
            mean, var = _merged(mean, var, n, group)
            if move is not None:
                move(mean, var)
            rstd = (var + eps).rsqrt()
            y, mask = registry.op(namespace, "ensemble_batch_norm_apply")(
                input, mean, rstd, weight, bias, residual, num_members, activation, output_gain
            )
        ctx.save_for_backward(input, mean, rstd, weight, bias, mask, output_gain)
        ctx.settings, ctx.namespace, ctx.group, ctx.count = (num_members, activation), namespace, group, n * group.size
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, *_):
        *saved, output_gain = ctx.saved_tensors
        input, _, _, weight, bias, _ = saved
        dy = dense_like(dy, input)
        saved = (dy, *saved)
        reduce = registry.op(ctx.namespace, "ensemble_batch_norm_backward_reduce")
        dbias, dweight = reduce(*saved, *ctx.settings)  # of own rows: the gradients' own reduction adds up the ranks'
        sums = torch.stack([dbias, dweight])
        dist.all_reduce(sums, group=ctx.group.group)
        needs_residual = ctx.needs_input_grad[5]
        write_dresidual = needs_residual and ctx.settings[1] != "none"
        apply = registry.op(ctx.namespace, "ensemble_batch_norm_backward_apply")
        dx, dresidual = apply(*saved, sums[0], sums[1], float(ctx.count), *ctx.settings, write_dresidual, output_gain)
        dgain = None
        if output_gain is not None:
            dgain, dweight, dbias = through_gain(output_gain, weight, bias, dweight, dbias)
        dweight = None if weight is None else affine_grad(dweight, weight)
        dbias = None if bias is None else affine_grad(dbias, bias)
        dresidual = (dresidual if write_dresidual else dy) if needs_residual else None
        return None, None, dx, dweight, dbias, dresidual, dgain, *(None,) * 4


class _SumOverRanks(torch.autograd.Function):
    """Σ over ranks, whose gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=group.group)
        return x

    @staticmethod
    def backward(ctx, dx):
        return _SumOverRanks.apply(dx, ctx.group), None


def _reference(
    input, weight, bias, residual, eps, num_members, activation, group, output_gain, move
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in plain PyTorch, for what has no kernel here."""
    own_mean, own_var = reference.statistics(input, num_members)
    mean = _SumOverRanks.apply(own_mean, group) / group.size
    var = _SumOverRanks.apply(own_var + (own_mean - mean).square(), group) / group.size
    return reference.ensemble_batch_norm(
        input, mean, var, weight, bias, residual, False, eps, num_members, activation, output_gain, move
    )


@torch._disable_dynamo  # torch.compiler.disable imports torch._dynamo, and that Triton, with this module
def normalize_synchronized(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    num_members: int,
    activation: str,
    group: StatisticsGroup,
    output_gain: Tensor | None = None,
    move: Callable[[Tensor, Tensor], None] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y, mean [K, C], biased variance [K, C]) by the statistics of all ranks' rows; arguments unchecked.

    move is called with mean and variance, detached, before they normalize.

    Every rank of the group calls this, and the backward pass, in the same order. A compiled graph breaks here.
    Gradients of weight and bias are those of own rows, as of every other parameter.

    Cost:
        Up to 16 ranks: R·(2·K·C + 1) values gathered forward, 2·K·C reduced backward; more ranks: K·C reduced twice
        forward.
    """
    namespace = registry.namespace_for(input, "ensemble_batch_norm")
    settings = (eps, num_members, activation)
    if namespace is None:
        return _reference(input, weight, bias, residual, *settings, group, output_gain, move)
    input = dense(input)
    if residual is not None:
        residual = dense_like(residual, input)
    weight, bias, output_gain = contiguous(weight), contiguous(bias), contiguous(output_gain)
    return _SynchronizedBatchNorm.apply(namespace, group, input, weight, bias, residual, output_gain, *settings, move)
