"""fuse: what it finds, that the values stay, and what it leaves alone; shapes: K members, B samples each."""

import copy
import inspect
import io
import logging
import pickle
import random
import re
from collections import Counter, namedtuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import latephase_kernels as lp
from latephase_kernels.late_phase import fuse_graph
from latephase_kernels.late_phase.fuse_block import FusedForward

K, B = 2, 2
RELU, ADD_RELU = "BN → ReLU", "BN → add → ReLU"


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


def assert_same(plain, fused, *inputs, tolerance=1e-11):
    """Same answers, gradients and running statistics, to tolerance times the largest value of each tensor."""
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
            scale = ours[name].abs().max().item()
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=tolerance * scale, msg=str(name))


# ---------------------------------------------------------------------------------------------- known architectures

# name → BN → ReLU, BN → add → ReLU, left: as the architectures are defined.
# resnet18: stem + 8 blocks of two; resnet50: stem + 16 blocks of three; left are the batch norms of the downsamples.
# densenet121: stem, two in each of 58 layers, 3 transitions; the ReLU behind norm5 is in another module.
ARCHITECTURES = {
    "torchvision resnet18": (1 + 8, 8, 3),
    "torchvision resnet50": (1 + 2 * 16, 16, 4),
    "torchvision wide_resnet50_2": (1 + 2 * 16, 16, 4),
    "torchvision densenet121": (1 + 2 * 58 + 3, 0, 1),
    "timm resnet18": (1 + 8, 8, 3),
    "timm resnet50": (1 + 2 * 16, 16, 4),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_finds_every_chain_of_known_architectures(name):
    library, name_there = name.split()
    with torch.device("meta"):
        if library == "timm":
            model = pytest.importorskip("timm").create_model(name_there)
        else:
            model = getattr(pytest.importorskip("torchvision").models, name_there)()
    lp.expand(model, K)
    keys = list(model.state_dict())
    assert not fused_patterns(model) and lp.fuse(model) is model
    relus, adds, left = ARCHITECTURES[name]
    assert fused_patterns(model) == Counter({k: n for k, n in ((RELU, relus), (ADD_RELU, adds)) if n})
    assert len(lp.fusions(model)) == relus + adds + left
    assert all("neither a ReLU nor a plain add follows, but the end of the forward" == why for why in reasons(model))
    assert list(model.state_dict()) == keys
    classes = [type(module) for module in model.modules()]
    assert lp.fuse(model) is model and [type(module) for module in model.modules()] == classes


class PreActivation(nn.Module):
    """A block of a wide residual network: batch norm and ReLU come before the convolutions."""

    def __init__(self):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1)
        self.bn2, self.conv2, self.shortcut = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(4, 6, 1)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        y = F.relu(self.bn1(x), inplace=True)
        return self.conv2(self.dropout(self.bn2(self.conv1(y)).relu())) + self.shortcut(y)


def torchvision_blocks(name):
    resnet = pytest.importorskip("torchvision").models.resnet
    block = getattr(resnet, name)
    width, planes = 4 * block.expansion, 6 * block.expansion
    down = nn.Sequential(resnet.conv1x1(width, planes, 2), nn.BatchNorm2d(planes))
    return nn.Sequential(nn.Conv2d(3, width, 1), block(width, 4), block(width, 6, 2, down))


def timm_resnet(block):
    resnet = pytest.importorskip("timm").models.resnet
    return resnet.ResNet(getattr(resnet, block), (1, 2, 1, 1), num_classes=3, stem_width=4, channels=(4, 8, 8, 12))


def densenet(**options):
    return pytest.importorskip("torchvision").models.DenseNet(4, (2, 2), 8, num_classes=3, **options)


# A small model of each family → calls of the op with and without a residual and a ReLU.
SMALL = {
    "basic": (lambda: torchvision_blocks("BasicBlock"), {(True, "relu"): 2, (False, "relu"): 2, (False, "none"): 1}),
    "bottleneck": (
        lambda: torchvision_blocks("Bottleneck"),
        {(True, "relu"): 2, (False, "relu"): 4, (False, "none"): 1},
    ),
    "timm": (lambda: timm_resnet("BasicBlock"), {(True, "relu"): 5, (False, "relu"): 6, (False, "none"): 4}),
    "densenet": (lambda: densenet(), {(False, "relu"): 1 + 8 + 1, (False, "none"): 1}),
    "densenet with dropout": (lambda: densenet(drop_rate=0.5), {(False, "relu"): 10, (False, "none"): 1}),
    "pre-activation": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), PreActivation(), nn.Flatten(2)),
        {(False, "relu"): 2},
    ),
}


