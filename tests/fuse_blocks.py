"""What the tests of fuse share: pairs of models, how they are compared, and blocks; K members, B samples each."""

import copy
from collections import Counter

import torch
import torch.nn.functional as F
from torch import nn

import latephase_kernels as lp

K, B = 2, 2
RELU, ADD_RELU = "BN → ReLU", "BN → add → ReLU"
RELU6, SILU, HARDSWISH = "BN → ReLU6", "BN → SiLU", "BN → Hardswish"


def images(rows=K * B, channels=3, size=16, dtype=torch.float64, seed=0):
    return torch.randn(rows, channels, size, size, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def pair(model, targets="batch_norm", dtype=torch.float64):
    """An expanded model with members that differ, and its fused twin."""
    torch.manual_seed(0)
    plain = lp.expand(model.to(dtype), K, targets=targets, noise_std=0.3)
    for module in plain.modules():
        if getattr(module, "running_var", None) is not None:
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return plain, lp.fuse(copy.deepcopy(plain))


def fused_patterns(model):
    return Counter(fusion.pattern for fusion in lp.fusions(model) if fusion.fused)


def reasons(model):
    return [fusion.reason for fusion in lp.fusions(model) if not fusion.fused]


def assert_same(plain, fused, *inputs, tolerance=1e-11, floor=0.0):
    """Same answers, gradients and running statistics, to tolerance times the largest value of each tensor, or floor.

    Of a gradient: the largest of its layer. That of a bias in front of a batch norm is a sum of such values, and zero.
    """
    results = []
    for model in (plain, fused):
        torch.manual_seed(1)
        model.zero_grad()
        leaves = [[x.clone().requires_grad_() for x in group] for group in inputs]
        answer = model(*[group[0] if len(group) == 1 else group for group in leaves])
        answer = torch.utils._pytree.tree_leaves(answer)
        gradients = {}
        if any(y.requires_grad for y in answer):
            sum((y * torch.arange(y.numel()).view_as(y).cos().to(y.dtype)).sum() for y in answer).backward()
            gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        gradients |= {
            f"input {len(group)} {i}": x.grad for group in leaves for i, x in enumerate(group) if x.grad is not None
        }
        results.append([dict(enumerate(answer)), gradients, dict(model.named_buffers())])
    for ours, theirs in zip(*results, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            of_layer = [ours[n] for n in ours if str(n).rpartition(".")[0] == str(name).rpartition(".")[0] != ""]
            scale = max(floor, *(t.abs().max().item() for t in (ours[name], *of_layer)))
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=tolerance * scale, msg=str(name))


class Leaky(nn.ReLU):
    def forward(self, x):
        return F.leaky_relu(x)


class Block(nn.Module):
    """relu(bn2(conv(relu(bn1(x)))) + down(x)); the hostile ones inherit the layers."""

    def __init__(self):
        super().__init__()
        self.bn1, self.bn2, self.conv, self.down = (
            nn.BatchNorm2d(4),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.Conv2d(4, 4, 1),
        )
        self.relu, self.rectify, self.leaky, self.nothing = nn.ReLU(), nn.ReLU(inplace=True), Leaky(), nn.Dropout(0.0)
        self.same, self.rate, self.seen, self.calls = nn.Identity(), 0.5, [], 0

    def forward(self, x):
        y = self.bn2(self.conv(self.rectify(self.bn1(x))))
        y += self.down(x)
        return self.relu(y)


class Rich(Block):
    """With one of every kind of attribute."""

    def __init__(self):
        super().__init__()
        self.drop, self.norms = nn.Dropout(0.3), nn.ModuleList([self.bn1, self.bn2])
        self.scale, self.plain = nn.Parameter(torch.ones(4, 1, 1) * 2), torch.ones((), dtype=torch.float64)
        self.register_parameter("gamma", None)

    @property
    def doubled(self):
        return self.scale * 2


class Changing(Rich):
    twice = False

    def __init__(self):
        super().__init__()
        self.rest = nn.Sequential(nn.Conv2d(4, 4, 1))

    def forward(self, x):
        y = self.rectify(self.bn1(x))
        y = self.relu(self.bn2(self.conv(y)) + self.down(x))
        y = F.dropout(y, self.rate, self.training) + F.dropout(y, self.drop.p, self.drop.training)
        if self.gamma is not None:
            y = y * self.gamma
        for layer in self.rest:
            y = layer(y)
        return y * getattr(self, "factor", 1) * (2 if self.twice else 1)


class OneOrMany(Rich):
    """Asks whether it got a tensor or a list of them, as the layers of torchvision's DenseNet do."""

    def forward(self, x):
        xs = [x] if isinstance(x, torch.Tensor) else x
        return F.relu(self.bn1(sum(xs, start=0)))
