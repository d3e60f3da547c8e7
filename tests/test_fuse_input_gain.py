"""Rank-1 input gains that become a factor of the batch norm's output before them: values, gradients, and what is left.

Shapes: K members.
"""

import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from fuse_blocks import K, assert_same, fused_patterns, images
from torch import nn

import latephase_kernels as lp
from latephase_kernels.models.wide_resnet import WideBlock
from latephase_kernels.ops import rank1_linear


class Head(nn.Module):
    """BN → linear, BN → ReLU → linear."""

    def __init__(self, **options):
        super().__init__()
        self.bn1, self.linear1 = nn.BatchNorm1d(32, **options), nn.Linear(32, 40)
        self.bn2, self.same, self.linear2 = nn.BatchNorm1d(40, **options), nn.Identity(), nn.Linear(40, 24)

    def forward(self, x):
        x = self.linear1(self.bn1(x.mean((2, 3))))
        return self.linear2(self.same(F.relu(self.same(self.bn2(x)))))


class Network(nn.Sequential):
    """BN → convolution and BN → ReLU → convolution; grouped, strided and biased ones; a pre-activation block."""

    def __init__(self, **options):
        wide = WideBlock(6, 6, 1, 0.0)
        for name in ("bn1", "bn2"):
            setattr(wide, name, nn.BatchNorm2d(6, **options))
        super().__init__(
            *(nn.BatchNorm2d(3, **options), nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6, **options)),
            *(nn.ReLU(inplace=True), nn.Conv2d(6, 6, 3, groups=2, stride=2), nn.Identity(), wide),
            *(nn.BatchNorm2d(6, **options), nn.ReLU(), nn.Conv2d(6, 32, 1), Head(**options)),
        )


PATTERNS = Counter({"BN → gain": 2, "BN → ReLU → gain": 2, "gain → BN → ReLU → gain": 3})


def make_pair(model, targets=("rank1",), dtype=torch.float64):
    """An expanded network whose gains have both signs and zeros, and its fused twin."""
    torch.manual_seed(0)
    plain = lp.expand(model.to(dtype), K, targets=targets)
    for name, parameter in plain.named_parameters():
        nn.init.normal_(parameter)
        if name.endswith("gain"):
            parameter.data[:, ::3] = 0
    return plain, lp.fuse(copy.deepcopy(plain))


@pytest.fixture(autouse=True)
def gains_over_rows(monkeypatch):
    """Linear layers so small would take their gains into their products."""
    monkeypatch.setattr(rank1_linear, "_way", lambda *arguments: rank1_linear.by_rows)


@pytest.fixture
def passes(monkeypatch):
    """Count the passes over memory for a gain, forward."""
    calls = []
    member_gain = lp.nn.rank1.member_gain

    def spy(*arguments, **options):
        calls.append(arguments)
        return member_gain(*arguments, **options)

    monkeypatch.setattr(lp.nn.rank1, "member_gain", spy)
    return calls


@pytest.mark.parametrize(
    "targets, options",
    [
        (("rank1",), {}),
        (("rank1", "batch_norm"), {}),
        (("rank1", "batch_norm"), {"momentum": None}),
        (("rank1",), {"affine": False}),
        (("rank1", "batch_norm"), {"track_running_stats": False}),
    ],
    ids=lambda value: "+".join(value) or "defaults",
)
def test_values_gradients_and_running_statistics(targets, options, passes):
    plain, fused = make_pair(Network(**options), targets)
    assert fused_patterns(fused) == PATTERNS and plain.state_dict().keys() == fused.state_dict().keys()
    for seed in range(2):
        assert_same(plain, fused, [images(4 * K, size=8, seed=seed)], floor=1.0)
    for which in (1, range(1, 2)):
        with lp.members(plain, which), lp.members(fused, which):
            assert_same(plain, fused, [images(4, size=8)], floor=1.0)
    passes.clear()
    fused(images(4 * K, size=8))
    assert (
        len(passes) == 4
    )  # output gains without a batch norm behind: of two convolutions, the block, and the last layer


@pytest.mark.parametrize("targets", [("rank1",), ("rank1", "batch_norm")], ids=("shared", "own"))
def test_frozen_averaged_and_collapsed(targets, passes):
    plain, fused = make_pair(Network(), targets)
    plain[7].eval(), fused[7].eval()  # normalizes by running statistics in a stacked pass
    assert_same(plain, fused, [images(4 * K, size=8)], floor=1.0)
    passes.clear()
    copy.deepcopy(fused)(images(4 * K, size=8))
    assert len(passes) == 4
    with lp.members(plain, "stacked"), lp.members(fused, "stacked"):
        plain.eval(), fused.eval()
        assert_same(plain, fused, [images(4 * K, size=8)], floor=1.0)
    assert_same(plain, fused, [images(4, size=8)], floor=1.0)
    lp.collapse(plain), lp.collapse(fused)
    assert not any(isinstance(module, lp.nn.Rank1Conv2d) for module in fused.modules())
    assert_same(plain, fused, [images(4, size=8)], floor=1.0)


