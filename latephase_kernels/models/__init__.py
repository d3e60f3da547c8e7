"""Networks that no model library has in this form."""

from .char_lstm import CharLSTM
from .hypernetwork_wide_resnet import HyperWideResNet
from .small_resnet import SmallResNet
from .wide_resnet import WideResNet

__all__ = ["CharLSTM", "HyperWideResNet", "SmallResNet", "WideResNet"]
