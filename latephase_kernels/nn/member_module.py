"""MemberModule: what every module with replicated tensors has in common.

Shapes: K members; a replicated tensor is [K, …] where the plain module's is […].
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.checks import check_num_members
from ..reference.precision import typed_like, wide
from .routing import Routed

# The call that has replaced a parameter in its model, as an attribute of it: nothing trains it any more.
REPLACED_BY = "_latephase_replaced_by"
_ROUTED_ATTRIBUTES = ("num_members", "routing", "plain_type", "statistics_group")
_OWN_ATTRIBUTES = (*_ROUTED_ATTRIBUTES, "activation")
MODES = ("exact", "weights")


def check_mode(mode: str) -> None:
    """Raise unless mode names a way to collapse."""
    if mode not in MODES:
        raise ValueError(f'collapse: mode must be "exact" or "weights", got {mode!r}')


def check_replication(where: str, num_members: int, noise_std: float, generator: torch.Generator | None) -> None:
    """Raise unless num_members is an int ≥ 1, noise_std a finite number ≥ 0, and generator one or None."""
    check_num_members(where, num_members)
    if isinstance(noise_std, bool) or not isinstance(noise_std, (int, float)):
        raise TypeError(f"{where}: noise_std must be a float, got {type(noise_std).__name__}")
    if not math.isfinite(noise_std) or noise_std < 0:
        raise ValueError(f"{where}: noise_std must be finite and >= 0, got {noise_std}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"{where}: generator must be a torch.Generator or None, got {type(generator).__name__}; "
            "for a seed, give torch.Generator().manual_seed(seed)"
        )


def check_rows(where: str, input: Tensor, num_members: int) -> None:
    """Raise unless dim 0 of a stacked input holds the same number of rows for each member.

    Raises:
        NotImplementedError: a nested tensor.
        ValueError: it does not.
    """
    if input.is_nested:
        raise NotImplementedError(
            f"{where}: input must be no nested tensor where members run stacked; "
            "make nn.TransformerEncoder with enable_nested_tensor=False, or set use_nested_tensor = False on what is "
            "made (an nn.Transformer's encoder)"
        )
    if input.size(0) % num_members:
        raise ValueError(
            f"{where}: input.size(0)={input.size(0)} is not divisible by num_members={num_members}; "
            f"stack {num_members} equal minibatches along dim 0 (if they are, lp.check_members names the layer)"
        )


def member_mean(tensor: Tensor) -> Tensor:
    """Mean over dim 0 of [K, …], summed in float64: x_0 + mean(x_k − x_0), exactly x_0 where all members agree."""
    x = wide(tensor)
    first = x[0]
    mean = first + (x - first).mean(0)
    value = torch.where((x == first).all(0), first, mean).detach()  # keeps −0.0 and infinities
    value = value - (mean.detach() - mean).nan_to_num(0.0)  # − 0, whose gradient is the mean's: 1/K for every member
    return typed_like(value, tensor)


def replicate(tensor: Tensor, num_members: int) -> Tensor:
    """Return num_members copies of tensor, [K, …]."""
    return tensor.detach().unsqueeze(0).repeat(num_members, *[1] * tensor.dim())


def copy_marks(old: Tensor, new: Tensor) -> None:
    """Give a parameter that replaces another its attributes, such as those that groups of optimizers are made by."""
    vars(new).update({key: value for key, value in vars(old).items() if key not in ("num_members", REPLACED_BY)})


def replicate_parameter(
    parameter: Tensor, num_members: int, noise_std: float, generator: torch.Generator | None
) -> nn.Parameter:
    """Return the parameter [K, …] with φ_k = φ + noise_std · rms(φ) · ε_k, ε ~ N(0, I), rms over the whole tensor."""
    replicated = replicate(parameter, num_members)
    if noise_std > 0:
        device = parameter.device if generator is None else generator.device
        dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        noise = torch.randn(replicated.shape, generator=generator, device=device, dtype=dtype).to(parameter.device)
        rms = parameter.detach().to(dtype).square().mean().sqrt()
        replicated = (replicated.to(dtype) + noise_std * rms * noise).to(parameter.dtype)
    replicated = nn.Parameter(replicated, requires_grad=parameter.requires_grad)
    copy_marks(parameter, replicated)
    return replicated


def check_standard_forward(module: nn.Module, plain_type: type, children: tuple[str, ...] = ()) -> None:
    """Raise unless module computes what plain_type does: its forward, its parameters, no children but these.

    Raises:
        NotImplementedError: it does something more or other.
    """
    cls = type(module)
    name = f"{cls.__module__}.{cls.__qualname__}"
    standard = name == "timm.layers.linear.Linear"  # another forward, that differs under TorchScript alone
    overridden = [
        method
        for method in ("forward", "__call__", "_check_input_dim", "_conv_forward")
        if (getattr(cls, method, None) is not getattr(plain_type, method, None) and not standard)
        or method in vars(module)
    ]
    if overridden:
        raise NotImplementedError(
            f"{name} overrides {overridden[0]} of {plain_type.__name__}, which replacing it would lose; "
            f"use a plain {plain_type.__name__} and separate modules for the rest"
        )
    if set(module._parameters) != {"weight", "bias"} or not set(module._modules) <= set(children):
        raise NotImplementedError(
            f"{name} has other parameters than weight and bias (a parametrization?); remove it first, "
            "for example with torch.nn.utils.parametrize.remove_parametrizations"
        )
    if not set(module._buffers) <= {"running_mean", "running_var", "num_batches_tracked"}:
        raise NotImplementedError(
            f"{name} has other buffers than {plain_type.__name__}'s, which replacing it would lose; "
            "keep them in a module of their own"
        )


def check_plain(where: str, module: nn.Module, plain_type: type) -> None:
    """Raise unless module is of the torch.nn class plain_type, and can be replaced by what does the same.

    Raises:
        TypeError: it is of another class.
        NotImplementedError: it computes more than its class does, or others read its weight.
    """
    if not isinstance(module, plain_type):
        raise TypeError(f"{where}: module must be a {plain_type.__name__}, got {type(module).__name__}")
    check_standard_forward(module, plain_type)
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise NotImplementedError(
            f"{where}: module is the projection of an nn.MultiheadAttention, which reads its weight without "
            "calling it; choose another target"
        )


def check_own_forward(where: str, module: nn.Module) -> None:
    """Raise NotImplementedError if a call of module is not its class's forward."""
    cls = type(module)
    if "forward" in vars(module) or cls.__call__ is not nn.Module.__call__:
        raise NotImplementedError(
            f"{where}: {cls.__module__}.{cls.__qualname__} is called by other than its class's forward; undo that first"
        )


