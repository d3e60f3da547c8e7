"""Rank-1 output gains that become part of the batch norm behind them: values, gradients and running statistics."""

import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from fuse_blocks import B, K, assert_same, fused_patterns, images
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import latephase_kernels as lp
from latephase_kernels.ops.ensemble_batch_norm_gain import normalize_with_gain
from latephase_kernels.reference import ensemble_batch_norm as norm_reference
from latephase_kernels.reference import member_gain as gain_reference


class Network(nn.Module):
    """Every pattern: before BN alone, BN → ReLU and BN → add → ReLU; grouped, strided and biased convolutions."""

    def __init__(self, **options):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4, **options)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(4, **options)
        self.down = nn.Sequential(nn.Conv2d(4, 6, 1, stride=2), nn.BatchNorm2d(6, **options))
        self.linear1, self.bn3 = nn.Linear(6, 5), nn.BatchNorm1d(5, **options)
        self.linear2 = nn.Linear(5, 3)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)) + y)
        y = self.down(y).mean((2, 3))
        return self.linear2(torch.relu(self.bn3(self.linear1(y))))


PATTERNS = Counter({"gain → BN → ReLU": 1, "gain → BN → ReLU → gain": 1, "gain → BN → add → ReLU": 1, "gain → BN": 1})


# Beside a floor: where the mean takes a bias away, or the scale a gain, the gradient is 0 or of the size of eps, and
# what the unfused ops have of it is mostly rounding.


def make_pair(targets=("rank1",), dtype=torch.float64, **options):
    """An expanded network whose gains have both signs and zeros, and its fused twin."""
    torch.manual_seed(0)
    plain = lp.expand(Network(**options).to(dtype), K, targets=targets)
    for name, parameter in plain.named_parameters():
        nn.init.normal_(parameter)
        if name.endswith("gain"):
            parameter.data[:, ::3] = 0
    return plain, lp.fuse(copy.deepcopy(plain))


@pytest.mark.parametrize(
    "targets, options",
    [
        (("rank1",), {}),
        (("rank1_bias",), {}),
        (("rank1", "batch_norm"), {}),
        (("rank1",), {"momentum": None}),
        (("rank1_bias", "batch_norm"), {"affine": False}),
        (("rank1",), {"track_running_stats": False}),
        (("rank1", "batch_norm"), {"momentum": None, "eps": 0.7}),
    ],
    ids=lambda value: "+".join(value) or "defaults",
)
def test_values_gradients_and_running_statistics(targets, options):
    plain, fused = make_pair(targets, **options)
    assert fused_patterns(fused) == PATTERNS
    for seed in range(2):
        assert_same(plain, fused, [images(8 * K, size=8, seed=seed)], floor=1.0)
    for which in ("stacked", 1, range(1, 2)):
        with lp.members(plain, which), lp.members(fused, which):
            assert_same(plain, fused, [images(8 * (K if which == "stacked" else 1), size=8)], floor=1.0)


@pytest.mark.parametrize("dims", [1, 3])
def test_other_convolutions(dims):
    conv, norm = (getattr(nn, f"{name}{dims}d") for name in ("Conv", "BatchNorm"))
    torch.manual_seed(0)
    layers = conv(3, 4, 3, padding=1), norm(4), nn.ReLU(), conv(4, 2, 1), norm(2)
    plain = lp.expand(nn.Sequential(*layers).double(), K, targets="rank1", noise_std=0.5)
    fused = lp.fuse(copy.deepcopy(plain))
    assert fused_patterns(fused) == Counter({"gain → BN → ReLU → gain": 1, "gain → BN": 1})
    assert_same(plain, fused, [torch.randn(8 * K, 3, *(5, 3, 4)[:dims], dtype=torch.float64)], floor=1.0)


def test_frozen_averaged_and_collapsed():
    plain, fused = make_pair()
    for model in (plain, fused):
        model.bn1.eval()  # normalizes by running statistics in a stacked pass
    assert_same(plain, fused, [images(8 * K, size=8)], floor=1.0)
    plain.eval(), fused.eval()
    assert_same(plain, fused, [images(8, size=8)], floor=1.0)
    lp.collapse(plain), lp.collapse(fused)
    assert all(type(module).__module__.startswith("torch.nn") for module in list(fused.modules())[1:])
    assert_same(plain, fused, [images(8, size=8)], floor=1.0)


