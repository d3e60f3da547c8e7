"""Batch norms other than the common case: timm's with activations, synchronized ones, without bias or statistics.

Shapes: K members, B rows each, C channels.
"""

import copy
import pickle

import pytest
import torch
from torch import nn

import latephase_kernels as lp
from latephase_kernels.nn import EnsembleBatchNorm2d, EnsembleSyncBatchNorm, SharedBatchNorm2d, SharedSyncBatchNorm

K, B, C = 3, 4, 5


def randomize(norm):
    """Give a plain batch norm weights and statistics that hide nothing."""
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
        if norm.running_mean is not None:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.3, 3.0)
    return norm.double()


def diverge(ensemble):
    """Give every member weights and statistics of its own."""
    for parameter in ensemble._parameters.values():
        if parameter is not None:
            nn.init.normal_(parameter)
    if ensemble.running_mean is not None:
        ensemble.running_mean.normal_()
        ensemble.running_var.uniform_(0.3, 3.0)
    return ensemble


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


# ---------------------------------------------------------------------------------------------- timm


def norm_act(kind, sync=False):
    """One of timm's batch norms with activation."""
    layers = pytest.importorskip("timm.layers")
    act_layer = {"prelu": nn.PReLU, "silu": nn.SiLU, "hardswish": nn.Hardswish}.get(kind, nn.ReLU)
    drop_layer = nn.Tanh if kind == "drop" else None  # stands for a DropBlock without its randomness
    norm = layers.BatchNormAct2d(C, act_layer=act_layer, drop_layer=drop_layer, apply_act=kind != "no activation")
    return randomize(layers.convert_sync_batchnorm(norm) if sync else norm)


@pytest.mark.parametrize("sync", [False, True])
@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("kind", ["relu", "prelu", "hardswish", "drop", "no activation"])
def test_norm_with_activation_is_timms(kind, late, sync):
    model = nn.Sequential(norm_act(kind, sync), nn.BatchNorm2d(C))
    plain, keys = copy.deepcopy(model[0]), list(model.state_dict())
    plain_type, children = type(model[0]), dict(model[0].named_children())
    lp.expand(model, K, targets="batch_norm" if late else lambda name, module: name == "1")
    norm = model[0]
    assert list(model.state_dict()) == keys and dict(norm.named_children()) == children
    members = {name for name, parameter in norm.named_parameters() if hasattr(parameter, "num_members")}
    assert members == ({"weight", "bias"} if late else set())  # a PReLU's weight is a base weight
    plains = [copy.deepcopy(plain) for _ in range(K)] if late else [plain] * K
    for training in (True, True, False):
        for module in (norm, *plains):
            module.train(training)
        x = torch.randn(K * B, C, 3, 2, dtype=torch.float64)
        close(norm(x), torch.cat([plain(part) for plain, part in zip(plains, x.chunk(K))]))
        for name, buffer in norm.named_buffers():
            expected = [plain.get_buffer(name) for plain in plains]
            close(buffer, torch.stack(expected) if late else expected[0])
    back = lp.collapse(model)[0]
    assert type(back) is plain_type and dict(back.named_children()) == children
    assert vars(back).keys() == vars(plain).keys()


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("kind, activation", [("relu", nn.ReLU), ("silu", nn.SiLU), ("hardswish", nn.Hardswish)])
def test_an_activation_is_fused_unless_somebody_watches_it(late, kind, activation, monkeypatch):
    model = nn.Sequential(norm_act(kind), nn.BatchNorm2d(C).double())
    lp.expand(model, K, targets="batch_norm" if late else lambda name, module: name == "1")
    x = torch.randn(K * B, C, 3, 2, dtype=torch.float64)
    calls = []
    handle = model[0].act.register_forward_hook(lambda module, inputs, output: calls.append(output))
    watched = model[0](x)
    assert torch.equal(calls[0], watched)
    handle.remove()
    monkeypatch.setattr(activation, "forward", lambda *_: pytest.fail("the activation ran by itself"))
    close(model[0](x), watched)
    assert (watched <= 0).any()


