"""Networks that no model library has in this form."""

from .small_resnet import SmallResNet
from .wide_resnet import WideResNet

__all__ = ["SmallResNet", "WideResNet"]
