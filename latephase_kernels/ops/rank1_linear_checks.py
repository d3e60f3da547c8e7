"""What the arguments of rank1_linear must be."""

from torch import Tensor

from .checks import check_input, check_per_member

_OP = "rank1_linear"


def check_arguments(
    input: Tensor, weight: Tensor, input_gain: Tensor, output_gain: Tensor, bias: Tensor | None
) -> None:
    """Raise the exception that names what does not fit and the remedy."""
    check_input(_OP, input)
    if input.dim() < 2:
        raise ValueError(f"{_OP}: input must be [K·B, …, in], got shape {list(input.shape)}")
    for name, tensor in (("weight", weight), ("input_gain", input_gain), ("output_gain", output_gain)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{_OP}: {name} must be a Tensor, got {type(tensor).__name__}")
    in_features = input.size(-1)
    if weight.dim() != 2 or weight.size(1) != in_features:
        raise ValueError(
            f"{_OP}: weight must be [out, {in_features}] for input of shape {list(input.shape)}, "
            f"got shape {list(weight.shape)}"
        )
    out_features = weight.size(0)
    check_per_member(_OP, "weight", weight, input, ((out_features, in_features),))
    num_members = input_gain.size(0) if input_gain.dim() == 2 else 0
    if num_members < 1:
        raise ValueError(
            f"{_OP}: input_gain must be [K, {in_features}] with at least one member (K), "
            f"got shape {list(input_gain.shape)}"
        )
    check_per_member(_OP, "input_gain", input_gain, input, ((num_members, in_features),))
    check_per_member(_OP, "output_gain", output_gain, input, ((num_members, out_features),))
    if bias is not None:
        check_per_member(_OP, "bias", bias, input, ((num_members, out_features), (out_features,)))
    if input.size(0) % num_members:
        raise ValueError(
            f"{_OP}: input.size(0)={input.size(0)} is not divisible by the {num_members} members of input_gain; "
            f"stack {num_members} equal minibatches along dim 0"
        )