def is_observed(module: nn.Module) -> bool:
    """Whether somebody watches the calls of module, by hooks or a forward of its own."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def twin(module: nn.Module, cls: type) -> nn.Module:
    """Return a module of another class that shares module's parameters, buffers, children, hooks and attributes."""
    new = cls.__new__(cls)
    vars(new).update({k: v for k, v in vars(module).items() if k not in ("_compiled_call_impl", *_ROUTED_ATTRIBUTES)})
    for name in ("_parameters", "_buffers"):
        vars(new)[name] = vars(module)[name].copy()
    return new


def carry_over(old: nn.Module, new: nn.Module) -> None:
    """Give new the hooks, the training flag and the attributes of old that its own class does not set."""
    for key, value in vars(old).items():
        is_hooks = key.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))
        is_new = key not in vars(new) and key not in _OWN_ATTRIBUTES and key != "_compiled_call_impl"
        if is_hooks or key in ("training", "_is_full_backward_hook") or is_new:
            vars(new)[key] = value  # of hooks the same dict: handle.remove() goes on working


class MemberModule(Routed):
    """A module whose own parameters and buffers are replicated, but for the shared: [K, …], marked with num_members."""

    plain_type: type  # the class from_module saw, which collapse() gives back
    shared_names: frozenset[str] = frozenset()  # of the tensors that all members use as the plain module does

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._mark()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # fully_shard and others put parameters of their own in the places of these.
        if isinstance(value, nn.Parameter) and "num_members" in vars(self) and name not in self.shared_names:
            value.num_members = self.num_members

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_members={self.num_members}"

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._mark()
        return self

    def replicated_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that every member has of its own, [K, …], by name."""
        return {n: p for n, p in self._parameters.items() if p is not None and n not in self.shared_names}

    def _mark(self) -> None:
        """Set num_members on the replicated parameters, so that filters by ndim can tell them apart."""
        for parameter in self.replicated_parameters().values():
            parameter.num_members = self.num_members

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        """Load, giving every member a copy of a tensor that comes without the leading K (a plain checkpoint)."""
        for name, own in [*self.replicated_parameters().items(), *self._buffers.items()]:
            loaded = state_dict.get(prefix + name)
            if own is None or not isinstance(loaded, Tensor):
                continue
            if loaded.shape == own.shape[1:]:
                state_dict[prefix + name] = replicate(loaded, self.num_members)
            elif loaded.dim() == own.dim() and loaded.shape[1:] == own.shape[1:] and loaded.size(0) != own.size(0):
                error_messages = args[-1]
                error_messages.append(
                    f"{prefix}{name} has {loaded.size(0)} members in the checkpoint and {own.size(0)} in the model; "
                    f"expand the plain model with num_members={loaded.size(0)} before loading"
                )
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._mark()

    def _to_plain_type(self, plain: nn.Module) -> nn.Module:
        """Finish collapse(): the class the module came from, its flags, hooks and attributes."""
        if issubclass(self.plain_type, type(plain)):
            plain.__class__ = self.plain_type
        carry_over(self, plain)
        return plain

    @classmethod
    def _copies_of(
        cls, module: nn.Module, num_members: int, noise_std: float, generator: torch.Generator | None
    ) -> Any:
        """Return num_members copies of all parameters of a module; all else is shared with it."""
        new: Any = twin(module, cls)
        new.num_members, new.plain_type, new.routing = num_members, type(module), None
        for name, parameter in module._parameters.items():
            if parameter is not None:
                setattr(new, name, replicate_parameter(parameter, num_members, noise_std, generator))
        new._mark()
        return new

    def _as_plain(self, tensors: dict[str, Tensor | None]) -> nn.Module:
        """Return a module of the class this one came from, with these parameters, and all else shared."""
        plain = twin(self, self.plain_type)
        vars(plain)["_parameters"] = tensors  # tensors of the graph, too, where the plain module computes for a member
        return plain

    def _collapsed_to(self, means: dict[str, Tensor | None]) -> nn.Module:
        """Return the plain module whose parameters, named as the members', have these values."""
        own = self._parameters
        return self._as_plain({n: None if p is None else plain_parameter(means[n], p) for n, p in own.items()})

    def _members_of(self, members: range, tensor: Tensor | None) -> Tensor | None:
        """Return the rows of the active members, a view; tensor itself where all are active."""
        if tensor is None or len(members) == self.num_members:
            return tensor
        return tensor[members.start : members.stop]


def plain_parameter(value: Tensor, like: nn.Parameter) -> nn.Parameter:
    """Return a plain parameter of this value with the type and requires_grad of the replicated one."""
    return nn.Parameter(value.detach().to(like.dtype), requires_grad=like.requires_grad)
