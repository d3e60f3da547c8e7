"""Networks that no model library has in this form."""

from .char_lstm import CharLSTM
from .small_resnet import SmallResNet
from .wide_resnet import WideResNet

__all__ = ["CharLSTM", "SmallResNet", "WideResNet"]