@pytest.mark.parametrize(
    "name, backend", [*((name, "auto") for name in SMALL), ("timm", "reference"), ("densenet", "reference")]
)
def test_small_models_keep_their_values(name, backend, monkeypatch):
    make, expected = SMALL[name]
    plain, fused = pair(make())
    calls = []
    op = lp.nn.batch_norm.ensemble_batch_norm

    def spy(*arguments, residual, activation, **options):
        calls.append((residual is not None, activation))
        return op(*arguments, residual=residual, activation=activation, **options)

    lp.set_backend(backend)
    try:
        for training in (True, False, True):
            plain.train(training), fused.train(training)
            assert_same(plain, fused, [images(K * B if training else 3)])
        with lp.members(plain, range(1, 2)), lp.members(fused, range(1, 2)):
            assert_same(plain, fused, [images(3)])  # a chunk, in train mode
            plain.eval(), fused.eval()
            assert_same(plain, fused, [images(3)])
        monkeypatch.setattr(lp.nn.batch_norm, "ensemble_batch_norm", spy)
        copy.deepcopy(fused).train()(images())
    finally:
        lp.set_backend("auto")
    assert Counter(calls) == expected
    assert_collapses_alike(plain, fused, images(3))


def assert_collapses_alike(plain, fused, x):
    classes = [type(module) for module in plain.modules()]
    for model in (plain, fused):
        torch.manual_seed(2)
        lp.collapse(model.eval())
    assert not any(isinstance(module, FusedForward) for module in fused.modules())
    assert [type(m) for m in fused.modules() if "BatchNorm" not in type(m).__name__] == [
        cls for cls in classes if "BatchNorm" not in cls.__name__
    ]
    assert list(plain.state_dict()) == list(fused.state_dict())
    torch.testing.assert_close(plain(x), fused(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 2**-7)])
def test_one_rounding_in_short_types(dtype, tolerance):
    """Both roundings of the unfused block (batch norm, then add) against the one of the fused: within one."""
    plain, fused = pair(nn.Sequential(Block()), dtype=torch.float32)
    plain.to(dtype), fused.to(dtype)
    if dtype == torch.float32:  # in bfloat16 the two roundings disagree about the sign of values next to zero
        assert_same(plain, fused, [images(channels=4, dtype=dtype)], tolerance=4 * tolerance)
    for training in (True, False):
        plain.train(training), fused.train(training)
        x = images(channels=4, dtype=dtype)
        y, z = plain(x), fused(x)
        assert (y - z).abs().max() <= tolerance * y.abs().max()


def test_shared_batch_norms_are_fused_too():
    plain, fused = pair(nn.Sequential(Block(), nn.Flatten(), nn.Linear(4 * 16 * 16, 3)), targets="head")
    assert fused_patterns(fused) == {RELU: 1, ADD_RELU: 1}
    for training, rows in ((True, K * B), (False, 3), (True, K * B)):
        plain.train(training), fused.train(training)
        assert_same(plain, fused, [images(rows, channels=4)])


# ---------------------------------------------------------------------------------------------- blocks


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
        self.rate, self.seen, self.calls = 0.5, [], 0

    def forward(self, x):
        y = self.bn2(self.conv(self.rectify(self.bn1(x))))
        y += self.down(x)
        return self.relu(y)


FLAG = [True]
Answer = namedtuple("Answer", "y x")


def hooked(child):
    class Hooked(Block):
        def __init__(self):
            super().__init__()
            getattr(self, child).register_forward_hook(lambda module, inputs, output: output * 2)

    return Hooked


def global_flag(self, x):
    return F.relu(self.bn1(x)) if FLAG[0] else x


def python_random(self, x):
    return F.relu(self.bn1(x)) if random.random() < 0.5 else x


