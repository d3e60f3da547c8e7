"""Networks that no library has in this form."""

from .small_resnet import SmallResNet

__all__ = ["SmallResNet"]
