"""Member gain in plain PyTorch.

    y = activation( x · gain_k + bias_k )

Shapes: K members, B rows a member, C channels; input [K·B, *, C, *], its C at dimension channel_dim; gain [K, C];
bias [K, C] or [C]. Differentiable to any order by autograd, and usable under every torch.func transform.
"""

from torch import Tensor

from .activation import activate
from .precision import working_dtype


def member_gain(input: Tensor, gain: Tensor, bias: Tensor | None, channel_dim: int, activation: str) -> Tensor:
    """Return y in input's type; channel_dim counts from the front."""
    dtype = working_dtype(input)
    x = input.to(dtype).unflatten(0, (gain.size(0), input.size(0) // gain.size(0)))  # [K, B, *, C, *]
    trailing = [1] * (input.dim() - channel_dim - 1)

    def along_channels(parameter: Tensor) -> Tensor:
        leading = [parameter.size(0), *[1] * channel_dim] if parameter.dim() == 2 else []
        return parameter.to(dtype).reshape(*leading, parameter.size(-1), *trailing)

    z = x * along_channels(gain)
    if bias is not None:
        z = z + along_channels(bias)
    return activate(z.flatten(0, 1).to(input.dtype), activation)
