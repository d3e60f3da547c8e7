"""Rank-1 late-phase weights for nn.LSTM: every member multiplies the shared weights by gains of its own.

    W_k = weight ∘ (r_k s_kᵀ)   for weight_ih and weight_hh of every layer

Symbols: s = input gain, r = output gain. Weights and biases are base weights, as in nn.LSTM.
Shapes: K members, B rows a member, T steps, H units. Stacked input is [T, K·B, in], or [K·B, T, in] with batch_first;
states are [layers, K·B, H]: member-major along the batch dimension.

Source: Wen et al., ICLR 2020 (BatchEnsemble); von Oswald et al., ICLR 2021, sections 2 and 3.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..ops.checks import check_num_members
from ..ops.rank1_lstm import rank1_lstm
from ..reference.precision import typed_like, wide
from .member_module import (
    MemberModule,
    check_mode,
    check_replication,
    member_mean,
    plain_parameter,
    replicate_parameter,
    twin,
)

State = tuple[Tensor, Tensor]


def _gain_names(weight_name: str) -> tuple[str, str]:
    """Return the names of s and r of a weight: "weight_hh_l0" has "input_gain_hh_l0" and "output_gain_hh_l0"."""
    suffix = weight_name.removeprefix("weight")
    return "input_gain" + suffix, "output_gain" + suffix


def _check_options(where: str, module: nn.LSTM) -> None:
    """Raise NotImplementedError unless module's options have a stacked form."""
    if module.bidirectional:
        raise NotImplementedError(f"{where}: bidirectional must be False, got True; use an LSTM for each direction")
    if module.proj_size:
        raise NotImplementedError(f"{where}: proj_size must be 0, got {module.proj_size}; add a linear layer instead")


def _check_standard(where: str, module: nn.LSTM) -> None:
    """Raise NotImplementedError unless module computes what nn.LSTM does."""
    cls = type(module)
    name = f"{cls.__module__}.{cls.__qualname__}"
    overridden = [m for m in ("forward", "__call__") if getattr(cls, m) is not getattr(nn.LSTM, m) or m in vars(module)]
    if overridden:
        raise NotImplementedError(
            f"{where}: {name} overrides {overridden[0]} of LSTM, which replacing it would lose; "
            "use a plain LSTM and separate modules for the rest"
        )
    if set(module._parameters) != set(module._flat_weights_names) or module._modules or module._buffers:
        raise NotImplementedError(
            f"{where}: {name} has other parameters, buffers or children than LSTM's (a parametrization?); remove them "
            "first, for example with torch.nn.utils.parametrize.remove_parametrizations"
        )


