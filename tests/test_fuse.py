"""fuse: what it finds in known architectures, that their values stay, and how it goes with other tools."""

import copy
import inspect
import io
import logging
import pickle
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from fuse_blocks import (
    ADD_RELU,
    HARDSWISH,
    RELU,
    RELU6,
    SILU,
    B,
    Block,
    Changing,
    K,
    OneOrMany,
    assert_same,
    fused_patterns,
    images,
    pair,
    reasons,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import latephase_kernels as lp
from latephase_kernels.late_phase import fuse_graph
from latephase_kernels.late_phase.fuse_block import FusedForward
from latephase_kernels.nn import shared_batch_norm

# name → patterns, how many are left: as the architectures are defined.
# resnet18: stem + 8 blocks of two; resnet50: stem + 16 blocks of three; left are the batch norms of the downsamples.
# efficientnet_b0: stem, 16 blocks of three (the last without an activation), of which the first does not expand, head.
# densenet121: stem, two in each of 58 layers, 3 transitions; the ReLU behind norm5 is in another module.
# mobilenet_v2: stem, 17 blocks of three (the last without an activation), of which the first does not expand, head.
# mobilenet_v3_large: 15 blocks likewise, the ReLU in the first six, the Hardswish in nine, the stem and the head.
ARCHITECTURES = {
    "torchvision resnet18": ({RELU: 1 + 8, ADD_RELU: 8}, 3),
    "torchvision resnet50": ({RELU: 1 + 2 * 16, ADD_RELU: 16}, 4),
    "torchvision wide_resnet50_2": ({RELU: 1 + 2 * 16, ADD_RELU: 16}, 4),
    "torchvision densenet121": ({RELU: 1 + 2 * 58 + 3}, 1),
    "torchvision efficientnet_b0": ({SILU: 1 + 2 * 16 - 1 + 1}, 16),
    "torchvision mobilenet_v2": ({RELU6: 1 + 2 * 17 - 1 + 1}, 17),
    "torchvision mobilenet_v3_large": ({RELU: 2 * 6 - 1, HARDSWISH: 1 + 2 * 9 + 1}, 15),
    "timm resnet18": ({RELU: 1 + 8, ADD_RELU: 8}, 3),
    "timm resnet50": ({RELU: 1 + 2 * 16, ADD_RELU: 16}, 4),
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
    patterns, left = ARCHITECTURES[name]
    assert fused_patterns(model) == Counter(patterns)
    assert len(lp.fusions(model)) == sum(patterns.values()) + left
    why = "neither ReLU, ReLU6, SiLU, Hardswish nor a plain add follows, but the end of the forward"
    assert reasons(model) == [why] * left
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


class Activated(nn.Module):
    """Both forms of an activation, and one behind an add, which stays."""

    def __init__(self, layer, function):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), layer(inplace=True))
        self.function = function
        self.conv, self.bn2, self.bn3 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.first(x)
        y = self.function(self.bn2(self.conv(y)), inplace=True)
        return self.function(self.bn3(y) + y)


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
    "ReLU6": (lambda: Activated(nn.ReLU6, F.relu6), {(False, "relu6"): 2, (False, "none"): 1}),
    "SiLU": (lambda: Activated(nn.SiLU, F.silu), {(False, "silu"): 2, (False, "none"): 1}),
    "Hardswish": (lambda: Activated(nn.Hardswish, F.hardswish), {(False, "hardswish"): 2, (False, "none"): 1}),
}


@pytest.mark.parametrize(
    "name, backend", [*((name, "auto") for name in SMALL), ("timm", "reference"), ("densenet", "reference")]
)
def test_small_models_keep_their_values(name, backend, monkeypatch):
    make, expected = SMALL[name]
    plain, fused = pair(make())
    calls = []
    op = lp.nn.batch_norm.normalize_and_update

    def spy(*arguments):
        residual, activation = arguments[6], arguments[10]
        calls.append((residual is not None, activation))
        return op(*arguments)

    lp.set_backend(backend)
    try:
        for training in (True, False, True):
            plain.train(training), fused.train(training)
            assert_same(plain, fused, [images(K * B if training else 3)])
        with lp.members(plain, range(1, 2)), lp.members(fused, range(1, 2)):
            assert_same(plain, fused, [images(3)])  # a chunk, in train mode
            plain.eval(), fused.eval()
            assert_same(plain, fused, [images(3)])
        monkeypatch.setattr(lp.nn.batch_norm, "normalize_and_update", spy)
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


@pytest.mark.parametrize("name", ["basic", "bottleneck", "densenet", "pre-activation"])
def test_shared_batch_norms_are_fused_too(name, monkeypatch):
    """One op a chain, also for one member at a time and for frozen norms; values and gradients to the last bit."""
    make, expected = SMALL[name]
    model = nn.Sequential(make(), nn.Flatten(), nn.LazyLinear(3))
    model(images(dtype=torch.float32))
    plain, fused = pair(model, targets="head")
    calls, op = [], shared_batch_norm.normalize

    def spy(*arguments):
        residual, activation = arguments[5], arguments[9]
        calls.append((residual is not None, activation))
        return op(*arguments)

    monkeypatch.setattr(shared_batch_norm, "normalize", spy)
    for members, rows, frozen in (range(K), K * B, False), (range(1, 2), 3, False), (range(K), K * B, True):
        with lp.members(plain, members), lp.members(fused, members):
            for module in (*plain.modules(), *fused.modules()):
                module.training = not (frozen and hasattr(module, "running_var"))
            assert_same(plain, fused, [images(rows)], tolerance=0.0)
            calls.clear()
            twin = copy.deepcopy(fused)
            with lp.members(twin, members):
                twin(images(rows))
            assert Counter(calls) == expected
    plain.eval(), fused.eval()
    assert_same(plain, fused, [images(3)], tolerance=0.0)


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
    plain, fused = pair(nn.Sequential(Changing(), Block(), nn.BatchNorm2d(4), nn.ReLU()))
    plain[0].rate = plain[0].drop.p = fused[0].drop.p = 0.0
    block = copy.copy(lp.fuse(fused)[0])
    block.rate = 0.0
    torch.testing.assert_close(block(images(channels=4)), plain[0](images(channels=4)))
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
    plain, fused = pair(nn.Sequential(Changing(), OneOrMany()))
    for model in (plain, fused):
        model[0].rate = model[0].drop.p = 0.0
    lp.fuse(fused)
    x = images(channels=4)
    torch._dynamo.reset()  # other tests' recompilations count, too
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
