"""Late-phase weights of modules that have no class of their own here; shapes: K members, B samples each."""

import copy

import pytest
import torch
from torch import nn

import latephase_kernels as lp
from latephase_kernels.nn import Memberwise

K, B = 3, 2


class Scale(nn.Module):
    """A user's own module: a parameter by another name than weight, and one that is missing."""

    def __init__(self, size):
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(size))
        self.register_parameter("beta", None)

    def forward(self, x, gate=None, *, power=1.0):
        return x * self.gamma if gate is None else x * self.gamma * gate**power


class Pair(nn.Module):
    """Takes a tuple and returns a dictionary."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(torch.rand(2, 4))

    def forward(self, pair):
        return {"sum": pair[0] * self.mix[0] + pair[1] * self.mix[1], "kind": "pair"}


class Calls(nn.Module):
    """A network that is one layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *args, **kwargs):
        return self.layer(*args, **kwargs)


def normal(*size):
    return torch.randn(K * B, *size, dtype=torch.float64)


CASES = {
    "scale": (lambda: Scale(4), lambda: ((normal(4),), {})),
    "scale with a gate": (lambda: Scale(4), lambda: ((normal(4), normal(1)), {"power": 2.0})),
    "scale with one gate for all": (lambda: Scale(4), lambda: ((normal(4),), {"gate": normal(4)[:1]})),
    "pair": (Pair, lambda: (((normal(4), normal(4)),), {})),
    "PReLU": (lambda: nn.PReLU(4), lambda: ((normal(4, 5),), {})),
    "embedding": (lambda: nn.Embedding(7, 4), lambda: ((torch.randint(7, (K * B, 5)),), {})),
    "counting embedding": (
        lambda: nn.Embedding(7, 4, scale_grad_by_freq=True),
        lambda: ((torch.randint(7, (K * B, 5)),), {}),
    ),
    "convolution": (lambda: nn.Conv2d(4, 3, 3), lambda: ((normal(4, 5, 5),), {})),
    "instance norm": (lambda: nn.InstanceNorm2d(4, affine=True), lambda: ((normal(4, 5, 5),), {})),
    "bilinear": (lambda: nn.Bilinear(4, 3, 2), lambda: ((normal(4), normal(3)), {})),
}


def expanded(layer, **options):
    model = Calls(layer).double().train()
    return lp.expand(model, K, targets=lambda name, module: name == "layer", **options)


def of_member(k, arguments):
    """What member k gets: its own rows of each tensor that has rows for all."""
    return torch.utils._pytree.tree_map(
        lambda x: x[k * B : (k + 1) * B] if isinstance(x, torch.Tensor) and x.size(0) == K * B else x, arguments
    )


def tensor_of(output):
    return output["sum"] if isinstance(output, dict) else output


@pytest.mark.parametrize("name", CASES)
def test_equals_separate_modules(name):
    make, arguments = CASES[name]
    plain, (args, kwargs) = make().double(), arguments()
    model = expanded(copy.deepcopy(plain), noise_std=0.3)
    assert type(model.layer) is Memberwise and list(model.layer.state_dict()) == list(plain.state_dict())
    y = tensor_of(model(*args, **kwargs))
    dy = torch.randn_like(y)
    y.backward(dy)
    for k, own_dy in enumerate(dy.chunk(K)):
        member = copy.deepcopy(plain)
        member.load_state_dict({key: value[k] for key, value in model.layer.state_dict().items()})
        own_args, own_kwargs = of_member(k, (args, kwargs))
        own = tensor_of(member(*own_args, **own_kwargs))
        torch.testing.assert_close(y[k * B : (k + 1) * B], own, rtol=1e-14, atol=1e-14)
        own.backward(own_dy)
        for (key, p), late in zip(member.named_parameters(), model.layer.parameters()):
            torch.testing.assert_close(late.grad[k], p.grad, rtol=1e-14, atol=1e-14, msg=key)


