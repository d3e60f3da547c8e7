"""Rank-1 late-phase weights: every member multiplies a shared weight by gains of its own.

    y_k = ((x_k ∘ input_gain_k) · weightᵀ) ∘ output_gain_k + bias,   that is   W_k = weight ∘ (r_k s_kᵀ)

Symbols: s = input_gain, r = output_gain. weight is a base weight, as in the plain layer; so is bias, unless each member
has its own (member_bias), as in BatchEnsemble.
Shapes: K members, B rows a member. Stacked input is [K·B, …], member-major: dim 0 must be the batch.

Source: Wen et al., ICLR 2020 (BatchEnsemble); von Oswald et al., ICLR 2021, section 2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.checks import check_num_members
from ..ops.member_gain import member_gain
from ..ops.rank1_linear import rank1_linear
from ..reference.precision import typed_like, wide
from .member_module import (
    MemberModule,
    check_mode,
    check_plain,
    check_replication,
    check_rows,
    member_mean,
    plain_parameter,
    replicate_parameter,
    twin,
)

_GAINS = ("input_gain", "output_gain")


class _Rank1(MemberModule):
    """What the layers have in common; it comes before torch.nn's class in the order of methods."""

    _plain: type
    _channel_dim: int
    _min_dim: int
    _input_shape: str

    def _add_members(
        self, num_members: int, noise_std: float, generator: torch.Generator | None, member_bias: bool
    ) -> None:
        """Add the gains to a plain layer's tensors, and give each member its own bias if member_bias."""
        self.num_members, self.routing = num_members, None
        for name, size in zip(_GAINS, self._gain_sizes()):
            gain = replicate_parameter(self.weight.new_ones(size), num_members, noise_std, generator)
            self.register_parameter(name, gain.requires_grad_())
        bias = self._parameters["bias"]
        if member_bias and bias is not None:
            self.register_parameter("bias", replicate_parameter(bias, num_members, noise_std, generator))
        self._mark()

    @property
    def member_bias(self) -> bool:
        """Whether there is a bias of each member's own, [K, out]."""
        return self.bias is not None and self.bias.dim() > 1

    @property
    def shared_names(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset(("weight",) if self.member_bias else ("weight", "bias"))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}{', member_bias=True' if self.member_bias else ''}"

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw weight and bias as the plain layer does, the bias of all members alike; gains become 1."""
        super().reset_parameters()  # type: ignore[misc]
        for name in _GAINS:
            if name in self._parameters:  # not yet in torch.nn's constructor
                nn.init.ones_(self._parameters[name])
        if self.member_bias:
            self.bias.copy_(self.bias[0].clone())

    def _gain_sizes(self) -> tuple[int, int]:
        """Inputs and outputs."""
        raise NotImplementedError

    def _apply_weight(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The plain layer with this weight and bias."""
        raise NotImplementedError

    def _apply_gains(
        self, input: Tensor, input_gain: Tensor | None, output_gain: Tensor, bias: Tensor | None
    ) -> Tensor:
        """The layer of a stacked input, with gains [K, in] (None: 1) and [K, out], and the bias, of its members."""
        raise NotImplementedError

    def forward(self, input: Tensor, multiplied: bool = False) -> Tensor:
        """Return the layer of input: [K·B, …] stacked, or [N, …] or […] by the exact average of the members' weights.

        Args:
            input: of the shape above.
            multiplied: it is stacked, and multiplied by input_gain already.

        Raises:
            ValueError: input's shape does not fit, or its rows are not the same number for each member.
            NotImplementedError: a dtype without kernels; a nested tensor, stacked.
        """
        members = self.active_members()
        self._check(input, stacked=not isinstance(members, str))
        if isinstance(members, str):
            return self._apply_weight(input, *self.averaged())
        check_rows(type(self).__name__, input, len(members))
        input_gain, output_gain, bias = self._gains_and_bias(members)
        return self._apply_gains(input, None if multiplied else input_gain, output_gain, bias)

    def without_output_gain(
        self, input: Tensor, multiplied: bool = False
    ) -> tuple[Tensor, tuple[Tensor, Tensor | None]]:
        """Return u and (r, bias) of the layer u ∘ r + bias of a stacked input, both of the members that run.

        multiplied, and what it raises: as forward.
        """
        self._check(input)
        members = self.active_members()
        check_rows(type(self).__name__, input, len(members))
        input_gain, output_gain, bias = self._gains_and_bias(members)
        x = input if multiplied else self._multiply(input, input_gain)
        return self._apply_weight(x, self.weight, None), (output_gain, bias)

    def _gains_and_bias(self, members: range) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the gains and the bias of the members that run."""
        input_gain, output_gain = (self._members_of(members, getattr(self, name)) for name in _GAINS)
        return input_gain, output_gain, self._members_of(members, self.bias) if self.member_bias else self.bias

    def _check(self, input: Tensor, stacked: bool = True) -> None:
        alone = input.dim() == self._min_dim - 1 and not stacked  # one sample, as the plain layer takes it
        channel_dim = self._channel_dim - (alone and self._channel_dim > 0)
        if input.dim() < self._min_dim - alone or input.size(channel_dim) != self._gain_sizes()[0]:
            expected = self._input_shape.format(self._gain_sizes()[0])
            raise ValueError(f"{type(self).__name__}: input must be {expected}, got shape {list(input.shape)}")

    def _multiply(self, x: Tensor, gain: Tensor, bias: Tensor | None = None) -> Tensor:
        """x ∘ gain_k + bias; low-precision gains join a float32 x, as weights do under autocast."""
        dtype = torch.promote_types(x.dtype, gain.dtype)
        bias = None if bias is None else bias.to(dtype)
        return member_gain(x, gain.to(dtype), bias, channel_dim=self._channel_dim)

    def averaged(self, mode: str = "exact") -> tuple[Tensor, Tensor | None]:
        """Return weight and bias of the plain layer.

        "exact": W ∘ mean_k(r_k s_kᵀ), the average of the members' outputs; "weights": W ∘ (mean r · mean sᵀ), the
        paper's average; biases of the members' own are averaged. Sums are float64; gains of 1 give back W's own bits.
        """
        s, r = wide(self.input_gain), wide(self.output_gain)
        if mode == "weights":
            s, r = member_mean(s).unsqueeze(0), member_mean(r).unsqueeze(0)
        groups = getattr(self, "groups", 1)
        # Each output meets the inputs of its own group: [groups, out / groups, in / groups].
        gains = torch.einsum("kgo,kgi->goi", r.unflatten(1, (groups, -1)), s.unflatten(1, (groups, -1))) / s.size(0)
        gains = gains.flatten(0, 1).view(*self.weight.shape[:2], *[1] * (self.weight.dim() - 2))
        bias = member_mean(self.bias) if self.member_bias else self.bias
        return typed_like(wide(self.weight) * gains, self.weight), bias

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        num_members: int,
        noise_std: float = 0.0,
        generator: torch.Generator | None = None,
        member_bias: bool = False,
    ) -> "_Rank1":
        """Return the plain layer with num_members pairs of gains: the same weight and bias objects, hooks and flags.

        Args:
            module: of the torch.nn class.
            num_members: K.
            noise_std: σ0, gains are 1 + σ0 · ε_k, in weight's type; biases b + σ0 · rms(b) · ε_k.
            generator: of ε.
            member_bias: give each member its own bias, [K, out], if module has one.

        Raises:
            TypeError: module is no such layer.
            NotImplementedError: it computes more than its class does, or others read its weight.
            ValueError: num_members or noise_std does not fit.
        """
        where = f"{cls.__name__}.from_module"
        check_replication(where, num_members, noise_std, generator)
        check_plain(where, module, cls._plain)
        new = twin(module, cls)
        new.plain_type = type(module)
        new._add_members(num_members, noise_std, generator, member_bias)
        return new

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        """Load; a plain checkpoint has no gains: they become 1."""
        if prefix + "weight" in state_dict:
            for name in _GAINS:
                state_dict.setdefault(prefix + name, torch.ones_like(getattr(self, name)))
        bias = state_dict.get(prefix + "bias")
        if isinstance(bias, Tensor) and bias.dim() == 2 and self.bias is not None and not self.member_bias:
            args[-1].append(
                f"{prefix}bias is each member's own in the checkpoint and shared in the model; expand the plain model "
                'with target "rank1_bias" before loading'
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.no_grad()
    def collapse(self, mode: str = "exact") -> nn.Module:
        """Return the plain layer; mode "exact" for inference, "weights" for further training; see averaged.

        Raises:
            ValueError: an unknown mode.
        """
        check_mode(mode)
        weight, bias = self.averaged(mode)
        plain = twin(self, self.plain_type)
        for name in _GAINS:
            del plain._parameters[name]
        plain.weight = plain_parameter(weight, self.weight)
        if self.member_bias:
            plain.bias = plain_parameter(bias, self.bias)
        return plain


class Rank1Linear(_Rank1, nn.Linear):
    """A linear layer with gains of each member's own, input_gain [K, in] and output_gain [K, out], over [K·B, …, in].

    Args:
        in_features, out_features: sizes of the last dimension.
        num_members: K.
        bias: with bias [out].
        device, dtype: of weight [out, in], bias and gains.
        member_bias: with bias [K, out], each member's own; at first all alike.
    """

    _plain = nn.Linear
    _channel_dim = -1
    _min_dim, _input_shape = 2, "[K·B, …, {}]"

    def __init__(
        self, in_features, out_features, num_members, bias=True, device=None, dtype=None, *, member_bias=False
    ):
        check_num_members("Rank1Linear", num_members)
        nn.Linear.__init__(self, in_features, out_features, bias, device=device, dtype=dtype)
        self.plain_type = nn.Linear
        self._add_members(num_members, 0.0, None, member_bias)

    def _gain_sizes(self) -> tuple[int, int]:
        return self.in_features, self.out_features

    def _apply_weight(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(input, weight, bias)

    def _apply_gains(
        self, input: Tensor, input_gain: Tensor | None, output_gain: Tensor, bias: Tensor | None
    ) -> Tensor:
        if input_gain is None:
            return self._multiply(self._apply_weight(input, self.weight, None), output_gain, bias)
        return rank1_linear(input, self.weight, input_gain, output_gain, bias)


class _Rank1Conv(_Rank1):
    """A convolution with gains; torch.nn's class comes behind it."""

    _channel_dim = 1

    def __init__(self, in_channels, out_channels, kernel_size, num_members, *, member_bias=False, **options):
        check_num_members(type(self).__name__, num_members)
        self._plain.__init__(self, in_channels, out_channels, kernel_size, **options)
        self.plain_type = self._plain
        self._add_members(num_members, 0.0, None, member_bias)

    def _gain_sizes(self) -> tuple[int, int]:
        return self.in_channels, self.out_channels

    def _apply_weight(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(input, weight, bias)

    def _apply_gains(
        self, input: Tensor, input_gain: Tensor | None, output_gain: Tensor, bias: Tensor | None
    ) -> Tensor:
        x = input if input_gain is None else self._multiply(input, input_gain)
        y = self._apply_weight(x, self.weight, None)
        return self._multiply(y, output_gain, bias)


class Rank1Conv1d(_Rank1Conv, nn.Conv1d):
    """A convolution over [K·B, in, L] with each member's own gains, input_gain [K, in] and output_gain [K, out].

    Args:
        in_channels, out_channels, kernel_size: as in nn.Conv1d.
        num_members: K.
        stride, padding, dilation, groups, bias, padding_mode, device, dtype: as in nn.Conv1d.
        member_bias: with bias [K, out], each member's own; at first all alike.
    """

    _plain = nn.Conv1d
    _min_dim, _input_shape = 3, "[K·B, {}, L]"


class Rank1Conv2d(_Rank1Conv, nn.Conv2d):
    """A convolution over [K·B, in, H, W] with each member's own gains, input_gain [K, in] and output_gain [K, out].

    Args:
        in_channels, out_channels, kernel_size: as in nn.Conv2d.
        num_members: K.
        stride, padding, dilation, groups, bias, padding_mode, device, dtype: as in nn.Conv2d.
        member_bias: with bias [K, out], each member's own; at first all alike.
    """

    _plain = nn.Conv2d
    _min_dim, _input_shape = 4, "[K·B, {}, H, W]"


class Rank1Conv3d(_Rank1Conv, nn.Conv3d):
    """A convolution over [K·B, in, D, H, W] with each member's own gains, input_gain [K, in] and output_gain [K, out].

    Args:
        in_channels, out_channels, kernel_size: as in nn.Conv3d.
        num_members: K.
        stride, padding, dilation, groups, bias, padding_mode, device, dtype: as in nn.Conv3d.
        member_bias: with bias [K, out], each member's own; at first all alike.
    """

    _plain = nn.Conv3d
    _min_dim, _input_shape = 5, "[K·B, {}, D, H, W]"