def test_in_other_types_compiled_and_under_autocast():
    plain, fused = make_pair(Network(), ("rank1", "batch_norm"), torch.float32)
    x = images(4 * K, size=8, dtype=torch.float32)
    exact = copy.deepcopy(plain).double()(x.double())
    torch._dynamo.reset()
    expected = copy.deepcopy(fused)(x)
    torch.testing.assert_close(torch.compile(fused, backend="aot_eager", fullgraph=True)(x), expected)

    def of_half(model):
        return copy.deepcopy(model).bfloat16()(x.bfloat16())

    def under_autocast(model):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    for function in (of_half, under_autocast):
        own, others = function(fused), function(plain)
        assert own.dtype == others.dtype
        error, allowed = ((y.double() - exact).norm() / exact.norm() for y in (own, others))
        assert error <= 2 * allowed + 2**-8


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.conv, self.other = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.drop = nn.Dropout(0.5)


def shortcut_of_the_activated(self, x):
    y = F.relu(self.bn(x))
    return self.conv(y) + y


def shortcut_of_the_normalized(self, x):
    y = self.bn(x)
    return self.conv(y) + y


def layer_called_before(self, x):
    y = F.relu(self.bn(x))
    return self.conv(self.conv(x) + self.conv(y))


def part_used_before(self, x):
    y = F.relu(self.bn(x))
    gain = self.conv.input_gain * 2
    return self.conv(y) * gain.mean()


def something_between(self, x):
    return self.conv(self.drop(F.relu(self.bn(x))))


def other_activation(self, x):
    return self.conv(torch.tanh(self.bn(x)))


def behind_a_silu(self, x):  # its gain would be no factor of Σ dz and Σ dz·x̂
    return self.conv(F.silu(self.bn(x)))


def residual(self, x):
    return self.conv(F.relu(self.bn(x) + x))


def two_layers(self, x):
    y = F.relu(self.bn(x))
    return self.conv(y) + self.other(y)


LEFT = (
    *(shortcut_of_the_activated, shortcut_of_the_normalized, layer_called_before, part_used_before),
    *(something_between, other_activation, behind_a_silu, residual, two_layers),
)


def make_block(forward):
    return make_pair(type(forward.__name__, (Block,), {"forward": forward})())


@pytest.mark.parametrize("forward", LEFT, ids=lambda forward: forward.__name__)
def test_left_to_the_layer(forward):
    plain, fused = make_block(forward)
    assert not any("→ gain" in pattern for pattern in fused_patterns(fused))
    assert_same(plain, fused, [images(2 * K, size=4)], floor=1.0)


def layer_called_between(self, x):
    y = F.relu(self.bn(x))
    return self.other(x) + self.conv(y)


def test_another_layer_between_is_no_obstacle():
    plain, fused = make_block(layer_called_between)
    assert fused_patterns(fused) == Counter({"BN → ReLU → gain": 1})
    assert_same(plain, fused, [images(2 * K, size=4)], floor=1.0)


def test_who_watches_a_layer_sees_what_it_computes():
    plain, _ = make_block(layer_called_between)
    seen = []

    def look(module, inputs, output):
        seen.append(inputs[0])

    plain.conv.register_forward_hook(look)
    fused = lp.fuse(copy.deepcopy(plain))
    assert fused_patterns(fused) == Counter({"BN → ReLU": 1})
    for model in (plain, fused):
        model(images(2 * K, size=4))
    _, later = make_block(layer_called_between)
    later.conv.register_forward_hook(look)
    later(images(2 * K, size=4))
    torch.testing.assert_close(seen[0], seen[1])
    torch.testing.assert_close(seen[0], seen[2])


def test_sizes_that_do_not_fit_raise_what_the_layer_raises():
    _, fused = make_block(layer_called_between)
    other = lp.nn.Rank1Conv2d(4, 3, 1, K).double()
    vars(fused.conv).update({name: vars(other)[name] for name in ("_parameters", "in_channels")})
    with pytest.raises(ValueError, match=r"Rank1Conv2d: input must be \[K·B, 4, H, W\]"):
        fused(images(2 * K, size=4))
