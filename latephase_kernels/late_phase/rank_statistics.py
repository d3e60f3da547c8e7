"""Running statistics of batch norms in several ranks: whose rows count, and the average over ranks.

Where each rank normalizes by its own rows, its running statistics are its own, too. They move linearly, so that their
mean over ranks is right whenever it is taken: when somebody looks, and not at every step.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..nn.batch_norm import _EnsembleBatchNorm
from ..nn.routed_batch_norm import RoutedBatchNorm
from ..nn.shared_batch_norm import _SharedBatchNorm
from ..nn.sync_batch_norm import _SyncBatchNorm
from ..ops.ensemble_batch_norm_synchronized import StatisticsGroup
from ..reference.precision import widest_dtype
from .convert import replace_modules
from .targets import SHARED_TYPES, build


def replace_plain(model: nn.Module) -> None:
    """Replace plain batch norms by twins with the same Parameter and buffer objects, which can be synchronized."""
    replace_modules(
        model,
        {
            module: build(name, module, SHARED_TYPES, 1)
            for name, module in model.named_modules()
            if isinstance(module, _BatchNorm) and not isinstance(module, RoutedBatchNorm)
        },
    )


def plain_again(model: nn.Module) -> None:
    """Put back the batch norms that `replace_plain` replaced."""
    replace_modules(
        model,
        {
            module: module.collapse()
            for module in model.modules()
            if isinstance(module, _SharedBatchNorm) and module.routing is None
        },
    )


def set_statistics_group(model: nn.Module, group: StatisticsGroup, synchronized: bool) -> None:
    """Say whose rows count in batch norms: group's; unless synchronized, only in those that were nn.SyncBatchNorm."""
    for module in model.modules():
        if isinstance(module, RoutedBatchNorm) and (synchronized or isinstance(module, _SyncBatchNorm)):
            module.statistics_group = group


def own_statistics(model: nn.Module, synchronized: bool, member_ranks: int) -> Iterator[tuple[str, Tensor, bool]]:
    """Yield (name, running mean or variance, whether it has a dimension of members) where ranks have their own.

    Args:
        model: plain, or with this rank's members.
        synchronized: over the ranks that share the rows of a member.
        member_ranks: how many divide the members among them; 1 before expansion.
    """
    for prefix, module in model.named_modules():
        if not isinstance(module, _BatchNorm) or module.running_mean is None:
            continue
        replicated = isinstance(module, _EnsembleBatchNorm)
        if not synchronized or (member_ranks > 1 and not replicated):
            for name in ("running_mean", "running_var"):
                yield f"{prefix}.{name}".lstrip("."), getattr(module, name), replicated


@torch.no_grad()
def mean_over_ranks(tensors: list[Tensor], group: "dist.ProcessGroup | None") -> list[Tensor]:
    """Return the mean over the ranks of group of each tensor, in its type, summed in widest_dtype, by one message."""
    ranks = dist.get_world_size(group)
    if not tensors or ranks == 1:
        return list(tensors)
    flat = torch.cat([tensor.detach().reshape(-1).to(widest_dtype(tensor.device)) for tensor in tensors])
    dist.all_reduce(flat, group=group)
    parts = (flat / ranks).split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, tensors)]
