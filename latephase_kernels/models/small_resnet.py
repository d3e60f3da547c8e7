"""A small residual network with batch norm for 8×8 images: 31,000 parameters in plain PyTorch modules."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import relu


class ResidualBlock(nn.Module):
    """relu(norm2(conv2(drop(relu(norm1(conv1(x)))))) + shortcut(x)): [N, Cin, H, W] → [N, Cout, H/stride, W/stride]."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, dropout: float = 0.0):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.drop = nn.Dropout(dropout) if dropout else nn.Identity()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = relu(self.norm1(self.conv1(x)))
        return relu(self.norm2(self.conv2(self.drop(y))) + self.shortcut(x))


class SmallResNet(nn.Module):
    """Stem, one residual block a width (each but the first halves the image), global average pooling, linear head.

    Args:
        num_classes: outputs of the head.
        in_channels: channels of the images.
        widths: channels of the blocks; the stem has as many as the first.
        dropout: inside each block; 0 for none.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        widths: Sequence[int] = (16, 24, 32),
        *,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        block_inputs = (widths[0], *widths[:-1])
        self.blocks = nn.Sequential(
            *(
                ResidualBlock(block_input, width, stride=1 if index == 0 else 2, dropout=dropout)
                for index, (block_input, width) in enumerate(zip(block_inputs, widths, strict=True))
            )
        )
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, in_channels, H, W] to logits [N, num_classes]."""
        y = self.blocks(relu(self.norm(self.conv(x))))
        return self.head(y.mean((2, 3)))
