"""The late-phase classification head: every member has a linear layer of its own.

    y_k = x_k · weight_kᵀ + bias_k

Shapes: K members, B rows a member. Stacked input is [K·B, …, in], member-major.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import registry
from ..ops.checks import check_num_members
from .member_module import (
    MemberModule,
    carry_over,
    check_mode,
    check_plain,
    check_replication,
    check_rows,
    member_mean,
    plain_parameter,
    replicate_parameter,
)


class MemberLinear(MemberModule):
    """K linear layers; in an expanded model `members` or the training flag says whether the input is stacked.

    Args:
        in_features, out_features: sizes of the last dimension.
        num_members: K.
        bias: with bias [K, out].
        device, dtype: of weight [K, out, in] and bias.

    Raises:
        TypeError, ValueError: num_members is not an int from 1.
    """

    def __init__(
        self, in_features: int, out_features: int, num_members: int, bias: bool = True, device=None, dtype=None
    ):
        check_num_members("MemberLinear", num_members)
        super().__init__()
        self.in_features, self.out_features, self.num_members = in_features, out_features, num_members
        self.plain_type, self.routing = nn.Linear, None
        options = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(num_members, out_features, in_features, **options))
        own_bias = nn.Parameter(torch.empty(num_members, out_features, **options)) if bias else None
        self.register_parameter("bias", own_bias)
        self.reset_parameters()
        self._mark()

    def reset_parameters(self) -> None:
        """Draw every member as nn.Linear draws its weights, each its own."""
        bound = 1 / math.sqrt(self.in_features) if self.in_features > 0 else 0.0
        for parameter in self._parameters.values():
            if parameter is not None:
                nn.init.uniform_(parameter, -bound, bound)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, num_members={self.num_members}, "
            f"bias={self.bias is not None}"
        )

    def forward(self, input: Tensor) -> Tensor:
        """Return [K·B, …, out] for [K·B, …, in], or [N, …, out] by the average weights for [N, …, in], [out] for [in].

        Raises:
            ValueError: the last dimension is not in_features, or the rows are not the same number for each member.
        """
        members = self.active_members()
        if input.dim() < 2 - isinstance(members, str) or input.size(-1) != self.in_features:
            raise ValueError(f"MemberLinear: input must be [K·B, …, {self.in_features}], got shape {list(input.shape)}")
        if isinstance(members, str):
            return F.linear(input, *self.averaged())
        num_members = len(members)
        check_rows("MemberLinear", input, num_members)
        weight, bias = self._members_of(members, self.weight), self._members_of(members, self.bias)
        rows = input.numel() // self.in_features if self.in_features else math.prod(input.shape[:-1])
        stacked = input.reshape(num_members, rows // num_members, self.in_features)
        if bias is None:
            y = torch.bmm(stacked, weight.mT)
        else:
            y = torch.baddbmm(bias.unsqueeze(1), stacked, weight.mT)
        shape = *input.shape[:-1], self.out_features
        if registry.is_exporting():  # of the private op a trace would keep this batch's size
            return y.reshape(shape)
        return torch.ops.aten._unsafe_view.default(y, shape)  # no view, as of F.linear: FSDP2 loses its hooks on those

    def averaged(self) -> tuple[Tensor, Tensor | None]:
        """Return weight [out, in] and bias [out] or None: the mean over members, summed in float64."""
        return member_mean(self.weight), None if self.bias is None else member_mean(self.bias)

    @classmethod
    def from_module(
        cls,
        module: nn.Linear,
        num_members: int,
        noise_std: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> "MemberLinear":
        """Return num_members copies of a plain linear layer; flags, hooks, types and devices are the module's.

        Args:
            module: nn.Linear.
            num_members: K.
            noise_std: σ0, φ_k = φ + σ0 · rms(φ) · ε_k for weight and bias, each.
            generator: of ε.

        Raises:
            TypeError: module is not an nn.Linear.
            NotImplementedError: it computes more than nn.Linear does, or others read its weight.
            ValueError: num_members or noise_std does not fit.
        """
        check_replication("MemberLinear.from_module", num_members, noise_std, generator)
        check_plain("MemberLinear.from_module", module, nn.Linear)
        new = cls(module.in_features, module.out_features, num_members, module.bias is not None, device="meta")
        for name, parameter in module._parameters.items():
            if parameter is not None:
                setattr(new, name, replicate_parameter(parameter, num_members, noise_std, generator))
        new.plain_type = type(module)
        new._mark()
        carry_over(module, new)
        return new

    @torch.no_grad()
    def collapse(self, mode: str = "exact") -> nn.Linear:
        """Return the plain linear layer of the mean weights: exact, so both modes are the same.

        Raises:
            ValueError: an unknown mode.
        """
        check_mode(mode)
        weight, bias = self.averaged()
        plain = nn.Linear(self.in_features, self.out_features, bias is not None, device="meta")
        plain.weight = plain_parameter(weight, self.weight)
        plain.bias = None if bias is None else plain_parameter(bias, self.bias)
        return self._to_plain_type(plain)