# ---------------------------------------------------------------------------------------------- synchronized


@pytest.mark.parametrize("shape", [(), (7,), (3, 2), (2, 3, 2), (2, 3, 1, 2), (2, 1, 2, 1, 2)])
def test_in_one_process_synchronized_batch_norm_is_batch_norm(shape):
    plain = randomize(nn.SyncBatchNorm(C))
    ensemble = EnsembleSyncBatchNorm.from_module(plain, K)
    shared = SharedSyncBatchNorm.from_module(copy.deepcopy(plain), K)
    plains = [copy.deepcopy(plain) for _ in range(K)]
    x = torch.randn(K * B, C, *shape, dtype=torch.float64)
    for training in (True, False):
        expected = torch.cat([plain.train(training)(part) for plain, part in zip(plains, x.chunk(K))])
        close(ensemble.train(training)(x), expected)
        close(ensemble.running_var, torch.stack([plain.running_var for plain in plains]))
        if training:
            close(shared(x), expected)


@pytest.mark.parametrize("module_type", [EnsembleSyncBatchNorm, SharedSyncBatchNorm])
def test_process_group_comes_back_with_the_plain_layer(module_type):
    plain = nn.SyncBatchNorm(C)
    plain.process_group = group = object()
    back = module_type.from_module(plain, K).collapse()
    assert type(back) is nn.SyncBatchNorm and back.process_group is group


# ---------------------------------------------------------------------------------------------- without bias


@pytest.mark.parametrize("missing", [("bias",), ("weight",), ("weight", "bias")])
def test_missing_parameters(missing):
    plain = randomize(nn.BatchNorm2d(C))
    for name in missing:
        setattr(plain, name, None)
    ensemble = diverge(EnsembleBatchNorm2d.from_module(plain, K))
    plains = [copy.deepcopy(plain) for _ in range(K)]
    for k, member in enumerate(plains):
        member.load_state_dict({name: tensor[k] for name, tensor in ensemble.state_dict().items()})
    x = torch.randn(K * B, C, 3, 2, dtype=torch.float64)
    close(ensemble(x), torch.cat([member(part) for member, part in zip(plains, x.chunk(K))]))
    average = torch.stack([member.eval()(x) for member in plains]).mean(0)
    back = ensemble.collapse()
    close(back.eval()(x), average)
    assert all(getattr(back, name) is None for name in missing) and back.affine
    shared = SharedBatchNorm2d.from_module(copy.deepcopy(plain), K)
    close(shared(x), torch.cat([copy.deepcopy(plain)(part) for part in x.chunk(K)]))


