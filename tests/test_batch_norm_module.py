"""The batch norm modules against nn.BatchNorm, member by member; shapes: K members, B rows each, C channels."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from accuracy import ACTIVATIONS, STANDALONE
from torch import nn

from latephase_kernels.nn import (
    EnsembleBatchNorm1d,
    EnsembleBatchNorm2d,
    EnsembleBatchNorm3d,
    MemberLinear,
    SharedBatchNorm2d,
)

K, B, C = 3, 4, 5
KINDS = {  # with and without spatial dimensions, of unequal sizes
    "1d": (EnsembleBatchNorm1d, nn.BatchNorm1d, ()),
    "1d_length": (EnsembleBatchNorm1d, nn.BatchNorm1d, (7,)),
    "2d": (EnsembleBatchNorm2d, nn.BatchNorm2d, (3, 2)),
    "3d": (EnsembleBatchNorm3d, nn.BatchNorm3d, (2, 3, 2)),
}


def randomize(module):
    """Give every member weights and statistics of its own."""
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    if module.running_mean is not None:
        module.running_mean.normal_()
        module.running_var.uniform_(0.3, 3.0)
    return module


def plain_members(ensemble, plain_type):
    """K plain batch norms with the members' tensors."""
    found = []
    for k in range(ensemble.num_members):
        plain = plain_type(C, ensemble.eps, ensemble.momentum, ensemble.affine, ensemble.track_running_stats)
        plain.to(torch.float64).train(ensemble.training)
        plain.load_state_dict({name: tensor[k] for name, tensor in ensemble.state_dict().items()})
        found.append(plain)
    return found


