"""Batch norm as late-phase weights: every member has its own affine weights and running statistics.

    y = activation( (x − mean_k) / √(var_k + eps) · weight_k + bias_k + residual )

Shapes: K members, B rows a member, C channels. Stacked input is [K·B, C, *], member-major.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..ops.checks import check_activation, check_num_members
from ..ops.ensemble_batch_norm import normalize, normalize_and_update, update_running
from ..ops.ensemble_batch_norm_checks import check_arguments
from ..reference.activation import ACTIVATIONS, activate
from ..reference.precision import accumulation_dtype, typed_like, wide
from .member_module import (
    MemberModule,
    carry_over,
    check_mode,
    check_replication,
    member_mean,
    plain_parameter,
    replicate,
    replicate_parameter,
)
from .routed_batch_norm import RoutedBatchNorm

# Modules whose work the op can do as well.
OP_ACTIVATIONS: dict[type, str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
}
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


class _EnsembleBatchNorm(MemberModule, RoutedBatchNorm):
    """Batch norm with statistics and weights of each member's own; see the 1d, 2d and 3d classes.

    In an expanded model the model's training flag, or `members`, says whether the input is stacked or ordinary; this
    layer's own training flag says, as in PyTorch, whether the batch's or the running statistics normalize.
    Standing alone it always takes the stacked batch.

    Args:
        num_features: C.
        num_members: K.
        eps: added to the variance.
        momentum: share of the new batch in the running statistics; None for their cumulative average.
        affine: with weight and bias, [K, C] each.
        track_running_stats: with running_mean, running_var [K, C] and num_batches_tracked [K].
        device, dtype: of parameters and statistics.
        activation: "none", "relu", or without a residual "relu6", "silu" or "hardswish", applied last.

    Raises:
        TypeError, ValueError: num_members or activation does not fit.
    """

    def __init__(
        self,
        num_features: int,
        num_members: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device=None,
        dtype=None,
        *,
        activation: str = "none",
    ):
        where = type(self).__name__
        check_num_members(where, num_members)
        check_activation(where, activation, ACTIVATIONS)
        nn.Module.__init__(self)
        self.num_features, self.num_members, self.eps, self.momentum = num_features, num_members, eps, momentum
        self.affine, self.track_running_stats, self.activation = affine, track_running_stats, activation
        self.plain_type, self.routing = self._plain, None
        shape, options = (num_members, num_features), {"device": device, "dtype": dtype}
        for name in ("weight", "bias"):
            self.register_parameter(name, nn.Parameter(torch.empty(shape, **options)) if affine else None)
        self.register_buffer("running_mean", torch.zeros(shape, **options) if track_running_stats else None)
        self.register_buffer("running_var", torch.ones(shape, **options) if track_running_stats else None)
        tracked = torch.zeros(num_members, dtype=torch.long, device=device) if track_running_stats else None
        self.register_buffer("num_batches_tracked", tracked)
        self.reset_parameters()
        self._mark()

    def extra_repr(self) -> str:
        activation = "" if self.activation == "none" else f", activation={self.activation!r}"
        return f"{super().extra_repr()}{activation}"

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        activation: str | None = None,
        input_gain: tuple[Tensor, Tensor | None] | None = None,
        output_gain: Tensor | None = None,
    ) -> Tensor:
        """Return the activated, normalized input.

        Args:
            input: [K·B, C, *] where members run stacked (K of them, or the chosen ones), [N, C, *] for their average.
            residual: added before the activation; input's shape and type.
            activation: of this call; None for the layer's own.
            input_gain: r [K, C] and shift, [K, C], [C] or None: in place of input, input · r + shift is normalized.
                Only where the batch's statistics normalize (rank1_batch_norm.py).
            output_gain: [K, C], multiplies what the activation gives. Only where members run stacked, without residual.

        Returns:
            input's shape, type and memory format.

        Raises:
            ValueError: a shape does not fit, or one value a channel and member in training.
            NotImplementedError: a dtype, device or layout without kernels.
        """
        self._check_input_dim(input)
        activation = self.activation if activation is None else activation
        members = self.active_members()
        if isinstance(members, str):
            return self._average(input, residual, activation)
        running_mean, running_var = self.running_mean, self.running_var
        weight, bias, tracked = self.weight, self.bias, self.num_batches_tracked
        num_members = len(members)
        if num_members != self.num_members:
            running_mean, running_var, weight, bias, tracked = (
                self._members_of(members, tensor) for tensor in (running_mean, running_var, weight, bias, tracked)
            )
        if self._updates():
            momentum = self._momentum(tracked, input)
            return normalize_and_update(
                input, running_mean, running_var, tracked, weight, bias, residual,
                momentum, self.eps, num_members, activation, self._statistics_ranks(), input_gain, output_gain,
            )  # fmt: skip
        training = self.training or running_mean is None or running_var is None
        if self.training and not self.track_running_stats:
            running_mean = running_var = None
        statistics, affine, group = (running_mean, running_var), (weight, bias), self._statistics_ranks()
        settings = (self.eps, num_members)
        ranks = 1 if group is None else group.size
        check_arguments(input, *statistics, *affine, training, 0.0, *settings, residual, activation, ranks, output_gain)
        return normalize(
            input, *statistics, *affine, residual, training, *settings, activation, group, input_gain, output_gain
        )[0]

    def _updates(self) -> bool:
        return self.training and self.track_running_stats and self.running_mean is not None

    def _momentum(self, tracked: Tensor | None, input: Tensor) -> float | Tensor:
        """Momentum of the coming update: a float, or [K, 1] for the cumulative average."""
        if self.momentum is not None:
            return self.momentum
        if tracked is None:
            return 0.0
        return (tracked + 1).to(accumulation_dtype(input.dtype)).reciprocal().unsqueeze(1)

    def _average(self, input: Tensor, residual: Tensor | None, activation: str) -> Tensor:
        """The average of the members' outputs for an ordinary batch."""
        weight, bias, mean, var = self.averaged("exact")
        if not self.training and mean is not None:
            if bias is None:  # a bias takes what the mean cannot: Σ a_k near 0, a short type
                mean = member_mean(self.running_mean)
                bias = typed_like(-self._offset(mean), mean if weight is None else weight)
            y = F.batch_norm(input, mean, var, weight, bias, False, 0.0, self.eps)
        elif not self._updates():
            y = F.batch_norm(input, None, None, weight, bias, True, 0.0, self.eps)
        else:
            mean, var = torch.zeros_like(self.running_mean[0]), torch.zeros_like(self.running_var[0])
            y = F.batch_norm(input, mean, var, weight, bias, True, 1.0, self.eps)
            momentum, dtype = self._momentum(self.num_batches_tracked, mean), accumulation_dtype(mean.dtype)
            update_running(self.running_mean, mean.to(dtype), momentum)
            update_running(self.running_var, var.to(dtype), momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        if residual is not None:
            y = y + residual
        return activate(y, activation)

    def averaged(self, mode: str = "exact") -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Return weight, bias, running mean and variance, [C] each or None, of the one plain batch norm.

        "exact" (in eval mode the average of the members' outputs), with a_k = γ_k / √(v_k + ε):
            m = mean μ_k,   v = mean v_k,   γ = mean a_k·√(v + ε),   β = mean β_k + mean(a_k · (m − μ_k))
        Without weight, v is chosen so that 1 / √(v + ε) = mean a_k; without weight or bias, m = Σ a_k·μ_k / Σ a_k.
        (Where Σ a_k = 0, or so near that m overflows, a channel without bias cannot hold its shift: m = mean μ_k.)
        While the batch's own statistics normalize, and in mode "weights", each is its mean.
        Sums are float64; identical members give back their own bits.
        """
        weight, bias, mean, var = (
            None if tensor is None else member_mean(tensor)
            for tensor in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        if mode == "exact" and mean is not None and not self.training:
            if weight is None:
                var = self._exact_variance()
            else:
                weight = self._exact_weight(var)
            if weight is None or bias is None:
                mean = self._exact_mean(weight, var)
            else:
                bias = self._exact_bias(mean)
        return weight, bias, mean, var

    def _gains(self) -> Tensor:
        """a_k = γ_k / √(v_k + ε), wide [K, C]; γ_k = 1 without weight."""
        rstd = (wide(self.running_var) + self.eps).rsqrt()
        return rstd if self.weight is None else wide(self.weight) * rstd

    def _exact_weight(self, var: Tensor) -> Tensor:
        """mean a_k·√(v + ε), [C], for the variance var [C]."""
        ratio = ((wide(var) + self.eps) / (wide(self.running_var) + self.eps)).sqrt()  # 1 where members agree
        return typed_like(member_mean(wide(self.weight) * ratio), self.weight)

    def _offset(self, mean: Tensor) -> Tensor:
        """mean(a_k · (μ_k − m)), wide [C], for the running mean m [C]: what a bias subtracts; no −0.0."""
        return (self._gains() * (wide(self.running_mean) - wide(mean))).mean(0) + 0.0

    def _exact_bias(self, mean: Tensor) -> Tensor:
        """mean β_k + mean(a_k · (m − μ_k)), [C], for the running mean m [C]."""
        return typed_like(member_mean(wide(self.bias)) - self._offset(mean), self.bias)

    def _exact_mean(self, weight: Tensor | None, var: Tensor) -> Tensor:
        """Σ a_k·μ_k / Σ a_k, [C]: what gives a norm with this weight and variance the exact offset."""
        mean = member_mean(wide(self.running_mean))
        gain = (wide(var) + self.eps).rsqrt()
        if weight is not None:
            gain = gain * wide(weight.detach())
        offset = self._offset(mean).detach()
        exact = (mean + offset / gain).to(self.running_mean.dtype)
        return typed_like(torch.where(exact.isfinite() & (offset != 0), exact, mean), self.running_mean)

    def _exact_variance(self) -> Tensor:
        """The v [C] with 1 / √(v + ε) = mean 1 / √(v_k + ε)."""
        var = wide(self.running_var)
        ratio = ((var[0] + self.eps) / (var + self.eps)).sqrt()
        exact = (var[0] + self.eps) / member_mean(ratio).square() - self.eps
        return typed_like(torch.where((var == var[0]).all(0), var[0], exact), self.running_var)

    @classmethod
    def from_module(
        cls,
        module: _BatchNorm,
        num_members: int,
        noise_std: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> "_EnsembleBatchNorm":
        """Return num_members copies of a plain batch norm; flags, hooks, types and devices are the module's.

        Args:
            module: of the torch.nn class with the same number of dimensions.
            num_members: K.
            noise_std: σ0, φ_k = φ + σ0 · rms(φ) · ε_k for weight and bias, each.
            generator: of ε.

        Raises:
            TypeError: module is no such batch norm.
            NotImplementedError: it computes more than its class does.
            ValueError: num_members or noise_std does not fit.
        """
        where = f"{cls.__name__}.from_module"
        check_replication(where, num_members, noise_std, generator)
        cls._check_plain(where, module)
        new = cls(
            module.num_features,
            num_members,
            module.eps,
            module.momentum,
            module.affine,
            module.track_running_stats,
            device="meta",
        )
        for name, parameter in module._parameters.items():
            late = None if parameter is None else replicate_parameter(parameter, num_members, noise_std, generator)
            setattr(new, name, late)
        for name in _BUFFERS:
            buffer = getattr(module, name)
            setattr(new, name, None if buffer is None else replicate(buffer, num_members))
        new.plain_type = type(module)
        new._mark()
        carry_over(module, new)
        return new

    @torch.no_grad()
    def collapse(self, mode: str = "exact") -> _BatchNorm:
        """Return the one plain batch norm; mode "exact" for inference, "weights" for further training.

        "exact" computes the average of the members' eval outputs; "weights" averages every tensor.
        Identical members give back their own bits.

        Raises:
            ValueError: an unknown mode.
        """
        check_mode(mode)
        training, self.training = self.training, False
        try:
            weight, bias, mean, var = self.averaged(mode)
        finally:
            self.training = training
        plain = self._plain(
            self.num_features, self.eps, self.momentum, self.affine, self.track_running_stats, device="meta"
        )
        plain.weight = None if weight is None else plain_parameter(weight, self.weight)
        plain.bias = None if bias is None else plain_parameter(bias, self.bias)
        plain.running_mean, plain.running_var = mean, var
        plain.num_batches_tracked = None if self.num_batches_tracked is None else self.num_batches_tracked.amax(0)
        return self._to_plain_type(plain)


def _documented(shape: str) -> str:
    return (_EnsembleBatchNorm.__doc__ or "").replace("; see the 1d, 2d and 3d classes", shape)


class EnsembleBatchNorm1d(_EnsembleBatchNorm):
    __doc__ = _documented(" over [K·B, C] or [K·B, C, L]")
    _plain = nn.BatchNorm1d
    _check_input_dim = nn.BatchNorm1d._check_input_dim


class EnsembleBatchNorm2d(_EnsembleBatchNorm):
    __doc__ = _documented(" over [K·B, C, H, W]")
    _plain = nn.BatchNorm2d
    _check_input_dim = nn.BatchNorm2d._check_input_dim


class EnsembleBatchNorm3d(_EnsembleBatchNorm):
    __doc__ = _documented(" over [K·B, C, D, H, W]")
    _plain = nn.BatchNorm3d
    _check_input_dim = nn.BatchNorm3d._check_input_dim