@pytest.mark.parametrize("missing", [(), ("bias",), ("weight",)])
def test_gradients_of_the_average(missing):
    model = nn.Sequential(randomize(nn.BatchNorm2d(C)))
    for name in missing:
        setattr(model[0], name, None)
    diverge(lp.expand(model, K).eval()[0])
    x = torch.randn(B, C, 3, 2, dtype=torch.float64)
    weights = torch.randn_like(x)
    parameters = list(model.parameters())
    found = torch.autograd.grad((model(x) * weights).sum(), parameters)
    with lp.members(model, "stacked"):
        average = model(x.repeat(K, 1, 1, 1)).unflatten(0, (K, B)).mean(0)
    for one, other in zip(found, torch.autograd.grad((average * weights).sum(), parameters)):
        close(one, other)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "weights, means",
    [([1, -1], [2, -3]), ([1 + 1e-9, -1], [2, -3]), ([1, 1], [-2, 2]), ([0, 0, 0], [-1, 0, 2]), ([1, 1], [2, 2])],
    ids=["gains cancel", "gains nearly cancel", "shifts cancel", "no gain", "members agree"],
)
def test_average_and_its_gradient_where(weights, means, bias):
    num_members = len(weights)
    model = nn.Sequential(randomize(nn.BatchNorm2d(C)))
    if not bias:
        model[0].bias = None
    ensemble = lp.expand(model, num_members).eval()[0]
    with torch.no_grad():
        ensemble.weight.copy_(torch.tensor(weights).unsqueeze(1))
        ensemble.running_mean.copy_(torch.tensor(means).unsqueeze(1))
    x = torch.randn(B, C, 3, 2, dtype=torch.float64)
    averages = [model(x)]
    with lp.members(model, "stacked"):
        averages.append(model(x.repeat(num_members, 1, 1, 1)).unflatten(0, (num_members, B)).mean(0))
    close(*averages)
    factors = torch.randn_like(x)
    for one, other in zip(*(torch.autograd.grad((y * factors).sum(), list(model.parameters())) for y in averages)):
        close(one, other)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_average_in_a_short_type_keeps_large_means_without_affine(dtype, tolerance):
    model = lp.expand(nn.Sequential(nn.BatchNorm2d(C, affine=False).to(dtype)), K).eval()
    norm = model[0]
    norm.running_mean.normal_(300, 1)
    norm.running_var.uniform_(0.5, 1.5)
    x = (300 + torch.randn(B, C, 3, 2)).to(dtype)
    statistics = norm.running_mean.double(), norm.running_var.double()
    members = torch.stack([nn.functional.batch_norm(x.double(), mean, var) for mean, var in zip(*statistics)])
    torch.testing.assert_close(model(x).double(), members.mean(0), rtol=tolerance, atol=2 * tolerance)


def test_collapse_without_bias_stays_finite_where_its_mean_would_overflow():
    plain = nn.BatchNorm2d(C)
    plain.bias = None
    ensemble = EnsembleBatchNorm2d.from_module(plain.half(), 2).eval()
    with torch.no_grad():
        ensemble.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        ensemble.running_var.copy_(torch.tensor([[1.0], [1.001]]))
        ensemble.running_mean.copy_(torch.tensor([[0.0], [100.0]]))
    assert torch.equal(ensemble.collapse().running_mean, torch.full((C,), 50.0, dtype=torch.float16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_identical_members_without_bias_collapse_bit_for_bit(dtype):
    plain = nn.BatchNorm2d(101)
    plain.bias = None
    randomize(plain).to(dtype)
    plain.weight.data[0] = 0.0  # a channel without gain says nothing of its mean
    for mode in ("exact", "weights"):
        back = EnsembleBatchNorm2d.from_module(plain, 10).collapse(mode)
        assert back.state_dict().keys() == plain.state_dict().keys()
        assert all(torch.equal(value, plain.state_dict()[name]) for name, value in back.state_dict().items())


# ---------------------------------------------------------------------------------------------- copies


def test_copies_and_files_keep_every_kind(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    without_bias = nn.BatchNorm2d(C)
    without_bias.bias = None
    plain = nn.Sequential(
        norm_act("prelu"), nn.SyncBatchNorm(C), without_bias, nn.BatchNorm2d(C, track_running_stats=False)
    ).double()
    model = lp.expand(copy.deepcopy(plain), K, noise_std=0.3)
    x = torch.randn(K * B, C, 3, 2, dtype=torch.float64)
    model(x)
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded = lp.expand(copy.deepcopy(plain), K)
    loaded.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"))
    answer = model.eval()(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded.eval()):
        assert torch.equal(other(x), answer)
        assert other[0].weight.num_members == K and not hasattr(other[0].act.weight, "num_members")
    safetensors.save_file(lp.collapse(model).state_dict(), tmp_path / "plain.safetensors")
    plain.load_state_dict(safetensors.load_file(tmp_path / "plain.safetensors"))
    assert torch.equal(plain.eval()(x), answer)