def assert_statistics_equal(ensemble, plains):
    for k, plain in enumerate(plains):
        for name, buffer in plain.named_buffers():
            torch.testing.assert_close(getattr(ensemble, name)[k], buffer, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_training_equals_batch_norm_of_each_member(kind, affine, momentum):
    ensemble_type, plain_type, spatial = KINDS[kind]
    ensemble = randomize(ensemble_type(C, K, momentum=momentum, affine=affine, dtype=torch.float64))
    plains = plain_members(ensemble, plain_type)
    for _ in range(3):  # the third cumulative average has momentum 1/3
        x = torch.randn(K * B, C, *spatial, dtype=torch.float64)
        y = ensemble(x)
        expected = torch.cat([plain(part) for plain, part in zip(plains, x.chunk(K))])
        torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
        assert_statistics_equal(ensemble, plains)


@pytest.mark.parametrize("track", [True, False])
def test_frozen_layer_uses_each_members_statistics(track):
    ensemble = randomize(EnsembleBatchNorm2d(C, K, track_running_stats=track, dtype=torch.float64)).eval()
    plains = plain_members(ensemble, nn.BatchNorm2d)
    x = torch.randn(K * B, C, 3, 2, dtype=torch.float64)
    expected = torch.cat([plain(part) for plain, part in zip(plains, x.chunk(K))])
    torch.testing.assert_close(ensemble(x), expected, rtol=1e-11, atol=1e-11)
    assert_statistics_equal(ensemble, plains)


def test_residual_and_activation():
    ensemble = EnsembleBatchNorm2d(C, K, activation="relu", dtype=torch.float64)
    plains = plain_members(ensemble, nn.BatchNorm2d)
    x, residual = torch.randn(2, K * B, C, 3, 2, dtype=torch.float64)
    normalized = torch.cat([plain(part) for plain, part in zip(plains, x.chunk(K))])
    torch.testing.assert_close(ensemble(x, residual), F.relu(normalized + residual))
    for activation in STANDALONE:
        torch.testing.assert_close(ensemble(x, activation=activation), ACTIVATIONS[activation](normalized))
    shared = SharedBatchNorm2d.from_module(copy.deepcopy(plains[0]), K)
    normalized = torch.cat([plains[0](part) for part in x.chunk(K)])
    for activation in STANDALONE:
        torch.testing.assert_close(shared(x, activation=activation), ACTIVATIONS[activation](normalized))


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_shared_batch_norm_moves_its_statistics_as_a_loop_does(momentum):
    plain = randomize(nn.BatchNorm2d(C, momentum=momentum, dtype=torch.float64))
    shared = SharedBatchNorm2d.from_module(copy.deepcopy(plain), K)
    for _ in range(2):
        x = torch.randn(K * B, C, 3, 2, dtype=torch.float64)
        torch.testing.assert_close(shared(x), torch.cat([plain(part) for part in x.chunk(K)]))
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(shared.state_dict()[name], value, rtol=1e-12, atol=1e-12)
    shared.eval(), plain.eval()
    torch.testing.assert_close(shared(x), plain(x), rtol=1e-11, atol=1e-11)


def test_shared_batch_norm_keeps_parameters_and_buffers():
    plain = nn.BatchNorm2d(C)
    shared = SharedBatchNorm2d.from_module(plain, K)
    back = shared.collapse()
    assert shared.weight is plain.weight and back.weight is plain.weight and back.running_var is plain.running_var
    assert type(back) is nn.BatchNorm2d and back._buffers.keys() == plain._buffers.keys()


@pytest.mark.parametrize("affine", [True, False])
def test_exact_collapse_is_the_average_of_the_members_outputs(affine):
    ensemble = randomize(EnsembleBatchNorm2d(C, K, affine=affine, dtype=torch.float64)).eval()
    x = torch.randn(B, C, 3, 2, dtype=torch.float64)
    average = ensemble(x.repeat(K, 1, 1, 1)).unflatten(0, (K, B)).mean(0)
    torch.testing.assert_close(ensemble.collapse()(x), average, rtol=1e-12, atol=1e-12)


def test_exact_collapse_in_float32_is_within_rounding_of_the_average():
    ensemble = randomize(EnsembleBatchNorm2d(C, K)).eval()
    x = torch.randn(B, C, 3, 2)
    average = copy.deepcopy(ensemble).double()(x.double().repeat(K, 1, 1, 1)).unflatten(0, (K, B)).mean(0)
    torch.testing.assert_close(ensemble.collapse()(x).double(), average, rtol=1e-5, atol=1e-5)


def test_weights_collapse_averages_every_tensor():
    ensemble = randomize(EnsembleBatchNorm2d(C, K, dtype=torch.float64))
    ensemble.num_batches_tracked.fill_(7)
    plain = ensemble.collapse("weights")
    for name, value in plain.state_dict().items():
        expected = torch.tensor(7) if name == "num_batches_tracked" else getattr(ensemble, name).mean(0)
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("mode", ["exact", "weights"])
@pytest.mark.parametrize("affine", [True, False])
def test_identical_members_collapse_bit_for_bit(dtype, mode, affine):
    plain = randomize(nn.BatchNorm2d(101, affine=affine)).to(dtype)  # 101 values: most means round somewhere
    plain.num_batches_tracked.fill_(12)
    if affine:
        plain.bias.data[0] = -0.0
    for num_members in (1, 3, 10):
        back = EnsembleBatchNorm2d.from_module(plain, num_members).collapse(mode)
        for name, value in plain.state_dict().items():
            assert back.state_dict()[name].dtype == value.dtype
            assert torch.equal(back.state_dict()[name], value), name
        if affine:
            assert torch.signbit(back.bias[0])


def test_from_module_keeps_what_the_module_is():
    plain = nn.BatchNorm2d(C, eps=1e-3, momentum=None).half().eval()
    plain.weight.requires_grad_(False)
    plain.note = "kept"
    calls = []
    handle = plain.register_forward_hook(lambda *_: calls.append(1))
    ensemble = EnsembleBatchNorm2d.from_module(plain, K)
    assert ensemble.eps == 1e-3 and ensemble.momentum is None and not ensemble.training and ensemble.note == "kept"
    assert not ensemble.weight.requires_grad and ensemble.bias.requires_grad and ensemble.weight.dtype == torch.float16
    ensemble(torch.randn(K, C, 2, 2).half())
    assert calls == [1]
    back = ensemble.collapse()
    handle.remove()
    back(torch.randn(K, C, 2, 2).half())
    assert calls == [1] and back.note == "kept" and not back.training and not back.weight.requires_grad
    assert vars(back).keys() == vars(plain).keys()


@pytest.mark.parametrize("module", [nn.BatchNorm2d(400), nn.Linear(20, 400)])
def test_noise_is_scaled_by_the_rms_of_each_tensor(module):
    nn.init.normal_(module.weight, 2.0, 0.5)
    nn.init.constant_(module.bias, -0.3)
    member_type = EnsembleBatchNorm2d if isinstance(module, nn.BatchNorm2d) else MemberLinear
    noisy = member_type.from_module(module, 50, 0.1, torch.Generator().manual_seed(0))
    again = member_type.from_module(module, 50, 0.1, torch.Generator().manual_seed(0))
    for name in ("weight", "bias"):
        noise = getattr(noisy, name) - getattr(module, name)
        rms = getattr(module, name).square().mean().sqrt().item()
        assert noise.std().item() == pytest.approx(0.1 * rms, rel=0.03)
        assert torch.equal(getattr(noisy, name), getattr(again, name))


def test_a_plain_state_dict_is_broadcast_and_an_expanded_one_is_not():
    plain = randomize(nn.BatchNorm2d(C))
    plain.num_batches_tracked.fill_(9)
    state = plain.state_dict()
    for assign in (False, True):
        ensemble = EnsembleBatchNorm2d(C, K)
        ensemble.load_state_dict(state, assign=assign)
        for name, value in ensemble.state_dict().items():
            assert torch.equal(value, state[name].expand_as(value))
        assert ensemble.weight.num_members == K
        other = EnsembleBatchNorm2d(C, K)
        randomize(ensemble)
        other.load_state_dict(ensemble.state_dict())
        assert torch.equal(other.running_var, ensemble.running_var)
    assert state["weight"].shape == (C,) and state["num_batches_tracked"].dim() == 0


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_member_linear_equals_a_linear_layer_of_each_member():
    for features, bias in ((6, True), (6, False), (0, True), (0, False)):
        head = MemberLinear(features, C, K, bias=bias, dtype=torch.float64)
        x = torch.randn(K * B, 2, features, dtype=torch.float64)
        parts = [F.linear(part, head.weight[k], head.bias[k] if bias else None) for k, part in enumerate(x.chunk(K))]
        torch.testing.assert_close(head(x), torch.cat(parts))
        rows = x[:B]
        average = head(rows.repeat(K, 1, 1)).unflatten(0, (K, B)).mean(0)
        torch.testing.assert_close(head.collapse()(rows), average)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_identical_linear_members_collapse_bit_for_bit(dtype):
    plain = nn.Linear(33, 17).to(dtype)
    back = MemberLinear.from_module(plain, 10).collapse()
    assert torch.equal(back.weight, plain.weight) and torch.equal(back.bias, plain.bias)


def test_the_mark_survives_copies_and_moves():
    ensemble = EnsembleBatchNorm2d(C, K)
    for other in (copy.deepcopy(ensemble), pickle.loads(pickle.dumps(ensemble)), ensemble.double()):
        assert other.weight.num_members == K and other.bias.num_members == K


class NormAndActivation(nn.BatchNorm2d):
    def forward(self, x):
        return F.relu(super().forward(x))


class MarkedNorm(nn.BatchNorm2d):
    """A subclass that computes what its parent does."""


def test_subclasses_come_back_or_are_refused():
    assert type(EnsembleBatchNorm2d.from_module(MarkedNorm(C), K).collapse()) is MarkedNorm
    with pytest.raises(NotImplementedError, match="NormAndActivation overrides forward"):
        EnsembleBatchNorm2d.from_module(NormAndActivation(C), K)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="num_members must be at least 1, got 0"):
        EnsembleBatchNorm2d(C, 0)
    with pytest.raises(TypeError, match="num_members must be an int, got float"):
        EnsembleBatchNorm2d(C, 2.0)
    with pytest.raises(ValueError, match="activation must be one of none, relu"):
        EnsembleBatchNorm2d(C, K, activation="gelu")
    with pytest.raises(TypeError, match="must be a BatchNorm2d, got BatchNorm1d"):
        EnsembleBatchNorm2d.from_module(nn.BatchNorm1d(C), K)
    with pytest.raises(ValueError, match="noise_std must be finite and >= 0"):
        EnsembleBatchNorm2d.from_module(nn.BatchNorm2d(C), K, -1.0)
    with pytest.raises(ValueError, match='mode must be "exact" or "weights"'):
        EnsembleBatchNorm2d(C, K).collapse("mean")
    with pytest.raises(ValueError, match="not divisible by num_members=3"):
        MemberLinear(6, C, K)(torch.randn(4, 6))
    ensemble = EnsembleBatchNorm2d(C, K, momentum=None)
    with pytest.raises(ValueError, match="not divisible by num_members=3"):
        ensemble(torch.randn(4, C, 2, 2))
    with pytest.raises(ValueError, match="4D input"):
        ensemble(torch.randn(6, C))
    assert ensemble.num_batches_tracked.tolist() == [0] * K  # a refused batch does not count