def test_what_others_see_keeps_its_gain():
    plain, _ = make_pair()
    seen = []
    plain.conv1.register_forward_hook(lambda module, args, output: seen.append(output))
    lp.fuse(plain)
    assert fused_patterns(plain) == PATTERNS - Counter({"gain → BN → ReLU": 1}) + Counter({"BN → ReLU": 1})
    plain(images(8 * K, size=8))
    assert len(seen) == 1

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            y = self.conv(x)
            return F.relu(self.bn(y)) + y

    twice = lp.fuse(lp.expand(Twice().double(), K, targets=("rank1",)))
    assert fused_patterns(twice) == Counter({"BN → ReLU": 1})


def test_compiled_and_under_autocast():
    plain, fused = make_pair(dtype=torch.float32)
    x = images(8 * K, size=8, dtype=torch.float32)
    torch._dynamo.reset()
    expected = copy.deepcopy(fused)(x)
    torch.testing.assert_close(torch.compile(fused, backend="aot_eager", fullgraph=True)(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        half, own = fused(x), plain(x)
    exact = copy.deepcopy(plain).double()(x.double())
    assert half.dtype == own.dtype
    error, others = ((y.double() - exact).norm() / exact.norm() for y in (half, own))
    assert error <= 2 * others + 2**-8


def make_arguments(dtype, *, spatial=(3,), residual=True):
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    gain = normal(K, 3)
    gain.data[0, 1] = 0
    return [
        normal(K * B, 3, *spatial),
        gain,
        normal(3),
        normal(K, 3),
        normal(3),
        residual and normal(K * B, 3, *spatial),
    ]


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
def test_gradcheck(activation, residual):
    *arguments, added = make_arguments(torch.float64, residual=residual)
    added = added if residual else None
    for check in (gradcheck, gradgradcheck):
        assert check(lambda *a: normalize_with_gain(*a, 1e-2, K, activation)[0], (*arguments, added))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_error_is_no_larger_than_the_unfused_ops(dtype, layout):
    *arguments, residual = make_arguments(dtype, spatial=(9, 9))
    arguments = [t.detach().contiguous(memory_format=layout) if t.dim() == 4 else t.detach().float() for t in arguments]
    residual = residual.detach()
    dy = residual + 1

    def run(function, dtype=None):
        leaves = [t.to(dtype or t.dtype, copy=True).requires_grad_() for t in (*arguments, residual)]
        y, mean, var = function(*leaves)
        y.backward(dy.to(y.dtype))
        return [y, mean, var, *(t.grad for t in leaves)]

    def unfused(x, gain, shift, weight, bias, residual):
        z = lp.functional.member_gain(x, gain, shift)
        mean, var = norm_reference.statistics(z, K)
        affine = {"weight": weight, "bias": bias, "num_members": K, "residual": residual, "activation": "relu"}
        return lp.functional.ensemble_batch_norm(z, None, None, training=True, eps=1e-3, **affine), mean, var

    def formula(x, gain, shift, weight, bias, residual):
        z = gain_reference.member_gain(x, gain, shift, 1, "none")
        return norm_reference.ensemble_batch_norm(z, None, None, weight, bias, residual, True, 1e-3, K, "relu")

    truth = run(formula, torch.float64)
    own, others = run(lambda *a: normalize_with_gain(*a, 1e-3, K, "relu")), run(unfused)
    names = "y mean var dx dgain dshift dweight dbias dresidual".split()
    for name, mine, theirs, true in zip(names, own, others, truth):
        if name == "dshift":  # 0 by algebra; what the others leave of it is their rounding
            assert not mine.any()
            continue
        error, allowed = ((t.double() - true).norm() for t in (mine, theirs))
        assert error <= 2 * allowed + torch.finfo(mine.dtype).eps * true.norm(), name
