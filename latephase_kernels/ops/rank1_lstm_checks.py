"""What the arguments of rank1_lstm must be."""

from torch import Tensor

from .checks import check_like_input

_OP = "rank1_lstm"
_NAMES = (
    "h0",
    "c0",
    "weight_ih",
    "weight_hh",
    "input_gain_ih",
    "output_gain_ih",
    "input_gain_hh",
    "output_gain_hh",
    "bias",
)


def check_arguments(input: Tensor, *arguments: Tensor | None) -> None:
    """Raise the exception that names what does not fit and the remedy.

    Args:
        input: the op's first argument, which check_input has seen.
        arguments: the rest; only the last, bias, may be None.
    """
    others = dict(zip(_NAMES, arguments))
    for name, tensor in others.items():
        if not isinstance(tensor, Tensor) and (name != "bias" or tensor is not None):
            raise TypeError(f"{_OP}: {name} must be a Tensor, got {type(tensor).__name__}")
    if input.dim() != 3 or input.size(0) < 1:
        raise ValueError(f"{_OP}: input must be [T, K·B, in] with at least one step, got shape {list(input.shape)}")
    num_members, units = _sizes(others)
    _, rows, features = input.shape
    if rows % num_members:
        raise ValueError(
            f"{_OP}: input.size(1)={rows} is not divisible by the {num_members} members of input_gain_ih; "
            f"stack {num_members} equal minibatches along dim 1"
        )
    shapes = {
        "h0": [rows, units],
        "c0": [rows, units],
        "weight_ih": [4 * units, features],
        "weight_hh": [4 * units, units],
        "input_gain_ih": [num_members, features],
        "output_gain_ih": [num_members, 4 * units],
        "input_gain_hh": [num_members, units],
        "output_gain_hh": [num_members, 4 * units],
        "bias": [num_members, 4 * units],
    }
    for name, tensor in others.items():
        if tensor is None:
            continue
        shared_bias = name == "bias" and list(tensor.shape) == shapes[name][1:]
        if list(tensor.shape) != shapes[name] and not shared_bias:
            expected = f"{shapes[name]} or {shapes[name][1:]}" if name == "bias" else f"{shapes[name]}"
            raise ValueError(
                f"{_OP}: {name} must have shape {expected} for {num_members} members, {units} units and input of "
                f"shape {list(input.shape)}, got {list(tensor.shape)}"
            )
        check_like_input(_OP, name, tensor, input)


def _sizes(others: dict[str, Tensor | None]) -> tuple[int, int]:
    """Return K and H, which two of the arguments say."""
    gain, weight = others["input_gain_ih"], others["weight_hh"]
    assert gain is not None and weight is not None
    if gain.dim() != 2 or gain.size(0) < 1:
        raise ValueError(
            f"{_OP}: input_gain_ih must be [K, in] with at least one member (K), got shape {list(gain.shape)}"
        )
    if weight.dim() != 2:
        raise ValueError(f"{_OP}: weight_hh must be [4H, H], got shape {list(weight.shape)}")
    return gain.size(0), weight.size(1)