def torch_random(self, x):
    return F.relu(self.bn1(x)) * torch.rand(1).item()


def counts(self, x):
    self.calls += 1
    return F.relu(self.bn1(x)) * self.calls


def remembers(self, x):
    self.seen.append(x.shape)
    return F.relu(self.bn1(x)) * len(self.seen)


def asks_grad_mode(self, x):
    return F.relu(self.bn1(x)) if torch.is_grad_enabled() else x


def without_grad(self, x):
    with torch.no_grad():
        return F.relu(self.bn1(x))


def checkpoints(self, x):
    return checkpoint(lambda x: F.relu(self.bn1(x)), x, use_reentrant=False)


def by_value(self, x):
    return F.relu(self.bn1(x)) if x.sum() > 0 else x


def by_shape(self, x):
    return F.relu(self.bn1(x)) if x.shape[0] == 4 else x


def by_shape_guarded(self, x):
    try:
        return F.relu(self.bn1(x)) if x.size(0) == 4 else x
    except Exception:
        return x


def by_identity(self, x):
    return F.relu(self.bn1(x)) if x.dtype is torch.float64 else x


def by_type(self, x):
    return F.relu(self.bn1(x)) if type(x) == torch.Tensor else x  # noqa: E721


def by_type_of_a_result(self, x):
    y = self.conv(x)
    return F.relu(self.bn1(y)) if isinstance(y, torch.Tensor) else x


def by_attribute(self, x):
    return F.relu(self.bn1(x)) if hasattr(x, "decompose") else x


def loops(self, x):
    return F.relu(self.bn1(torch.stack([row * 2 for row in x])))


def prints(self, x):
    print("forward")
    return F.relu(self.bn1(x))


def uses_twice(self, x):
    y = self.bn1(x)
    return F.relu(y) + y


def in_place_between(self, x):
    y = self.bn1(x)
    y.mul_(-1)
    return F.relu(y)


def scales(self, x):
    return F.relu(self.bn1(x) * 2)


def adds_itself(self, x):
    y = self.bn1(x)
    return F.relu(y + y)


def adds_with_alpha(self, x):
    return F.relu(torch.add(self.bn1(x), x, alpha=2))


def adds_into_residual(self, x):
    y = x * 1
    y += self.bn1(x)
    return F.relu(y) + y


def residual_changes_input(self, x):
    y = x * 1
    z = self.bn1(y)
    return self.relu(z + self.rectify(y))


def input_is_an_alias(self, x):
    y = self.conv(x)
    z = self.bn1(y.view_as(y))
    return self.relu(z + self.rectify(y))


def called_again(self, x):
    y = self.bn1(self.conv(x))
    z = self.conv(self.bn1(x))
    return self.relu(y + z)


def other_activation(self, x):
    return F.leaky_relu(self.bn1(x)) + F.relu6(self.bn2(x))


def reads_a_class(self, x):
    return F.relu(self.bn1(x)) if Settings.fast else x


def closure(calls):
    def forward(self, x):
        calls.append(1)
        return F.relu(self.bn1(x)) * (1 + len(calls) % 1)

    return forward


def matches(self, x):
    match x:
        case torch.Tensor():
            return F.relu(self.bn1(x))
    return x


def registers(self, x):
    self.register_buffer("last", x)
    return F.relu(self.bn1(x))


def reads_its_dict(self, x):
    return F.relu(self.bn1(x)) * self.__dict__["rate"]


def skips_the_call(self, x):
    return F.relu(self.bn1.forward(x))


def another_module_between(self, x):
    return F.relu(self.nothing(self.bn1(x)))


def relu_of_a_subclass(self, x):
    return self.leaky(self.bn1(x))


class Settings:
    fast = True


class Leaky(nn.ReLU):
    def forward(self, x):
        return F.leaky_relu(x)


