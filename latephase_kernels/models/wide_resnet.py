"""Wide residual networks for 32×32 images, which neither torchvision nor timm has: batch norm, ReLU, convolution.

Source: Zagoruyko & Komodakis, "Wide Residual Networks", BMVC 2016 (WRN-28-10 in von Oswald et al., ICLR 2021).
"""

import torch.nn.functional as F
from torch import Tensor, nn


class WideBlock(nn.Module):
    """x + conv(drop(relu(bn(conv(relu(bn(x))))))); the shortcut is a 1×1 convolution where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, dropout: float):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.drop = nn.Dropout(dropout) if dropout else nn.Identity()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = None if same else nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in, H, W] to [N, out, H / stride, W / stride]."""
        activated = F.relu(self.bn1(x))
        y = self.conv1(activated)
        y = self.conv2(self.drop(F.relu(self.bn2(y))))
        return y + (x if self.shortcut is None else self.shortcut(activated))


def _stage(blocks: int, in_channels: int, out_channels: int, stride: int, dropout: float) -> nn.Sequential:
    first = WideBlock(in_channels, out_channels, stride, dropout)
    return nn.Sequential(first, *(WideBlock(out_channels, out_channels, 1, dropout) for _ in range(blocks - 1)))


class WideResNet(nn.Module):
    """WRN-depth-width: three stages of (depth − 4) / 6 blocks with 16, 32 and 64 times width channels.

    Args:
        depth: layers counted as the paper does: 6·n + 4.
        width: the widening factor.
        num_classes: outputs.
        dropout: inside each block; 0 for none.
        in_channels: of the images.

    Raises:
        ValueError: depth is not 6·n + 4 with n >= 1.
    """

    def __init__(self, depth: int, width: int, num_classes: int, *, dropout: float = 0.0, in_channels: int = 3):
        super().__init__()
        blocks, remainder = divmod(depth - 4, 6)
        if remainder or blocks < 1:
            raise ValueError(f"WideResNet: depth must be 6·n + 4 (10, 16, 22, 28, 40, …), got {depth}")
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        self.stage1 = _stage(blocks, 16, 16 * width, 1, dropout)
        self.stage2 = _stage(blocks, 16 * width, 32 * width, 2, dropout)
        self.stage3 = _stage(blocks, 32 * width, 64 * width, 2, dropout)
        self.bn = nn.BatchNorm2d(64 * width)
        self.fc = nn.Linear(64 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return class logits [N, num_classes] for images [N, in_channels, H, W]."""
        x = self.stage3(self.stage2(self.stage1(self.conv1(x))))
        return self.fc(F.relu(self.bn(x)).mean((2, 3)))