@pytest.mark.parametrize("name", CASES)
def test_average_and_collapse(name):
    make, arguments = CASES[name]
    plain, (args, kwargs) = make().double(), arguments()
    model = expanded(copy.deepcopy(plain), noise_std=0.3).eval()
    outputs = [tensor_of(lp.predict(model, *args, members=k, **kwargs)) for k in range(K)]
    average = tensor_of(model(*args, **kwargs))
    torch.testing.assert_close(average, torch.stack(outputs).mean(0), rtol=1e-13, atol=1e-13)
    weights = {key: value.mean(0) for key, value in model.layer.state_dict().items()}
    lp.collapse(model)
    assert type(model.layer) is type(plain)
    torch.testing.assert_close(dict(model.layer.state_dict()), weights)
    torch.testing.assert_close(tensor_of(model(*args, **kwargs)), average, rtol=0, atol=0)


def test_in_a_network():
    """Optimizer, plain checkpoints, ranges of members, copies and check_members know it as any other target."""
    model = nn.Sequential(nn.Linear(4, 4), Scale(4), nn.ReLU(), nn.Linear(4, 2)).double()
    plain = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(lp.param_groups(model, lr=0.1), lr=0.1, momentum=0.9)
    lp.expand(model, K, targets=lambda name, module: isinstance(module, Scale), optimizers=[optimizer])
    model.load_state_dict(plain)
    x = normal(4)
    lp.check_members(model, x)
    model(x).square().sum().backward()
    optimizer.step()
    with lp.members(model, range(1, 3)):
        two = model(x[B:])
    torch.testing.assert_close(two, copy.deepcopy(model)(x)[B:], rtol=1e-14, atol=1e-14)
    assert model[1].gamma.num_members == K and len({tuple(row.tolist()) for row in model[1].gamma}) == K
    lp.collapse(model)
    assert {key: value.shape for key, value in model.state_dict().items()} == {k: v.shape for k, v in plain.items()}


def test_layer_scale_of_a_vision_transformer():
    timm = pytest.importorskip("timm")
    model = timm.create_model("deit3_small_patch16_224", img_size=32, depth=2, num_classes=3).double().eval()
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    before = model(x)
    lp.expand(model, K, targets=lambda name, module: type(module).__name__ == "LayerScale")
    torch.testing.assert_close(lp.predict(model, x, members="all"), before.expand(K, -1, -1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lp.collapse(model)(x), before, rtol=0, atol=0)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)

    def forward(self, x):
        return self.embed(x) @ self.embed.weight.T


class Counting(Scale):
    def __init__(self, size):
        super().__init__(size)
        self.register_buffer("calls", torch.zeros(()))


class Keeping(Scale):
    def __init__(self, size):
        super().__init__(size)
        self.also = [self.gamma]


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.ReLU(), "layer: .*ReLU has no parameters of its own"),
        (nn.Sequential(nn.Linear(2, 2)), "layer: .*Sequential has no parameters of its own"),
        (nn.MultiheadAttention(4, 2), r'layer: .*MultiheadAttention has modules inside \("out_proj"\); choose these'),
        (nn.GRU(2, 2), 'layer: .*GRU has tensors in its attribute "_flat_weights"'),
        (nn.Embedding(4, 2, max_norm=1.0), "layer: .*Embedding with max_norm changes its weight in forward"),
        (Counting(4), r'layer: .*Counting has buffers \("calls"\)'),
        (Keeping(4), 'layer: .*Keeping has tensors in its attribute "also"'),
    ],
)
def test_refused(layer, message):
    model = Calls(layer)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NotImplementedError, match=message):
        lp.expand(model, K, targets=lambda name, module: name == "layer")
    assert model.layer is layer and str(model.state_dict()) == str(before)


def test_a_weight_that_others_read_is_refused():
    with pytest.raises(NotImplementedError, match="embed cannot be replicated: the module it is in reads its weight"):
        lp.expand(Tied(), K, targets=lambda name, module: name == "embed")


def test_wrong_rows_and_no_rows():
    model = expanded(Scale(4))
    with pytest.raises(ValueError, match=r"Scale: input.size\(0\)=7 is not divisible by num_members=3"):
        model(torch.randn(7, 4, dtype=torch.float64))
    with pytest.raises(TypeError, match="Scale: members need an argument with a batch in dim 0, got none"):
        model(2.0)
