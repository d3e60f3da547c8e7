"""What the arguments of member_gain must be."""

from torch import Tensor

from .checks import check_activation, check_input, check_per_member

_OP = "member_gain"


def _check_channel_dim(input: Tensor, channel_dim: int) -> int:
    if isinstance(channel_dim, bool) or not isinstance(channel_dim, int):
        raise TypeError(f"{_OP}: channel_dim must be an int, got {type(channel_dim).__name__}")
    positive = channel_dim + input.dim() if channel_dim < 0 else channel_dim
    if not 1 <= positive < input.dim():
        raise ValueError(
            f"{_OP}: channel_dim must be 1 to {input.dim() - 1} or -1 to {1 - input.dim()} for input of shape "
            f"{list(input.shape)} (dim 0 holds the members), got {channel_dim}"
        )
    return positive


def check_arguments(input: Tensor, gain: Tensor, bias: Tensor | None, channel_dim: int, activation: str) -> int:
    """Return channel_dim counted from the front, or raise the exception that names what does not fit and the remedy."""
    check_input(_OP, input)
    if input.dim() < 2:
        raise ValueError(f"{_OP}: input must be [K·B, C, *] or [K·B, *, C], got shape {tuple(input.shape)}")
    channel_dim = _check_channel_dim(input, channel_dim)
    check_activation(_OP, activation, ("none", "relu"))
    if not isinstance(gain, Tensor):
        raise TypeError(f"{_OP}: gain must be a Tensor, got {type(gain).__name__}")
    num_members = gain.size(0) if gain.dim() == 2 else 0
    if num_members < 1:
        raise ValueError(
            f"{_OP}: gain must be [K, C] with at least one member (K) and {input.size(channel_dim)} channels (C), "
            f"got shape {list(gain.shape)}"
        )
    per_member = (num_members, input.size(channel_dim))
    check_per_member(_OP, "gain", gain, input, (per_member,))
    if input.size(0) % num_members:
        raise ValueError(
            f"{_OP}: input.size(0)={input.size(0)} is not divisible by the {num_members} members of gain; "
            f"stack {num_members} equal minibatches along dim 0"
        )
    if bias is not None:
        check_per_member(_OP, "bias", bias, input, (per_member, per_member[1:]))
    return channel_dim
