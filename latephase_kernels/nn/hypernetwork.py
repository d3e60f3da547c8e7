"""Linear hypernetwork: layers mix their weights from shared templates; the mixing coefficients are late-phase weights.

    W_l = [Σ_t c_{l,t,0} T_t, …, Σ_t c_{l,t,S−1} T_t],   side by side along the input channels

Symbols: T_t template t of a bank, c_l embedding of layer l, S slices. A member's embedding is its own: c_{l,k}.
Shapes: K members, T templates, S slices, B rows a member. Stacked input is [K·B, …], member-major.

Source: Savarese & Maire, ICLR 2019 (soft parameter sharing); von Oswald et al., ICLR 2021, section 2.
"""

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.autocast import without_autocast
from ..ops.checks import check_num_members
from .member_module import (
    MemberModule,
    check_mode,
    check_replication,
    check_rows,
    member_mean,
    plain_parameter,
    replicate_parameter,
    twin,
)


class TemplateBank(nn.Module):
    """Templates of one shape, for all layers whose weights are mixed from them: give each the same bank.

    Args:
        num_templates: T.
        weight_shape: of a template, [out, in, k, k] for convolutions or [out, in] for linear layers.
        fan_in: of the weights mixed from it, for their scale; None for in · k · k, right for one slice.
        bias: with templates of a bias, [T, out], zero at first.
        device, dtype: of templates [T, *weight_shape].

    Raises:
        ValueError: num_templates is not positive, or weight_shape has neither 2 nor 4 dimensions.
    """

    def __init__(
        self,
        num_templates: int,
        weight_shape: Sequence[int],
        *,
        fan_in: int | None = None,
        bias: bool = False,
        device=None,
        dtype=None,
    ):
        if num_templates < 1:
            raise ValueError(f"TemplateBank: num_templates must be at least 1, got {num_templates}")
        if len(weight_shape) not in (2, 4):
            raise ValueError(f"TemplateBank: weight_shape must be [out, in] or [out, in, k, k], got {weight_shape}")
        super().__init__()
        options = {"device": device, "dtype": dtype}
        self.fan_in = math.prod(weight_shape[1:]) if fan_in is None else fan_in
        self.templates = nn.Parameter(torch.empty(num_templates, *weight_shape, **options))
        own_bias = nn.Parameter(torch.empty(num_templates, weight_shape[0], **options)) if bias else None
        self.register_parameter("bias_templates", own_bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw templates as Kaiming's normal initialization draws weights; an embedding of norm 1 keeps the scale."""
        nn.init.normal_(self.templates, std=math.sqrt(2 / self.fan_in))
        if self.bias_templates is not None:
            nn.init.zeros_(self.bias_templates)

    def extra_repr(self) -> str:
        return f"{self.templates.size(0)}, {list(self.templates.shape[1:])}, bias={self.bias_templates is not None}"

    def forward(self, embedding: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mix, in one matrix product for all members.

        Args:
            embedding: [T, S], or [K, T, S].

        Returns:
            weight [out, S·in, …] and bias [out] or None; of K members [K, out, S·in, …] and [K, out].
        """
        leading = embedding.dim() - 2
        *members, _, num_slices = embedding.shape
        coefficients = embedding.mT.reshape(-1, embedding.size(-2))  # [K·S, T]
        # Members differ by less than bfloat16 resolves: mix before rounding, and let the layer round the weight.
        with without_autocast(embedding.device):
            mixed = coefficients @ self.templates.flatten(1)
            weight = mixed.view(*members, num_slices, *self.templates.shape[1:])
            weight = weight.movedim(leading, leading + 1).flatten(leading + 1, leading + 2)
            bias = None if self.bias_templates is None else embedding.sum(-1) @ self.bias_templates
        return weight, bias

    def _apply(self, fn, recurse=True):
        # As matrices: model.to(memory_format=channels_last), meant for four dimensions, raises at five.
        return super()._apply(lambda t: fn(t.flatten(1)).unflatten(1, t.shape[1:]), recurse)


@torch.no_grad()
def orthogonal_embeddings_(layers: "Iterable[HyperLayer]") -> None:
    """Draw new embeddings: orthogonal among the layers of equal bank and shape, each of mean slice norm 1.

    All members of a layer get the same.
    More layers than an embedding has elements cannot be orthogonal; the elements are then, as vectors over the layers.
    """
    groups: dict[tuple, list[nn.Parameter]] = {}
    for layer in layers:
        groups.setdefault((layer.bank, layer.embedding.shape[-2:]), []).append(layer.embedding)
    for (_, shape), group in groups.items():
        dtype = torch.promote_types(group[0].dtype, torch.float32)  # the decomposition takes no half precision
        drawn = torch.empty(len(group), *shape, dtype=dtype, device=group[0].device)
        for embedding, value in zip(group, nn.init.orthogonal_(drawn)):
            embedding.copy_(value / value.norm(dim=0).mean())


class HyperLayer(nn.Module):
    """What HyperConv2d and HyperLinear have in common: a bank, and embedding [T, S]."""

    _template_dim: int

    def __init__(self, bank: TemplateBank, num_slices: int = 1):
        name = type(self).__name__
        if not isinstance(bank, TemplateBank):
            raise TypeError(f"{name}: bank must be a TemplateBank, got {type(bank).__name__}")
        if bank.templates.dim() - 1 != self._template_dim:
            shape = list(bank.templates.shape[1:])
            raise ValueError(f"{name}: bank must hold templates of {self._template_dim} dimensions, got shape {shape}")
        if num_slices < 1:
            raise ValueError(f"{name}: num_slices must be at least 1, got {num_slices}")
        super().__init__()
        self.bank, self.num_slices = bank, num_slices
        self.embedding = nn.Parameter(bank.templates.new_empty(bank.templates.size(0), num_slices))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw a random embedding; orthogonal_embeddings_ draws those of several layers together."""
        orthogonal_embeddings_([self])

    @property
    def in_channels(self) -> int:
        """Inputs: those of all slices."""
        return self.bank.templates.size(2) * self.num_slices

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.bank.templates.size(1)}, num_slices={self.num_slices}"

    def weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias (or None) of the equal nn.Conv2d or nn.Linear."""
        return self.bank(self.embedding)

    def forward(self, input: Tensor) -> Tensor:
        """Return the layer of input, by the weight of this moment."""
        return self._apply_weight(input, *self.weight_and_bias())

    def _apply_weight(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError


class HyperConv2d(HyperLayer):
    """A convolution whose weight is mixed from a bank's templates.

    Args:
        bank: of templates [T, out, in / num_slices, k, k], shared with other layers.
        num_slices: S, of the input channels, each with coefficients of its own: embedding [T, S].
        stride, padding: as in nn.Conv2d.

    Raises:
        TypeError, ValueError: bank does not fit, or num_slices is not positive.
    """

    _template_dim = 4

    def __init__(self, bank: TemplateBank, num_slices: int = 1, *, stride=1, padding=0):
        super().__init__(bank, num_slices)
        self.stride, self.padding = stride, padding

    def extra_repr(self) -> str:
        size = tuple(self.bank.templates.shape[3:])
        return f"{super().extra_repr()}, kernel_size={size}, stride={self.stride}, padding={self.padding}"

    def _apply_weight(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(input, weight, bias, self.stride, self.padding)


class HyperLinear(HyperLayer):
    """A linear layer whose weight, and bias where the bank has templates of one, is mixed from a bank's templates.

    Args:
        bank: of templates [T, out, in / num_slices], shared with other layers.
        num_slices: S, of the inputs: embedding [T, S]. A bias is mixed by the sum over slices.

    Raises:
        TypeError, ValueError: bank does not fit, or num_slices is not positive.
    """

    _template_dim = 2

    def _apply_weight(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(input, weight, bias)


class _MemberHyper(MemberModule, HyperLayer):
    """The layer with an embedding [K, T, S]; the bank stays shared. It comes before the plain class in the order."""

    _plain: type
    _channel_dim: int
    _input_shape: str

    def __init__(self, bank: TemplateBank, num_members: int, num_slices: int = 1, **options):
        check_num_members(type(self).__name__, num_members)
        super().__init__(bank, num_slices, **options)
        self.num_members, self.plain_type, self.routing = num_members, self._plain, None
        self.embedding = replicate_parameter(self.embedding, num_members, 0.0, None)
        self._mark()

    def forward(self, input: Tensor) -> Tensor:
        """Return the layer of input: [K·B, …] stacked, or [N, …] by the average embedding, which is exact.

        All members' weights, [K, out, in, …] in memory, are one matrix product. The layer itself runs one member after
        the other: a grouped convolution over [B, K·C, H, W] needs two transposing copies and is no faster at the sizes
        that take time.

        Raises:
            ValueError: input's shape does not fit, or its rows are not the same number for each member.
        """
        if input.dim() < self._template_dim or input.size(self._channel_dim) != self.in_channels:
            expected = self._input_shape.format(self.in_channels)
            raise ValueError(f"{type(self).__name__}: input must be {expected}, got shape {list(input.shape)}")
        members = self.active_members()
        if isinstance(members, str):
            return self._apply_weight(input, *self.bank(self.averaged()))
        num_members = len(members)
        check_rows(type(self).__name__, input, num_members)
        weights, biases = self.bank(self._members_of(members, self.embedding))
        # Unbound: the gradient of indexing by k would be a tensor of all members for each of them.
        parts = input.unflatten(0, (num_members, input.size(0) // num_members)).unbind()
        own_biases = [None] * num_members if biases is None else biases.unbind()
        return torch.cat([self._apply_weight(*own) for own in zip(parts, weights.unbind(), own_biases)])

    def averaged(self) -> Tensor:
        """Return the mean embedding [T, S], summed in float64."""
        return member_mean(self.embedding)

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        num_members: int,
        noise_std: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> "_MemberHyper":
        """Return the plain layer with num_members embeddings: the same bank object, hooks and flags.

        Args:
            module: of the plain class.
            num_members: K.
            noise_std: σ0, c_k = c + σ0 · rms(c) · ε_k.
            generator: of ε.

        Raises:
            TypeError: module is no such layer.
            NotImplementedError: it computes more than its class does.
            ValueError: num_members or noise_std does not fit.
        """
        where = f"{cls.__name__}.from_module"
        check_replication(where, num_members, noise_std, generator)
        plain = cls._plain
        if not isinstance(module, plain):
            raise TypeError(f"{where}: module must be a {plain.__name__}, got {type(module).__name__}")
        own = [*module._parameters, *module._buffers, *module._modules]
        methods = ("forward", "weight_and_bias", "_apply_weight")
        changed = any(getattr(type(module), method) is not getattr(plain, method) for method in methods)
        if changed or "forward" in vars(module) or own != ["embedding", "bank"]:
            raise NotImplementedError(
                f"{where}: {type(module).__qualname__} has a forward or tensors of its own, which replacing it would "
                f"lose; use a plain {plain.__name__} and separate modules for the rest"
            )
        new = twin(module, cls)
        new.num_members, new.plain_type, new.routing = num_members, type(module), None
        new.embedding = replicate_parameter(module.embedding, num_members, noise_std, generator)
        new._mark()
        return new

    @torch.no_grad()
    def collapse(self, mode: str = "exact") -> nn.Module:
        """Return the plain layer of the mean embedding: exact, so both modes are the same.

        Raises:
            ValueError: an unknown mode.
        """
        check_mode(mode)
        plain = twin(self, self.plain_type)
        plain.embedding = plain_parameter(self.averaged(), self.embedding)
        return plain


class MemberHyperConv2d(_MemberHyper, HyperConv2d):
    """A HyperConv2d with an embedding [K, T, S] of each member's own, over [K·B, in, H, W].

    Args:
        bank: shared by the members, and with other layers.
        num_members: K; all start equal.
        num_slices: S, of the input channels, each with coefficients of its own.
        options: stride and padding, by name, as nn.Conv2d has them; 1 and 0 unless given.

    Raises:
        TypeError, ValueError: bank does not fit, num_members or num_slices is not positive, or an unknown option.
    """

    _plain = HyperConv2d
    _channel_dim, _input_shape = 1, "[K·B, {}, H, W]"


class MemberHyperLinear(_MemberHyper, HyperLinear):
    """A HyperLinear with an embedding [K, T, S] of each member's own, over [K·B, …, in].

    Args:
        bank: shared by the members, and with other layers.
        num_members: K; all start equal.
        num_slices: S, of the inputs. A bias is mixed by the sum over slices.
        options: there are none.

    Raises:
        TypeError, ValueError: bank does not fit, or num_members or num_slices is not positive.
    """

    _plain = HyperLinear
    _channel_dim, _input_shape = -1, "[K·B, …, {}]"
