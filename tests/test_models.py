"""Networks of the package: their sizes are those of the papers."""

import pytest
import torch
import torch.nn.functional as F

from latephase_kernels.models import WideResNet


def test_wide_resnet_is_the_papers():
    """36.5 M parameters (WRN-28-10), and the residual function written out."""
    assert sum(parameter.numel() for parameter in WideResNet(28, 10, 10).parameters()) == 36_479_194
    torch.manual_seed(0)
    model = WideResNet(10, 1, 3).eval().double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    y = F.conv2d(x, model.conv1.weight, padding=1)
    for stage, stride in (("stage1", 1), ("stage2", 2), ("stage3", 2)):
        (block,) = getattr(model, stage)
        a = F.relu(block.bn1(y))
        b = F.conv2d(a, block.conv1.weight, stride=stride, padding=1)
        b = F.conv2d(F.relu(block.bn2(b)), block.conv2.weight, padding=1)
        y = b + (y if block.shortcut is None else F.conv2d(a, block.shortcut.weight, stride=stride))
        assert (block.shortcut is None) == (stage == "stage1")
    expected = F.linear(F.relu(model.bn(y)).mean((2, 3)), model.fc.weight, model.fc.bias)
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(ValueError, match="depth must be 6·n \\+ 4 .*got 18"):
        WideResNet(18, 1, 3)