# name, forward, what fusions must say.
LEFT = {
    name: (type(name, (Block,), {"forward": function}), reason)
    for name, function, reason in [
        ("global_flag", global_flag, "uses FLAG"),
        ("python_random", python_random, "uses random"),
        ("torch_random", torch_random, "calls rand on other values"),
        ("reads_a_class", reads_a_class, "reads Settings.fast"),
        ("closure", closure([]), "uses calls"),
        ("counts", counts, "changes calls"),
        ("remembers", remembers, "reads the attribute seen, a list"),
        ("registers", registers, "calls register_buffer of module.py"),
        ("reads_its_dict", reads_its_dict, "reads __dict__"),
        ("asks_grad_mode", asks_grad_mode, "calls is_grad_enabled"),
        ("without_grad", without_grad, "of _contextlib.py|grad"),
        ("decorated", torch.no_grad()(lambda self, x: F.relu(self.bn1(x))), "decorated"),
        ("checkpoints", checkpoints, "calls .* of _compile.py|checkpoint"),
        ("by_value", by_value, "decides by the values"),
        ("by_shape", by_shape, "decides by the values"),
        ("by_shape_guarded", by_shape_guarded, "decides by the values"),
        ("by_identity", by_identity, "compares identities"),
        ("by_type", by_type, "uses type"),
        ("by_type_of_a_result", by_type_of_a_result, "type of a value that it computed"),
        ("by_attribute", by_attribute, "reads .decompose"),
        ("matches", matches, "matches patterns"),
        ("loops", loops, "iterates"),
        ("prints", prints, "uses print"),
        ("uses_twice", uses_twice, "2 operations use the output of bn1"),
        ("in_place_between", in_place_between, "2 operations use the output of bn1"),
        ("another_module_between", another_module_between, r"but nothing \(Dropout\)"),
        ("relu_of_a_subclass", relu_of_a_subclass, r"but leaky \(Leaky\)"),
        ("skips_the_call", skips_the_call, "calls|decides|uses"),
        ("scales", scales, "but mul"),
        ("adds_itself", adds_itself, "added to itself"),
        ("adds_with_alpha", adds_with_alpha, "but add"),
        ("adds_into_residual", adds_into_residual, "in place"),
        ("residual_changes_input", residual_changes_input, "may change its input"),
        ("input_is_an_alias", input_is_an_alias, "may change its input"),
        ("called_again", called_again, "called again"),
        ("other_activation", other_activation, "but leaky_relu"),
    ]
} | {
    "hook on the ReLU": (hooked("relu"), r"relu \(ReLU\) has hooks"),
    "hook on the batch norm": (hooked("bn1"), "it has hooks"),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_alone_with_the_reason(name):
    cls, reason = LEFT[name]
    plain, fused = pair(nn.Sequential(nn.Conv2d(3, 4, 1), cls()))
    assert any(re.search(reason, why) for why in reasons(fused)), reasons(fused)
    for training, rows in ((True, K * B), (False, 3), (True, K * B)):
        for seed in range(2 if "random" in name else 1):
            answers = []
            for model in (plain.train(training), fused.train(training)):
                random.seed(seed), torch.manual_seed(seed)
                answers.append(model(images(rows)))
            assert torch.equal(*answers)
        if training and name != "residual_changes_input" and name != "input_is_an_alias":  # not differentiable
            assert_same(plain, fused, [images(rows)])
    assert plain[1].calls == fused[1].calls and plain[1].seen == fused[1].seen


def test_what_is_refused_does_not_run_while_it_is_traced(capsys):
    calls = []
    for function in (prints, closure(calls)):
        pair(nn.Sequential(nn.Conv2d(3, 4, 1), type("Refused", (Block,), {"forward": function})()))
    assert not calls and not capsys.readouterr().out


# ---------------------------------------------------------------------------------------------- what is fused


def identity_between(self, x):
    return self.relu(self.same(self.same(self.bn1(x)) + x))


def both_are_batch_norms(self, x):
    return torch.relu(torch.add(self.bn1(self.conv(x)), self.bn2(self.down(x))))


def residual_first(self, x):
    return (x + self.bn1(x)).relu_() + (self.bn2(self.conv(x)).add_(x)).relu()


def called_twice(self, x):
    return F.relu(self.bn1(F.relu(self.bn1(x)) * 2))


def dropout(self, x):
    return F.dropout(F.relu(self.bn1(x)), self.rate, self.training)


def childs_attribute(self, x):
    return F.dropout(F.relu(self.bn1(x)), self.drop.p, self.drop.training)


def tensors_of_all_kinds(self, x):
    return F.relu(self.bn1(x * self.scale)) * self.plain + self.down.weight.sum() + self.bn2.running_mean.sum()


def absent_and_none(self, x):
    y = F.relu(self.bn1(x))
    if self.gamma is not None:
        y = y * self.gamma
    return y * getattr(self, "factor", 1)


def numbers_in_place(self, x):
    n = m = x.shape[-1]
    n += 1
    return F.relu(self.bn1(x)) * n + m


def changes_its_input(self, x):
    y = F.relu(self.bn1(x * 2))
    x += 1
    return y + x


def in_a_list(self, x):
    for norm in self.norms:
        x = F.relu(norm(x))
    return x


def broadcast(self, x):
    mean = x.mean((2, 3), keepdim=True)
    return F.relu(self.bn1(x) + mean) + F.relu(self.bn2(x) + 0.5)


def other_type(self, x):
    return F.relu(self.bn1(x.float()) + x)


def structures(self, x):
    return Answer({"relu": F.relu(self.bn1(x))}, [x * 2, (x,)])


def one_or_many(self, x):
    xs = [x] if isinstance(x, torch.Tensor) else x
    return F.relu(self.bn1(sum(xs, start=0)))


def with_options(self, x, mask=None, *rest, scale=1.0, **others):
    y = F.relu(self.bn1(x)) * scale
    return y if mask is None else y * mask


def needs_a_mask(self, x, mask):
    y = F.relu(self.bn1(x))
    return y * mask if mask is not None else y


class Rich(Block):
    """With one of every kind of attribute."""

    def __init__(self):
        super().__init__()
        self.same, self.drop, self.norms = nn.Identity(), nn.Dropout(0.3), nn.ModuleList([self.bn1, self.bn2])
        self.scale, self.plain = nn.Parameter(torch.ones(4, 1, 1) * 2), torch.ones((), dtype=torch.float64)
        self.register_parameter("gamma", None)


FUSED = {
    name: (type(name, (Rich,), {"forward": function}), patterns)
    for name, function, patterns in [
        ("identity_between", identity_between, {ADD_RELU: 1}),
        ("both_are_batch_norms", both_are_batch_norms, {ADD_RELU: 1}),
        ("residual_first", residual_first, {ADD_RELU: 2}),
        ("called_twice", called_twice, {RELU: 2}),
        ("dropout", dropout, {RELU: 1}),
        ("childs_attribute", childs_attribute, {RELU: 1}),
        ("tensors_of_all_kinds", tensors_of_all_kinds, {RELU: 1}),
        ("absent_and_none", absent_and_none, {RELU: 1}),
        ("numbers_in_place", numbers_in_place, {RELU: 1}),
        ("changes_its_input", changes_its_input, {RELU: 1}),
        ("in_a_list", in_a_list, {RELU: 2}),
        ("broadcast", broadcast, {ADD_RELU: 2}),
        ("structures", structures, {RELU: 1}),
        ("one_or_many", one_or_many, {RELU: 1}),
        ("with_options", with_options, {RELU: 1}),
    ]
}


@pytest.mark.parametrize("name", FUSED)
def test_fused_with_the_same_values(name):
    cls, patterns = FUSED[name]
    plain, fused = pair(nn.Sequential(nn.Conv2d(3, 4, 1), cls()))
    assert fused_patterns(fused) == patterns
    for training, rows in ((True, K * B), (False, 3), (True, K * B)):
        plain.train(training), fused.train(training)
        assert_same(plain, fused, [images(rows)])


def test_residual_of_another_type_is_added_as_it_is_written():
    plain, fused = pair(nn.Sequential(type("OtherType", (Block,), {"forward": other_type})()))
    plain.float(), fused.float()
    assert fused_patterns(fused) == {ADD_RELU: 1}
    assert_same(plain, fused, [images(channels=4)])
    assert fused(images(channels=4)).dtype == torch.float64


def test_calls_that_no_trace_covers_run_the_original():
    x, mask = images(channels=4), images(channels=4, seed=1)
    plain, fused = pair(FUSED["with_options"][0]())
    calls = [lambda m: m(x, mask), lambda m: m(x, scale=3.0), lambda m: m(x=x), lambda m: m(x, mask, 1, other=2)]
    for call in calls:
        assert torch.equal(call(plain), call(fused))
    plain, fused = pair(FUSED["one_or_many"][0]())
    assert_same(plain, fused, [x])
    assert_same(plain, fused, [x, mask])
    assert torch.equal(plain((x, mask)), fused((x, mask)))
    plain, fused = pair(type("NeedsAMask", (Block,), {"forward": needs_a_mask})())
    assert fused_patterns(fused) == {RELU: 1}
    assert torch.equal(plain(x, None), fused(x, None)) and torch.equal(plain(x, mask), fused(x, mask))
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        fused(x)


# ---------------------------------------------------------------------------------------------- changed afterwards


def append(block):
    block.rest.append(nn.Conv2d(4, 4, 1).double())


CHANGES = {
    "attribute": lambda block: setattr(block, "rate", 0.1),
    "attribute of a child": lambda block: setattr(block.drop, "p", 0.9),
    "flag of a child": lambda block: block.drop.eval(),
    "attribute of the class": lambda block: setattr(Changing, "twice", True),
    "None becomes a parameter": lambda block: setattr(block, "gamma", nn.Parameter(torch.ones(1) * 3)),
    "absent becomes present": lambda block: setattr(block, "factor", 3),
    "child": lambda block: setattr(block, "relu", nn.SiLU()),
    "child by add_module": lambda block: block.add_module("relu", nn.SiLU()),
    "child by its dict": lambda block: block._modules.update(rectify=nn.SiLU()),
    "list": append,
    "hook on a ReLU": lambda block: block.relu.register_forward_hook(lambda module, args, y: y + 1),
    "hook on a batch norm": lambda block: block.bn1.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    "hook on a convolution": lambda block: block.conv.register_forward_hook(lambda module, args, y: y + 1),
    "forward set on a ReLU": lambda block: setattr(block.relu, "forward", lambda x: x),
    "activation": lambda block: setattr(block.bn2, "activation", "relu"),
}


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


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_block_runs_its_original_forward(name):
    x = images(channels=4)
    plain, fused = pair(nn.Sequential(Changing()))
    assert fused_patterns(fused) == {RELU: 1, ADD_RELU: 1}
    try:
        for model in (plain, fused):
            torch.manual_seed(5)
            CHANGES[name](model[0])
        assert_same(plain, fused, [x])
        assert any("its block has changed; call fuse" in why for why in reasons(fused))
        lp.fuse(fused)
        assert not any("changed" in why for why in reasons(fused))
        assert_same(plain, fused, [x])
    finally:
        Changing.twice = False


def test_a_hook_on_the_block_or_everywhere_still_runs():
    model = pair(nn.Sequential(Block()))[1]
    seen = []
    handle = model[0].register_forward_hook(lambda module, args, y: seen.append(module))
    model(images(channels=4))
    assert seen == [model[0]] and sum(fused_patterns(model).values()) == 2
    handle.remove()
    seen.clear()
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(module))
    try:
        model(images(channels=4))
    finally:
        handle.remove()
    assert {type(module) for module in seen} >= {nn.ReLU, nn.Conv2d, type(model[0])}


