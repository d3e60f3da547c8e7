"""Wide residual networks whose convolutions and head are mixed from shared templates, by an embedding a layer.

Source: Savarese & Maire, "Learning Implicitly Recurrent CNNs Through Parameter Sharing", ICLR 2019; von Oswald et al.,
ICLR 2021, section 2 (late-phase hypernetwork, CIFAR-100), with the sizes of its authors' code.
"""

import torch
from torch import nn

from ..nn.hypernetwork import HyperConv2d, HyperLayer, HyperLinear, TemplateBank, orthogonal_embeddings_
from .wide_resnet import WideResNet

_END_TEMPLATES = 10  # of the input layer, and of the head


class HyperWideResNet(WideResNet):
    """A WideResNet with one template bank for all weights of a shape; modules have the WideResNet's names.

    A stage of n blocks has banks of 2·n − 1 templates. Where a bank's templates cover half of the input channels of the
    stage's later convolutions, these take two slices and the bank has twice as many. Input layer and head have banks
    of 10 templates each. Embeddings should not decay:
    `names = model.no_weight_decay()`, `param_groups(model, …, no_decay=lambda name, _: name in names)`.

    Args:
        depth, width, num_classes, dropout, in_channels: as in WideResNet.

    Raises:
        ValueError: depth is not 6·n + 4 with n >= 1.
    """

    def __init__(self, depth: int, width: int, num_classes: int, *, dropout: float = 0.0, in_channels: int = 3):
        with torch.device("meta"):  # the weights to be replaced never have memory
            super().__init__(depth, width, num_classes, dropout=dropout, in_channels=in_channels)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.to_empty(device=torch.get_default_device()).reset_parameters()
        self.add_module("conv1", HyperConv2d(TemplateBank(_END_TEMPLATES, self.conv1.weight.shape), padding=1))
        banks: dict[torch.Size, TemplateBank] = {}
        for stage in (self.stage1, self.stage2, self.stage3):
            for block in stage:
                for name, conv in block.named_children():
                    if isinstance(conv, nn.Conv2d):
                        block.add_module(name, _hyper_conv(conv, 2 * len(stage) - 1, banks))
        self.add_module("fc", HyperLinear(TemplateBank(_END_TEMPLATES, self.fc.weight.shape, bias=True)))
        orthogonal_embeddings_(module for module in self.modules() if isinstance(module, HyperLayer))

    def no_weight_decay(self) -> set[str]:
        """Return the names of the embeddings; they are the same in the expanded model."""
        return {f"{name}.embedding" for name, module in self.named_modules() if isinstance(module, HyperLayer)}

    def state_dict(self, *, destination=None, prefix: str = "", keep_vars: bool = False):
        """Return the state with every bank once, under the first of its layers, as safetensors and averages need it."""
        state = super().state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        for name in self._repeated():
            del state[prefix + name]
        return state

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        for name, first in self._repeated().items():
            if prefix + first in state_dict:
                state_dict[prefix + name] = state_dict[prefix + first]
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _repeated(self) -> dict[str, str]:
        """Return the further names of the banks' tensors, with the first name of each."""
        first = {id(parameter): name for name, parameter in self.named_parameters()}
        names = self.named_parameters(remove_duplicate=False)
        return {name: first[id(parameter)] for name, parameter in names if name != first[id(parameter)]}


def _hyper_conv(conv: nn.Conv2d, num_templates: int, banks: dict[torch.Size, TemplateBank]) -> HyperConv2d:
    """Return the layer for a block's convolution, with the bank of its templates' shape, made if need be."""
    num_slices = 2 if conv.kernel_size == (3, 3) and conv.in_channels == conv.out_channels else 1
    shape = torch.Size((conv.out_channels, conv.in_channels // num_slices, *conv.kernel_size))
    if shape not in banks:
        halves = conv.kernel_size == (3, 3) and 2 * shape[1] == conv.out_channels
        fan_in = shape[1:].numel() * (2 if halves else 1)
        banks[shape] = TemplateBank(num_templates * (2 if halves else 1), shape, fan_in=fan_in)
    return HyperConv2d(banks[shape], num_slices, stride=conv.stride, padding=conv.padding)
