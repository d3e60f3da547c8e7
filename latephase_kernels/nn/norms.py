"""Layer, group and RMS norm as late-phase weights: every member has its own affine weights.

    y = x̂ · weight_k + bias_k,   x̂ the input, normalized sample by sample

Samples do not mix, so the norm with the mean weights is exactly the average of the members' norms.
Shapes: K members, B rows a member. Stacked input is [K·B, …], member-major: dim 0 must be the batch.
"""

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backend import backend_for
from ..ops.checks import check_num_members
from ..ops.member_gain import member_gain
from .member_module import (
    MemberModule,
    check_mode,
    check_own_forward,
    check_replication,
    check_rows,
    member_mean,
)
from .memberwise import Memberwise

# Classes with a forward of their own that computes what torch.nn's does, here by name: neither library is imported.
_AS_TORCH = {f"timm.layers.norm.{name}" for name in ("LayerNorm", "GroupNorm", "GroupNorm1", "RmsNorm")}
_CHANNELS_FIRST = {"timm.layers.norm.LayerNorm2d", "torchvision.models.convnext.LayerNorm2d"}


def is_rms_norm(module: nn.Module) -> bool:
    """Return whether module is an nn.RMSNorm, a norm of that name in any library, or timm's SimpleNorm."""
    if isinstance(module, nn.RMSNorm):
        return True
    cls = type(module)
    simple = cls.__name__.startswith("SimpleNorm") and cls.__module__.startswith("timm.")
    return "weight" in module._parameters and (simple or re.search("rms_?norm", cls.__name__, re.I) is not None)


def is_layer_norm(module: nn.Module) -> bool:
    """Return whether module is an nn.LayerNorm, or a norm with a weight whose class has such a name in any library."""
    named = re.search(r"LayerNorm(2d)?$", type(module).__name__) is not None
    return isinstance(module, nn.LayerNorm) or (named and "weight" in module._parameters)


