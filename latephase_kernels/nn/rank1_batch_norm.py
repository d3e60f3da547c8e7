"""A rank-1 layer directly before a batch norm: its output gain becomes part of the norm's statistics.

Shapes: K members; output_gain [K, out], bias [out].
"""

from torch import Tensor

from ..ops import rank1_linear
from .batch_norm import _EnsembleBatchNorm
from .rank1 import Rank1Conv2d, Rank1Linear
from .shared_batch_norm import _SharedBatchNorm

Gain = tuple[Tensor, Tensor | None]  # output gain [K, out] and bias, of the members that run


def without_output_gain(
    layer: Rank1Conv2d | Rank1Linear, norm: _EnsembleBatchNorm | _SharedBatchNorm, input: Tensor
) -> tuple[Tensor, Gain | None]:
    """Return what norm takes in place of layer(input): that without output gain and bias, and these two.

    Where the norm does not use statistics of its own rows, or the gain costs nothing in the layer, layer(input) and
    None. Either way norm(*, gain=*) is norm(layer(input)).
    """
    members = layer.active_members()
    group = norm._statistics_ranks()
    if (
        isinstance(members, str)
        or members != norm.active_members()
        or not (norm.training or norm.running_mean is None or norm.running_var is None)
        or (group is not None and group.size > 1)
        or layer.weight.device.type == "meta"
    ):
        return layer(input), None
    if isinstance(layer, Rank1Linear) and (input.dim() != 2 or _gain_is_free(layer, input, len(members))):
        return layer(input), None
    return layer.without_output_gain(input)


def _gain_is_free(layer: Rank1Linear, input: Tensor, num_members: int) -> bool:
    """Whether the layer multiplies its gains into the weight."""
    return rank1_linear._folds(input.size(0) // num_members, layer.in_features, layer.out_features)