# ---------------------------------------------------------------------------------------------- copies, tools, errors


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def averaged(model):
    return torch.optim.swa_utils.AveragedModel(model).module


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_save, averaged])
def test_copies_are_fused_on_their_own(copied):
    plain, fused = pair(nn.Sequential(Changing()))
    twin = copied(fused)
    assert fused_patterns(twin) == fused_patterns(fused) and isinstance(twin[0], Changing)
    assert type(twin[0]) is type(fused[0]) and repr(twin) == repr(plain)
    assert list(twin.state_dict()) == list(plain.state_dict())
    assert inspect.signature(twin[0].forward) == inspect.signature(plain[0].forward)
    twin[0].rate = fused[0].drop.p = 0.0  # each is watched for itself
    assert not fused_patterns(twin) and not fused_patterns(fused)
    twin[0].rate, fused[0].drop.p = 0.5, 0.3
    assert fused_patterns(twin) and fused_patterns(fused)
    assert_same(plain, twin, [images(channels=4)])


def test_a_shallow_copy_a_pickled_part_and_a_slice():
    fused = pair(nn.Sequential(Changing(), Block(), nn.BatchNorm2d(4), nn.ReLU()))[1]
    block = copy.copy(fused[0])
    block.rate = 0.0
    torch.manual_seed(0)
    assert (block(images(channels=4)) != fused[0](images(channels=4))).any()
    # The part's batch norms hold the model that they belong to, so the model comes with it.
    part = through_pickle(fused[1])
    torch.testing.assert_close(part(images(channels=4)), fused[1](images(channels=4)))
    # Sequential builds its slices by calling its own class.
    part = fused[1:]
    assert_same(copy.deepcopy(part), part, [images(channels=4)])
    assert fused_patterns(part) == {RELU: 1, ADD_RELU: 1} and fused_patterns(lp.fuse(part)) == {RELU: 2, ADD_RELU: 1}