class _EnsembleNorm(MemberModule):
    """What the norms have in common; it comes before torch.nn's class in the order of methods."""

    _plain: type
    _channel_dim = -1

    def _replicate_shapes(self, num_members: int, device, dtype) -> None:
        """Finish __init__: weight and bias [K, …] for the plain ones that torch.nn's constructor made."""
        check_num_members(type(self).__name__, num_members)
        self.num_members, self.plain_type, self.routing = num_members, self._plain, None
        for name, plain in self._parameters.items():
            if plain is not None:
                late = torch.empty(num_members, *plain.shape, device=device, dtype=dtype)
                setattr(self, name, nn.Parameter(late))
        self.reset_parameters()
        self._mark()

    def _norm(self, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """The plain norm with these weights, or none."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """Return the norm of input, in its shape: [K·B, …] stacked, or [N, …] by the average weights.

        Raises:
            ValueError: the rows are not the same number for each member.
            NotImplementedError: a nested tensor, stacked.
        """
        members = self.active_members()
        if isinstance(members, str):
            return self._norm(input, *self.averaged())
        num_members = len(members)
        check_rows(type(self).__name__, input, num_members)
        weight, bias = (self._members_of(members, self._parameters.get(name)) for name in ("weight", "bias"))
        if weight is None:
            return self._norm(input, None, None)
        if num_members > 1 and _gains_pay(input):
            return self._gains(self._norm(input, None, None), weight, bias)
        rows = input.unflatten(0, (num_members, input.size(0) // num_members)).unbind(0)
        biases = [None] * num_members if bias is None else bias.unbind(0)
        return torch.cat([self._norm(*of_member) for of_member in zip(rows, weight.unbind(0), biases)])

    def _gains(self, normalized: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x̂ · weight_k + bias_k, weight and bias [K, *affine shape]."""
        channels = normalized.flatten(1 - weight.dim()) if self._channel_dim < 0 else normalized
        dtype = normalized.dtype  # the plain norm takes low-precision weights beside it, under autocast for one
        weight = weight.flatten(1).to(dtype)
        bias = None if bias is None else bias.flatten(1).to(dtype)
        y = member_gain(channels, weight, bias, channel_dim=self._channel_dim)
        return y if channels is normalized else y.view(normalized.shape)

    def averaged(self) -> tuple[Tensor | None, Tensor | None]:
        """Return weight and bias of the plain norm, or None: the mean over members, summed in float64."""
        weight, bias = self._parameters.get("weight"), self._parameters.get("bias")
        return None if weight is None else member_mean(weight), None if bias is None else member_mean(bias)

    @classmethod
    def _accepts(cls, module: nn.Module) -> bool:
        return isinstance(module, cls._plain)

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        num_members: int,
        noise_std: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> MemberModule:
        """Return num_members copies of a plain norm; flags, hooks, types and devices are the module's.

        Args:
            module: of the torch.nn class, or one derived from it. A derived class with a forward of its own becomes a
                Memberwise, but for those of timm and torchvision that compute the same.
            num_members: K.
            noise_std: σ0, φ_k = φ + σ0 · rms(φ) · ε_k for weight and bias, each.
            generator: of ε.

        Raises:
            TypeError: module is no such norm.
            NotImplementedError: it has other tensors than weight and bias, or its call is not its class's.
            ValueError: num_members or noise_std does not fit.
        """
        where = f"{cls.__name__}.from_module"
        check_replication(where, num_members, noise_std, generator)
        if not cls._accepts(module):
            raise TypeError(f"{where}: module must be a {cls._plain.__name__}, got {type(module).__name__}")
        _check_norm(where, module)
        return cls._class_for(module)._copies_of(module, num_members, noise_std, generator)

    @classmethod
    def _class_for(cls, module: nn.Module) -> type[MemberModule]:
        """The class that computes what module does, for every member."""
        owner = next(base for base in type(module).__mro__ if "forward" in vars(base))
        if owner is cls._plain:
            return cls
        name = f"{owner.__module__}.{owner.__qualname__}"
        if getattr(module, "_fast_norm", False):  # timm's switch for apex, and for low precision under autocast
            return Memberwise
        if name in _CHANNELS_FIRST:
            return EnsembleLayerNorm2d
        return cls if name in _AS_TORCH else Memberwise

    @torch.no_grad()
    def collapse(self, mode: str = "exact") -> nn.Module:
        """Return the plain norm of the mean weights: exact, so both modes are the same.

        Raises:
            ValueError: an unknown mode.
        """
        check_mode(mode)
        return self._collapsed_to(dict(zip(("weight", "bias"), self.averaged())))


def _gains_pay(input: Tensor) -> bool:
    """Return whether to normalize all members at once and then apply member_gain.

    Else PyTorch's own norm runs member by member. In low precision that rounds once, not x̂ and y; and it is faster
    than gains without kernels.
    """
    return input.dtype not in (torch.bfloat16, torch.float16) and backend_for(input, "member_gain") != "reference"


def _check_norm(where: str, module: nn.Module) -> None:
    """Raise unless weight and bias are all that a member needs of its own."""
    cls = type(module)
    name = f"{cls.__module__}.{cls.__qualname__}"
    check_own_forward(where, module)
    others = (set(module._parameters) | set(module._buffers)) - {"weight", "bias"}
    if others or "weight" not in module._parameters:
        raise NotImplementedError(
            f"{where}: {name} has other tensors than weight and bias (a parametrization?); remove it first, "
            "for example with torch.nn.utils.parametrize.remove_parametrizations"
        )


class EnsembleLayerNorm(_EnsembleNorm, nn.LayerNorm):
    """Layer norm over [K·B, …, *normalized_shape] with weights of each member's own.

    Args:
        normalized_shape: sizes of the last dimensions.
        num_members: K.
        eps: added to the (biased) variance.
        elementwise_affine: with weight [K, *normalized_shape].
        bias: with bias, the same shape.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: num_members is not an int from 1, or what nn.LayerNorm does not take.
    """

    _plain = nn.LayerNorm

    @classmethod
    def _accepts(cls, module: nn.Module) -> bool:
        return is_layer_norm(module)

    def __init__(
        self, normalized_shape, num_members, eps=1e-5, elementwise_affine=True, bias=True, device=None, dtype=None
    ):
        nn.LayerNorm.__init__(self, normalized_shape, eps, elementwise_affine, bias, device="meta")
        self._replicate_shapes(num_members, device, dtype)

    def _norm(self, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class EnsembleLayerNorm2d(EnsembleLayerNorm):
    """Layer norm over the channels of [K·B, C, H, W], as timm's and torchvision's LayerNorm2d; as EnsembleLayerNorm."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the norm of input, in its shape; see EnsembleLayerNorm."""
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class EnsembleGroupNorm(_EnsembleNorm, nn.GroupNorm):
    """Group norm over [K·B, C, *] with weights of each member's own.

    Args:
        num_groups: of channels that are normalized together.
        num_channels: C.
        num_members: K.
        eps: added to the (biased) variance.
        affine: with weight and bias [K, C].
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: num_members is not an int from 1, or what nn.GroupNorm does not take.
    """

    _plain = nn.GroupNorm
    _channel_dim = 1

    def __init__(self, num_groups, num_channels, num_members, eps=1e-5, affine=True, device=None, dtype=None):
        nn.GroupNorm.__init__(self, num_groups, num_channels, eps, affine, device="meta")
        self._replicate_shapes(num_members, device, dtype)

    def _norm(self, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.group_norm(input, self.num_groups, weight, bias, self.eps)


class EnsembleRMSNorm(_EnsembleNorm, nn.RMSNorm):
    """RMS norm over [K·B, …, *normalized_shape] with weights of each member's own.

    Args:
        normalized_shape: sizes of the last dimensions.
        num_members: K.
        eps: added to the mean square; None for the machine epsilon.
        elementwise_affine: with weight [K, *normalized_shape].
        device, dtype: of the weight.

    Raises:
        TypeError, ValueError: num_members is not an int from 1, or what nn.RMSNorm does not take.
    """

    _plain = nn.RMSNorm

    def __init__(self, normalized_shape, num_members, eps=None, elementwise_affine=True, device=None, dtype=None):
        nn.RMSNorm.__init__(self, normalized_shape, eps, elementwise_affine, device="meta")
        self._replicate_shapes(num_members, device, dtype)

    def _norm(self, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.rms_norm(input, self.normalized_shape, weight, self.eps)

    @classmethod
    def _accepts(cls, module: nn.Module) -> bool:
        return is_rms_norm(module)
