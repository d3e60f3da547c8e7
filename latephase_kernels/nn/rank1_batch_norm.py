"""Rank-1 layers beside a batch norm, which takes their gains over: no pass over memory for a gain.

An output gain directly before the norm becomes part of its statistics, an input gain directly behind it, or behind its
activation, a factor of its output.

Shapes: K members; output_gain [K, out], input_gain [K, in], bias [out] or [K, out].
"""

import torch
from torch import Tensor

from ..ops import rank1_linear
from .rank1 import Rank1Linear, _Rank1
from .routed_batch_norm import RoutedBatchNorm

Gain = tuple[Tensor, Tensor | None]  # output gain [K, out] and bias, of the members that run


def without_output_gain(
    layer: _Rank1, norm: RoutedBatchNorm, input: Tensor, multiplied: bool = False
) -> tuple[Tensor, Gain | None]:
    """Return what norm takes in place of layer(input, multiplied): that without output gain and bias, and these two.

    Where the norm does not use statistics of its own rows, or the gain costs nothing in the layer, the layer's output
    and None. Either way norm(*, input_gain=*) is norm(layer(input, multiplied)).
    """
    group = norm._statistics_ranks()
    if (
        not _run_together(layer, norm)
        or _normalizes_by_running(norm)
        or (group is not None and group.size > 1)
        or (isinstance(layer, Rank1Linear) and _gain_is_free(layer, input))
    ):
        return layer(input, multiplied), None
    return layer.without_output_gain(input, multiplied)


def input_gain_for(layer: _Rank1, norm: RoutedBatchNorm, input: Tensor) -> Tensor | None:
    """Return the input gain of layer that norm multiplies its output by, as the layer that alone takes it would.

    [K, in] of the members that run; None where the layer has to: it does not run stacked, or the gain costs it nothing.

    Args:
        input: the norm's.
    """
    if (
        not _run_together(layer, norm)
        or layer.input_gain.size(1) != norm.num_features
        or input.dim() != layer._min_dim
        or (isinstance(layer, Rank1Linear) and _gain_is_free(layer, input))
    ):
        return None
    gain = layer._members_of(layer.active_members(), layer.input_gain)
    return gain.to(torch.promote_types(input.dtype, gain.dtype))


def _run_together(layer: _Rank1, norm: RoutedBatchNorm) -> bool:
    """Whether both run the same members, stacked, with kernels."""
    members = layer.active_members()
    return not isinstance(members, str) and members == norm.active_members() and layer.weight.device.type != "meta"


def _normalizes_by_running(norm: RoutedBatchNorm) -> bool:
    return not (norm.training or norm.running_mean is None or norm.running_var is None)


def _gain_is_free(layer: Rank1Linear, input: Tensor) -> bool:
    """Whether the layer's gains cost it no pass over rows, or the norm's channels are not its features."""
    return input.dim() != 2 or not rank1_linear.passes_over_rows(input, layer.weight, len(layer.active_members()))
