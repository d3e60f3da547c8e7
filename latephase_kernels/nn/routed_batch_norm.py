"""What the batch norms of an expanded model have in common, whether their weights are late-phase weights or shared."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..ops.ensemble_batch_norm_synchronized import StatisticsGroup
from .member_module import check_plain
from .routing import Routed


class RoutedBatchNorm(Routed, _BatchNorm):
    """A batch norm that normalizes each member by itself."""

    _plain: type  # the torch.nn class of the same number of dimensions
    statistics_group: StatisticsGroup | None = None  # the ranks whose rows count in training; None: own rows alone

    def _statistics_ranks(self) -> StatisticsGroup | None:
        return self.statistics_group

    @classmethod
    def _check_plain(cls, where: str, module: nn.Module) -> None:
        check_plain(where, module, cls._plain)

    def reset_running_stats(self) -> None:
        """Reset the statistics of all members.

        Raises:
            RuntimeError: some members run alone, as where torch.optim.swa_utils.update_bn is called for each of them.
        """
        chosen = None if self.routing is None else self.routing.override
        if isinstance(chosen, range) and len(chosen) < self.num_members:
            raise RuntimeError(
                "reset_running_stats: it is of all members, and lp.members runs some of them alone here; call it "
                "outside, or lp.update_bn(loader, model, turns=True)"
            )
        super().reset_running_stats()
