"""Batch norm with one set of weights for all members, that still normalizes each member by itself.

Shapes: K members, B rows a member, C channels. Stacked input is [K·B, C, *], member-major.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..ops.checks import check_num_members
from ..ops.ensemble_batch_norm import normalize, update_running
from ..ops.ensemble_batch_norm_checks import check_arguments
from ..reference.activation import activate
from .member_module import check_mode, twin
from .routed_batch_norm import RoutedBatchNorm


class _SharedBatchNorm(RoutedBatchNorm):
    """Batch norm with one [C] weight, bias and running statistics, that normalizes each member by itself.

    For the batch norms of an expanded model that are not late-phase weights: in a stacked pass members must not mix.
    The running statistics move as in a loop over the members. All else is the plain batch norm.
    """

    @classmethod
    def from_module(cls, module: _BatchNorm, num_members: int) -> "_SharedBatchNorm":
        """Return the module's twin: the same Parameter and buffer objects.

        Args:
            module: of the torch.nn class with the same number of dimensions.
            num_members: K.

        Raises:
            TypeError: module is no such batch norm, or num_members no int.
            NotImplementedError: it computes more than its class does.
            ValueError: num_members is below 1.
        """
        check_num_members(f"{cls.__name__}.from_module", num_members)
        cls._check_plain(f"{cls.__name__}.from_module", module)
        new = twin(module, cls)
        new.num_members, new.routing, new.plain_type = num_members, None, type(module)
        return new

    def collapse(self, mode: str = "exact") -> _BatchNorm:
        """Return the plain batch norm: the same Parameter and buffer objects, in every mode.

        Raises:
            ValueError: an unknown mode.
        """
        check_mode(mode)
        return twin(self, self.plain_type)

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        activation: str = "none",
        input_gain: tuple[Tensor, Tensor | None] | None = None,
        output_gain: Tensor | None = None,
    ) -> Tensor:
        """Return the activated, normalized input.

        Args:
            input: [K·B, C, *], or [N, C, *] where the model averages.
            residual: added before the activation; input's shape and type.
            activation: "none", "relu", or without a residual "relu6", "silu" or "hardswish".
            input_gain: as in EnsembleBatchNorm.
            output_gain: as in EnsembleBatchNorm.

        Raises:
            ValueError: a shape does not fit, or one value a channel and member in training.
        """
        members = self.active_members()
        if isinstance(members, str):
            y = super().forward(input)
            y = y if residual is None else y + residual
            return activate(y, activation)
        self._check_input_dim(input)
        statistics, num_members, group = (None, None), len(members), self._statistics_ranks()
        training = self.training or self.running_mean is None or self.running_var is None
        if not training:  # all members' rows alike, by the one set of running statistics, but for their gains
            num_members = 1 if output_gain is None else num_members
            statistics = tuple(t.expand(num_members, -1) for t in (self.running_mean, self.running_var))
        arguments = (input, *statistics, self.weight, self.bias)
        ranks = 1 if group is None else group.size
        check_arguments(*arguments, training, 0.1, self.eps, num_members, residual, activation, ranks, output_gain)
        settings = (training, self.eps, num_members, activation, group, input_gain, output_gain)

        def move(mean: Tensor, var: Tensor) -> None:
            n = input.numel() // mean.numel() * ranks
            self._update(mean, var * (n / (n - 1)), members)

        moves = self.training and self.track_running_stats and self.running_mean is not None and input.numel() > 0
        return normalize(*arguments, residual, *settings, move if moves else None)[0]

    def _owned(self) -> tuple[int, int, int]:
        """Return the first member of this rank, how many it has, and how many members there are in all."""
        routing = self.routing
        if routing is None:
            return 0, self.num_members, self.num_members
        return routing.first_member, routing.num_members, routing.total_members

    def _update(self, mean: Tensor, var: Tensor, members: range) -> None:
        """Move the running statistics by the members' [K, C], as K steps one after the other would.

        Where each of R ranks has K/R members, every rank decays its statistics for all K turns and adds its own
        members' R-fold: the *mean over ranks* is then what the loop would have. It is taken when somebody looks.
        """
        first, owned, total = self._owned()
        ranks, num_members = total // owned, len(members)
        if self.momentum is None:
            counted = num_members * ranks
            momentum = counted / (self.num_batches_tracked + counted).to(mean.dtype)
            update_running(self.running_mean, mean.mean(0), momentum)
            update_running(self.running_var, var.mean(0), momentum)
        else:
            before = first if members.start == 0 else 0  # turns of other ranks' members, before the first chunk of ours
            after = total - first - owned if members.stop == owned else 0  # and after the last
            keep = 1.0 - self.momentum
            steps_left = torch.arange(num_members - 1, -1, -1, dtype=mean.dtype, device=mean.device).unsqueeze(1)
            shares = ranks * self.momentum * keep ** (steps_left + after)  # [K, 1], of Σ_k m (1 − m)^(K−1−k) x_k
            for running, new in ((self.running_mean, mean), (self.running_var, var)):
                decayed = running.to(mean.dtype) * keep ** (before + num_members + after)
                running.copy_(decayed + (shares * new).sum(0))
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(num_members * ranks)


class SharedBatchNorm1d(_SharedBatchNorm):
    """Batch norm over [K·B, C] or [K·B, C, L] with one set of weights that normalizes each member by itself.

    Made by from_module.

    Args:
        module: of from_module: the nn.BatchNorm1d whose weights and statistics [C] it shares.
        num_members: of from_module: K.
    """

    _plain = nn.BatchNorm1d
    _check_input_dim = nn.BatchNorm1d._check_input_dim


class SharedBatchNorm2d(_SharedBatchNorm):
    """Batch norm over [K·B, C, H, W] with one set of weights that normalizes each member by itself.

    Made by from_module.

    Args:
        module: of from_module: the nn.BatchNorm2d whose weights and statistics [C] it shares.
        num_members: of from_module: K.
    """

    _plain = nn.BatchNorm2d
    _check_input_dim = nn.BatchNorm2d._check_input_dim


class SharedBatchNorm3d(_SharedBatchNorm):
    """Batch norm over [K·B, C, D, H, W] with one set of weights that normalizes each member by itself.

    Made by from_module.

    Args:
        module: of from_module: the nn.BatchNorm3d whose weights and statistics [C] it shares.
        num_members: of from_module: K.
    """

    _plain = nn.BatchNorm3d
    _check_input_dim = nn.BatchNorm3d._check_input_dim
