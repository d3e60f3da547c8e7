"""What every op asks of its arguments before it changes anything; an op's own demands are in `<op>_checks.py`."""

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_num_members(op: str, num_members: int) -> None:
    """Raise unless num_members is an int ≥ 1."""
    if isinstance(num_members, bool) or not isinstance(num_members, (int, torch.SymInt)):
        raise TypeError(f"{op}: num_members must be an int, got {type(num_members).__name__}")
    if num_members < 1:
        raise ValueError(f"{op}: num_members must be at least 1, got {num_members}")


def check_activation(op: str, activation: str, known: tuple[str, ...]) -> None:
    """Raise unless activation is one of the known names."""
    if not isinstance(activation, str):
        raise TypeError(f"{op}: activation must be a str, got {type(activation).__name__}")
    if activation not in known:
        raise ValueError(f"{op}: activation must be one of {', '.join(known)}, got {activation!r}")


def check_input(op: str, input: Tensor) -> None:
    """Raise unless input is a strided tensor of a floating type that there are kernels for."""
    if not isinstance(input, Tensor):
        raise TypeError(f"{op}: input must be a Tensor, got {type(input).__name__}")
    if input.layout != torch.strided or input.is_nested:
        raise NotImplementedError(f"{op}: input must be a dense strided tensor, got layout {input.layout}")
    if input.dtype not in DTYPES:
        raise NotImplementedError(
            f"{op}: input must be float32, float64, bfloat16 or float16, got {input.dtype}; convert it with .float()"
        )


def check_strided(op: str, name: str, tensor: Tensor) -> None:
    """Raise unless tensor is dense, not sparse or nested."""
    if tensor.layout != torch.strided:
        raise NotImplementedError(
            f"{op}: {name} must be a dense strided tensor, got layout {tensor.layout}; convert it with .to_dense()"
        )


def check_per_member(op: str, name: str, tensor: Tensor, input: Tensor, shapes: tuple[tuple[int, ...], ...]) -> None:
    """Raise unless tensor has one of the shapes, input's device, and input's type or the accumulation type."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor or None, got {type(tensor).__name__}")
    if tuple(tensor.shape) not in shapes:
        expected = " or ".join(f"[{', '.join(map(str, shape))}]" for shape in shapes)
        raise ValueError(f"{op}: {name} must have shape {expected} (members, channels), got {list(tensor.shape)}")
    check_like_input(op, name, tensor, input)


def check_like_input(op: str, name: str, tensor: Tensor, input: Tensor) -> None:
    """Raise unless tensor is strided and has input's device, and input's type or the accumulation type."""
    check_strided(op, name, tensor)
    allowed = (torch.float64,) if input.dtype == torch.float64 else (torch.float32, input.dtype)
    if tensor.dtype not in allowed:
        raise NotImplementedError(
            f"{op}: {name} must be {' or '.join(map(str, dict.fromkeys(allowed)))} for {input.dtype} input, "
            f"got {tensor.dtype}; convert it with .to({allowed[0]})"
        )
    if tensor.device != input.device:
        raise ValueError(
            f"{op}: {name} is on {tensor.device}, input on {input.device}; move one of them with .to(device)"
        )