class Rank1LSTM(MemberModule, nn.LSTM):
    """An LSTM with gains of each member's own; in an expanded model `members` or the training flag says who runs.

    Beside nn.LSTM's parameters there are, for ih and hh of every layer l: input_gain_ih_l [K, in] (K, H for hh) and
    output_gain_ih_l [K, 4H], the gates in the order i, f, g, o.

    Args:
        input_size, hidden_size: features of the input, and H.
        num_members: K.
        num_layers, bias, batch_first, dropout, device, dtype: as in nn.LSTM.

    Raises:
        NotImplementedError: bidirectional or proj_size.
        TypeError, ValueError: num_members, or what nn.LSTM does not take.
    """

    def __init__(self, input_size, hidden_size, num_members, num_layers=1, **options):
        check_num_members("Rank1LSTM", num_members)
        nn.LSTM.__init__(self, input_size, hidden_size, num_layers, **options)
        _check_options("Rank1LSTM", self)
        self.num_members, self.plain_type, self.routing = num_members, nn.LSTM, None
        self._add_gains(0.0, None)

    def _add_gains(self, noise_std: float, generator: torch.Generator | None) -> None:
        for weight_name in self._weight_names():
            weight = self._parameters[weight_name]
            for name, size in zip(_gain_names(weight_name), reversed(weight.shape)):
                gain = replicate_parameter(weight.new_ones(size), self.num_members, noise_std, generator)
                self.register_parameter(name, gain.requires_grad_())
        self._mark()

    def reset_parameters(self) -> None:
        """Draw weights and biases as nn.LSTM does; gains become 1."""
        super().reset_parameters()
        for gain in self.replicated_parameters().values():
            nn.init.ones_(gain)

    def _weight_names(self) -> list[str]:
        return [name for name in self._flat_weights_names if name.startswith("weight")]

    @property
    def shared_names(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset(self._flat_weights_names)

    def forward(self, input: Tensor, hx: State | None = None) -> tuple[Tensor, State]:  # type: ignore[override]
        """Return what nn.LSTM returns: every h of the last layer, and the last (h, c) of all layers.

        Args:
            input: [T, K·B, in] stacked, or [T, N, in] for the average of the members' weights; dimensions 0 and 1
                change places with batch_first.
            hx: (h, c) before the first step, [layers, K·B, H] each; zeros if None.

        Returns:
            output like input with H features, and (h, c) [layers, K·B, H].

        Raises:
            NotImplementedError: a packed sequence; a dtype without support.
            ValueError: a shape does not fit, or the rows are not the same number for each member.
        """
        if isinstance(input, PackedSequence):
            raise NotImplementedError(
                "Rank1LSTM: input must be a padded tensor, got a PackedSequence, whose steps have different numbers "
                "of rows; unpack it with torch.nn.utils.rnn.pad_packed_sequence and mask the loss"
            )
        if input.dim() != 3 or input.size(-1) != self.input_size:
            expected = "[K·B, T, {}]" if self.batch_first else "[T, K·B, {}]"
            raise ValueError(
                f"Rank1LSTM: input must be {expected.format(self.input_size)}, got shape {list(input.shape)}"
            )
        members = self.active_members()
        batch_dim = 0 if self.batch_first else 1
        rows = input.size(batch_dim)
        if not isinstance(members, str) and rows % len(members):
            raise ValueError(
                f"Rank1LSTM: input.size({batch_dim})={rows} is not divisible by num_members={len(members)}; "
                f"stack {len(members)} equal minibatches along dim {batch_dim}"
            )
        if hx is None:
            zeros = input.new_zeros(self.num_layers, rows, self.hidden_size)
            hx = (zeros, zeros)
        if len(hx) != 2 or any(list(state.shape) != [self.num_layers, rows, self.hidden_size] for state in hx):
            raise ValueError(
                f"Rank1LSTM: hx must be (h, c), each {[self.num_layers, rows, self.hidden_size]} for input of shape "
                f"{list(input.shape)}, got {[list(state.shape) for state in hx]}"
            )
        if isinstance(members, str):
            output, h, c = torch.lstm(
                input, hx, self.averaged(), self.bias, self.num_layers, self.dropout, self.training, False,
                self.batch_first,
            )  # fmt: skip
            return output, (h, c)
        output, state = self._stacked(input.transpose(0, 1) if self.batch_first else input, hx, members)
        return output.transpose(0, 1) if self.batch_first else output, state

    def _stacked(self, x: Tensor, hx: State, members: range) -> tuple[Tensor, State]:
        """The members' layers one after the other; x is [T, K·B, in]."""
        states = []
        for layer in range(self.num_layers):
            if layer and self.dropout:
                x = F.dropout(x, self.dropout, self.training)
            x, h, c = rank1_lstm(x, hx[0][layer], hx[1][layer], *self._layer(layer, members))
            states.append((h, c))
        h_n, c_n = (torch.stack(parts) for parts in zip(*states))
        return x, (h_n, c_n)

    def _layer(self, layer: int, members: range) -> list[Tensor | None]:
        """Return the arguments of rank1_lstm that are parameters: two weights, four gains, the bias."""
        own = self._parameters
        names = [f"weight_ih_l{layer}", f"weight_hh_l{layer}"]
        gains = [self._members_of(members, own[gain]) for name in names for gain in _gain_names(name)]
        bias = own[f"bias_ih_l{layer}"] + own[f"bias_hh_l{layer}"] if self.bias else None
        return [*(own[name] for name in names), *gains, bias]

    def averaged(self, mode: str = "exact") -> list[Tensor]:
        """Return the weights and biases of the plain LSTM, in the order of its state dict.

        "exact": W ∘ mean_k(r_k s_kᵀ), the mean of the members' weights. This is exact for each product alone; the
        output of the recurrence is not linear in its weights, so it is not the mean of the members' outputs.
        "weights": W ∘ (mean r · mean sᵀ), the paper's average. Sums are float64; gains of 1 give back W's own bits.
        """
        weights = []
        for name in self._flat_weights_names:
            weight = self._parameters[name]
            if name.startswith("weight"):
                s, r = (wide(self._parameters[gain]) for gain in _gain_names(name))
                if mode == "weights":
                    s, r = member_mean(s).unsqueeze(0), member_mean(r).unsqueeze(0)
                weight = typed_like(wide(weight) * (r.mT @ s / s.size(0)), weight)
            weights.append(weight)
        return weights

    @classmethod
    def from_module(
        cls,
        module: nn.LSTM,
        num_members: int,
        noise_std: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> "Rank1LSTM":
        """Return the LSTM with num_members sets of gains: the same weight and bias objects, hooks and flags.

        Args:
            module: nn.LSTM.
            num_members: K.
            noise_std: σ0, gains are 1 + σ0 · ε_k, in the weights' type.
            generator: of ε.

        Raises:
            TypeError: module is no nn.LSTM.
            NotImplementedError: it is bidirectional, has a projection, or computes more than nn.LSTM does.
            ValueError: num_members or noise_std does not fit.
        """
        where = "Rank1LSTM.from_module"
        check_replication(where, num_members, noise_std, generator)
        if not isinstance(module, nn.LSTM):
            raise TypeError(f"{where}: module must be an LSTM, got {type(module).__name__}")
        _check_options(where, module)
        _check_standard(where, module)
        new = twin(module, cls)
        new.num_members, new.plain_type, new.routing = num_members, type(module), None
        new._init_flat_weights()  # nn.LSTM's list of its parameters, which twin shares
        new._add_gains(noise_std, generator)
        return new

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        """Load; a plain checkpoint has no gains: they become 1."""
        for weight_name in self._weight_names():
            if prefix + weight_name in state_dict:
                for name in _gain_names(weight_name):
                    state_dict.setdefault(prefix + name, torch.ones_like(self._parameters[name]))
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.no_grad()
    def collapse(self, mode: str = "exact") -> nn.LSTM:
        """Return the plain LSTM of the mean weights; see averaged for the modes.

        Raises:
            ValueError: an unknown mode.
        """
        check_mode(mode)
        weights = self.averaged(mode)
        plain = twin(self, self.plain_type)
        for name in self.replicated_parameters():
            del plain._parameters[name]
        for name, weight in zip(self._flat_weights_names, weights):
            if name.startswith("weight"):
                plain._parameters[name] = plain_parameter(weight, self._parameters[name])
        plain._init_flat_weights()  # for cuDNN, which wants them in one piece of memory
        return plain