class Leaves(torch.fx.Tracer):
    def is_leaf_module(self, m, module_qualified_name):
        return True


def test_compile_checkpoint_and_fx_see_through_it():
    plain, fused = pair(nn.Sequential(Changing(), FUSED["one_or_many"][0]()))
    for model in (plain, fused):
        model[0].rate = model[0].drop.p = 0.0
    lp.fuse(fused)
    x = images(channels=4)
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    for training in (True, False):
        plain.train(training), compiled.train(training)
        torch.testing.assert_close(compiled(x), plain(x))
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[key], value)
    fused[0].factor = plain[0].factor = 5.0  # the compiled code notices too
    torch.testing.assert_close(compiled(x), plain(x))
    lp.fuse(fused.train())
    answer = checkpoint(fused, x.requires_grad_(), use_reentrant=False)
    torch.testing.assert_close(answer, plain.train()(x))
    answer.sum().backward()
    names = [str(node.target) for node in Leaves().trace(fused[0]).nodes]
    assert "relu" in names and "rectify" in names  # somebody else's trace sees the modules of the original forward


def test_autocast():
    plain, fused = pair(nn.Sequential(nn.Conv2d(3, 4, 1), Block()), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, z = plain(images(dtype=torch.float32)), fused(images(dtype=torch.float32))
    assert y.dtype == z.dtype == torch.bfloat16
    assert (y - z).abs().max() <= 2**-7 * y.abs().max()


def test_the_example_is_compared_and_leaves_no_trace(monkeypatch, caplog):
    plain, _ = pair(nn.Sequential(Block(), nn.Dropout(0.5)))
    state, x = copy.deepcopy(plain.state_dict()), images(channels=4)
    generator = torch.get_rng_state()
    with caplog.at_level(logging.INFO, "latephase_kernels"):
        assert lp.fuse(copy.deepcopy(plain), example=x) is not plain
    assert "2 of 2 batch norm calls fused (1 BN → ReLU, 1 BN → add → ReLU)" in caplog.text
    monkeypatch.setattr(fuse_graph, "batch_norm_add_relu", lambda norm, x, residual, add: norm(x) * 2)
    with pytest.raises(RuntimeError, match=r"fuse: .* answers differently to example: the largest difference is \d"):
        lp.fuse(plain, example=x)
    assert type(plain[0]) is Block and not fused_patterns(plain)
    assert {fusion.reason for fusion in lp.fusions(plain)} == {"it has not been asked for; call fuse"}
    assert all(torch.equal(value, state[key]) for key, value in plain.state_dict().items())
    assert torch.equal(generator, torch.get_rng_state())


def test_refused_models():
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    for call in (lp.fuse, lp.fusions):
        with pytest.raises(RuntimeError, match=f"{call.__name__}: model is not expanded; call expand first"):
            call(model)
        with pytest.raises(TypeError, match=f"{call.__name__}: model must be a plain module, got DataParallel"):
            call(nn.DataParallel(model))
    lp.fuse(lp.expand(model, K))
    with pytest.raises(RuntimeError, match="already expanded"):
        lp.expand(model, K)
    assert type(model) is not nn.Sequential and isinstance(model, FusedForward)  # a root that is a block itself
    assert type(lp.collapse(model)) is nn.Sequential
