"""Hypernetwork embeddings as late-phase weights; shapes: K members, B rows each, T templates, S slices."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import latephase_kernels as lp
from latephase_kernels.late_phase import SequentialTrainer
from latephase_kernels.models import HyperWideResNet, WideResNet
from latephase_kernels.nn import HyperConv2d, HyperLinear, MemberHyperConv2d, MemberHyperLinear, TemplateBank
from latephase_kernels.nn.hypernetwork import orthogonal_embeddings_

K, B = 3, 2


pytestmark = pytest.mark.usefixtures("one_thread")


def explicit_sum(templates, embedding):
    """Σ_t c_{t,s} T_t for each slice s, side by side along the input channels, in loops."""
    slices = [sum(c * template for c, template in zip(column, templates)) for column in embedding.T]
    return torch.cat(slices, 1)


def make_network(depth=10, dtype=torch.float64, **options):
    """Templates of the bias start at zero, and statistics at their standard values: everything is made to matter."""
    model = HyperWideResNet(depth, 1, 3, **options).to(dtype)
    nn.init.normal_(model.fc.bank.bias_templates)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def scatter_members(model):
    """Make the members of every embedding differ."""
    for name, parameter in model.named_parameters():
        if name.endswith("embedding"):
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


# ---------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize("num_slices", [1, 2, 3])
def test_weights_are_the_sum_of_templates(num_slices):
    bank = TemplateBank(4, (5, 2, 3, 3), dtype=torch.float64)
    conv = HyperConv2d(bank, num_slices, stride=2, padding=1)
    weight = explicit_sum(bank.templates, conv.embedding)
    x = torch.randn(B, 2 * num_slices, 7, 6, dtype=torch.float64)
    torch.testing.assert_close(conv.weight_and_bias()[0], weight)
    torch.testing.assert_close(conv(x), F.conv2d(x, weight, None, 2, 1))

    bank = TemplateBank(4, (5, 2), bias=True, dtype=torch.float64)
    nn.init.normal_(bank.bias_templates)
    linear = HyperLinear(bank, num_slices)
    bias = sum(c * template for c, template in zip(linear.embedding.sum(1), bank.bias_templates))
    x = torch.randn(B, 4, 2 * num_slices, dtype=torch.float64)
    torch.testing.assert_close(linear(x), F.linear(x, explicit_sum(bank.templates, linear.embedding), bias))


@pytest.mark.parametrize("kind", ["conv", "linear"])
@pytest.mark.parametrize("members", [range(K), range(1, 3)])
def test_every_member_is_the_layer_with_its_own_embedding(kind, members):
    """Values and gradients; a chunk of the members leaves the others without gradient. Channels_last as well."""
    if kind == "conv":
        plain = HyperConv2d(TemplateBank(4, (5, 2, 3, 3), dtype=torch.float64), 2, padding=1)
        x = torch.randn(len(members) * B, 4, 5, 6, dtype=torch.float64).to(memory_format=torch.channels_last)
    else:
        plain = HyperLinear(TemplateBank(4, (5, 2), bias=True, dtype=torch.float64), 2)
        nn.init.normal_(plain.bank.bias_templates)
        x = torch.randn(len(members) * B, 3, 4, dtype=torch.float64)
    model = lp.expand(nn.Sequential(copy.deepcopy(plain)), K, targets="embedding", noise_std=0.5)
    layer = model[0]
    assert type(layer) is {"conv": MemberHyperConv2d, "linear": MemberHyperLinear}[kind]
    x.requires_grad_()
    with lp.members(model, members):
        y = model(x)
    dy = torch.randn_like(y)
    tensors = [x, *layer.parameters()]
    gradients = torch.autograd.grad(y, tensors, dy)

    outputs = []
    own = layer.embedding.detach().clone().requires_grad_()
    bank = plain.bank
    bank.load_state_dict(layer.bank.state_dict())
    for part, k in zip(x.chunk(len(members)), members):
        weight = explicit_sum(bank.templates, own[k])
        if kind == "conv":
            outputs.append(F.conv2d(part, weight, None, 1, 1))
        else:
            outputs.append(F.linear(part, weight, own[k].sum(1) @ bank.bias_templates))
    expected = torch.cat(outputs)
    torch.testing.assert_close(y, expected)
    expected_gradients = torch.autograd.grad(expected, [x, own, *bank.parameters()], dy)
    torch.testing.assert_close(gradients, expected_gradients)


def test_gradients_of_a_shared_bank_add_up_over_layers():
    bank = TemplateBank(3, (4, 2, 3, 3), dtype=torch.float64)
    model = nn.Sequential(HyperConv2d(bank, padding=1), HyperConv2d(bank, 2, padding=1))
    names = [name for name, _ in model.named_parameters()]
    assert names == ["0.embedding", "0.bank.templates", "1.embedding"]
    x = torch.randn(B, 2, 5, 5, dtype=torch.float64)
    own = [bank.templates.detach().clone().requires_grad_() for _ in range(2)]
    y = x
    for conv, templates in zip(model, own):
        y = F.conv2d(y, explicit_sum(templates, conv.embedding.detach()), padding=1)
    y.square().sum().backward()
    model(x).square().sum().backward()
    torch.testing.assert_close(bank.templates.grad, own[0].grad + own[1].grad)


def test_initial_embeddings_and_templates():
    """Orthogonal among layers of equal bank and shape, mean slice norm 1; the weights have Kaiming's variance."""
    model = HyperWideResNet(28, 1, 10)
    groups = {}
    for module in model.modules():
        if isinstance(module, (HyperConv2d, HyperLinear)):
            groups.setdefault((module.bank, module.embedding.shape), []).append(module.embedding.detach())
    # n = 4 blocks a stage: at width 1 all 8 convolutions of the first stage have two slices, later 7 and one shortcut.
    counts = sorted((tuple(shape), len(group)) for (_, shape), group in groups.items())
    assert counts == [((7, 1), 1)] * 2 + [((10, 1), 1)] * 2 + [((14, 1), 1)] * 2 + [((14, 2), 7)] * 2 + [((14, 2), 8)]
    for group in groups.values():
        rows = torch.stack(group).flatten(1)
        products = rows @ rows.T
        torch.testing.assert_close(products, products.diag().diag(), rtol=0, atol=1e-5)
        for embedding in group:
            assert embedding.norm(dim=0).mean().item() == pytest.approx(1, abs=1e-5)
    conv = model.stage3[2].conv1  # 64 · 32 · 9 elements of each template
    std = conv.bank.templates.std().item()
    assert std == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.01)  # 1 / sqrt(2 · 258048) is 0.0014

    bank = TemplateBank(2, (3, 2, 1, 1))
    many = [HyperConv2d(bank) for _ in range(5)]  # more layers than coefficients: these are orthogonal before scaling
    orthogonal_embeddings_(many)
    for layer in many:
        assert layer.embedding.norm().item() == pytest.approx(1, abs=1e-5)


# ---------------------------------------------------------------------------------------------- the network


def test_parameters_of_wrn_28_10():
    """Worked out by hand, n = 4 blocks a stage, 2n − 1 = 7 templates, 14 where they cover half of the input channels.

    input     10 · 16·3·9                                     4 320
    stage 1    7 · 160·16·9 (first conv1, a bank of its own)  161 280
              14 · 160·80·9                                   1 612 800,  shortcut 7 · 160·16       17 920
    stage 2   14 · 320·160·9 (with the first conv1)           6 451 200,  shortcut 7 · 320·160     358 400
    stage 3   14 · 640·320·9                                 25 804 800,  shortcut 7 · 640·320   1 433 600
    head      10 · (10·640 + 10)                              64 100
    norms     2 · ((16 + 7·160) + (160 + 7·320) + (320 + 7·640) + 640)   17 952
    embeddings  input and head 10 + 10; stage 1: 7 + 7·28 + 7; stages 2 and 3: 14 + 7·28 + 7 each   664
    """
    with torch.device("meta"):
        model = HyperWideResNet(28, 10, 10)
    templates = 4320 + 161_280 + 1_612_800 + 17_920 + 6_451_200 + 358_400 + 25_804_800 + 1_433_600 + 64_100
    names = model.no_weight_decay()
    assert sum(p.numel() for name, p in model.named_parameters() if name in names) == 664
    assert sum(p.numel() for p in model.parameters()) == templates + 17_952 + 664 == 35_927_036
    # every bank once; the norms' statistics, and 25 counts of batches, are no parameters
    assert sum(t.numel() for t in model.state_dict().values()) == 35_927_036 + 17_952 + 25


@pytest.mark.parametrize("depth, width", [(10, 1), (16, 2), (10, 3)])  # 3: the first convolution has a bank of its own
def test_the_network_is_a_wide_resnet(depth, width):
    """Equal to the WideResNet of explicit sums, strictly loaded."""
    model = HyperWideResNet(depth, width, 4, in_channels=2).double().eval()
    nn.init.normal_(model.fc.bank.bias_templates)
    state = {}
    for name, module in model.named_modules():
        if isinstance(module, (HyperConv2d, HyperLinear)):
            state[f"{name}.weight"] = explicit_sum(module.bank.templates, module.embedding)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            state |= module.state_dict(prefix=f"{name}.")
    state["fc.bias"] = model.fc.embedding[:, 0] @ model.fc.bank.bias_templates
    expected = WideResNet(depth, width, 4, in_channels=2).double().eval()
    expected.load_state_dict(state)
    x = torch.randn(3, 2, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(model(x), expected(x))


def test_state_copies_and_conversions_keep_banks_shared():
    model = make_network(16, torch.float32).eval()
    lp.expand(model, K, targets="embedding", noise_std=0.1)
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    layers = [module for module in model.modules() if isinstance(module, MemberHyperConv2d)]
    banks = len({id(layer.bank) for layer in layers})
    storages = [tensor.data_ptr() for tensor in model.state_dict().values()]
    assert len(storages) == len(set(storages))  # what safetensors demands, and averages of states
    other = lp.expand(HyperWideResNet(16, 1, 3), K, targets="embedding").eval()
    other.load_state_dict(model.state_dict())
    pair = nn.ModuleList([copy.deepcopy(model)])  # inside another module, keys have a prefix
    pair.load_state_dict(nn.ModuleList([model]).state_dict())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other, pair[0]):
        assert torch.equal(twin(x), expected)
        found = [module for module in twin.modules() if isinstance(module, MemberHyperConv2d)]
        assert len({id(layer.bank) for layer in found}) == banks < len(found)
        assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    with pytest.raises(RuntimeError, match=r"Missing key.*stage1.0.conv1.bank.templates"):
        other.load_state_dict({k: v for k, v in model.state_dict().items() if "stage1.0.conv1.bank" not in k})
    converted = copy.deepcopy(model).to(memory_format=torch.channels_last).double()  # templates have five dimensions
    torch.testing.assert_close(converted(x.double()).float(), expected)
    assert all(layer.embedding.num_members == K for layer in converted.modules() if isinstance(layer, type(layers[0])))


# ---------------------------------------------------------------------------------------------- late phase


@pytest.mark.parametrize("depth, targets", [(10, "embedding"), (16, ("embedding", "batch_norm"))])
def test_stacked_training_equals_the_loop_over_members(depth, targets):
    """Also fused; a batch norm that is no target keeps one weight, and the running statistics of the loop."""
    plain = make_network(depth)
    model = lp.fuse(lp.expand(copy.deepcopy(plain), K, targets=targets))

    def make_optimizer(parameters):
        return torch.optim.SGD(parameters, lr=0.02, momentum=0.9)

    trainer = SequentialTrainer(plain, K, optimizer=make_optimizer, targets=targets)
    optimizer = make_optimizer(model.parameters())
    for _ in range(20):
        x = torch.randn(K * B, 3, 8, 8, dtype=torch.float64)
        labels = torch.randint(3, (K * B,))
        optimizer.zero_grad()
        lp.member_loss(F.cross_entropy, model(x), labels, num_members=K).backward()
        optimizer.step()
        trainer.step(F.cross_entropy, list(zip(x.chunk(K), labels.chunk(K))))
    state = model.state_dict()
    for k, member in enumerate(trainer.members):
        for name, tensor in member.state_dict().items():
            own = state[name] if state[name].shape == tensor.shape else state[name][k]
            late = name.endswith("embedding") or (targets != "embedding" and "bn" in name)
            assert (state[name].dim() > tensor.dim()) == late
            torch.testing.assert_close(own, tensor, rtol=1e-9, atol=1e-9)
    spread = model.stage2[0].conv2.embedding.detach().std(0)
    assert spread.min() > 1e-3  # the members have gone their own ways
    averaged = lp.collapse(copy.deepcopy(model.eval()))
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(model(x), averaged(x), rtol=1e-9, atol=1e-9)


def test_answers_in_eval_mode():
    """On average: the network of the mean embeddings, bit for bit the collapsed one's; one member: its own network."""
    plain = make_network(16).eval()
    model = scatter_members(lp.expand(copy.deepcopy(plain), K, targets="embedding"))
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    state = model.state_dict()

    def network_of(choose):
        own = copy.deepcopy(plain)
        own.load_state_dict({n: choose(t) if n.endswith("embedding") else t for n, t in state.items()})
        return own(x)

    torch.testing.assert_close(model(x), network_of(lambda t: t.mean(0)))
    members = torch.stack([network_of(lambda t, k=k: t[k]) for k in range(K)])
    torch.testing.assert_close(lp.predict(model, x, members="all"), members)
    assert (members - members.mean(0)).abs().max() > 0.01
    expected = model(x)
    assert torch.equal(lp.collapse(model)(x), expected)


@pytest.mark.parametrize("mode", ["exact", "weights"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_collapse_gives_back_the_hypernetwork(mode, dtype):
    """Keys, shapes, classes, flags; identical members their bits."""
    plain = make_network(16, dtype)
    plain.stage2[1].conv2.embedding.requires_grad_(False)
    plain.stage3[1].conv2.embedding = plain.stage3[1].conv1.embedding
    model = lp.expand(copy.deepcopy(plain), K, targets=("embedding", "batch_norm"))
    assert model.stage3[1].conv2.embedding is model.stage3[1].conv1.embedding
    lp.collapse(model, mode=mode)
    before, after = plain.state_dict(), model.state_dict()
    assert list(before) == list(after) and all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    assert flags == [parameter.requires_grad for parameter in plain.parameters()] and not all(flags)


def test_embeddings_do_not_decay():
    model = lp.expand(make_network(10), K, targets="embedding")
    names = model.no_weight_decay()
    assert len(names) == 1 + 3 * 2 + 2 + 1  # input, one block a stage, two shortcuts, head
    groups = lp.param_groups(model, lr=0.1, weight_decay=1e-2, no_decay=lambda name, _: name in names)
    assert [group["name"] for group in groups] == ["base", "member_no_decay"]
    assert len(groups[1]["params"]) == len(names) and groups[1]["weight_decay"] == 0
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.optim.SGD(groups).step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, before[name] * (1 if name in names else 1 - 1e-3))


def test_members_differ_by_less_than_bfloat16_resolves():
    """Under autocast the mixing stays in float32: a difference of 1e-4 between members still reaches their outputs."""
    bank = TemplateBank(4, (32, 8, 3, 3))
    layer = MemberHyperConv2d(bank, 2, padding=1)
    assert torch.equal(layer.embedding[0], layer.embedding[1])
    with torch.no_grad():
        layer.embedding[1] *= 1 + 1e-4
    with torch.autocast("cpu", torch.bfloat16):
        weight, _ = layer.weight_and_bias()
        y = layer(torch.randn(1, 8, 5, 5).repeat(2, 1, 1, 1))
    assert weight.dtype == torch.float32 and y.dtype == torch.bfloat16
    torch.testing.assert_close(weight[1], weight[0] * (1 + 1e-4), rtol=1e-6, atol=1e-7)
    assert not torch.equal(y[0], y[1])


def test_compiles_without_graph_breaks():
    model = scatter_members(lp.expand(make_network(10, torch.float32), K, targets="embedding"))
    x = torch.randn(K * B, 3, 8, 8)
    expected = copy.deepcopy(model)(x)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), expected)


# ---------------------------------------------------------------------------------------------- errors


def test_errors_say_what_to_do():
    bank = TemplateBank(2, (3, 2, 1, 1))
    layer = MemberHyperConv2d(bank, K)
    with pytest.raises(
        ValueError, match=r"MemberHyperConv2d: input must be \[K·B, 2, H, W\], got shape \[3, 4, 5, 5\]"
    ):
        layer(torch.zeros(3, 4, 5, 5))
    with pytest.raises(ValueError, match=r"input.size\(0\)=4 is not divisible by num_members=3; stack 3"):
        layer(torch.zeros(4, 2, 5, 5))
    with pytest.raises(ValueError, match="num_members must be at least 1"):
        MemberHyperConv2d(bank, 0)
    with pytest.raises(ValueError, match=r"HyperLinear: bank must hold templates of 2 dimensions, got shape \[3, 2, 1"):
        HyperLinear(bank)
    with pytest.raises(TypeError, match="HyperConv2d: bank must be a TemplateBank, got Linear"):
        HyperConv2d(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="num_slices must be at least 1, got 0"):
        HyperConv2d(bank, 0)
    with pytest.raises(ValueError, match="num_templates must be at least 1, got 0"):
        TemplateBank(0, (2, 2))
    with pytest.raises(ValueError, match=r"weight_shape must be \[out, in\] or"):
        TemplateBank(1, (2, 2, 3))
    with pytest.raises(TypeError, match="from_module: module must be a HyperConv2d, got Conv2d"):
        MemberHyperConv2d.from_module(nn.Conv2d(2, 2, 1), K)


@pytest.mark.parametrize("change", ["forward", "parametrization", "child"])
def test_a_layer_that_does_more_is_refused_and_nothing_changed(change):
    class Scaled(HyperConv2d):
        def forward(self, input):
            return 2 * super().forward(input)

    bank = TemplateBank(2, (3, 2, 1, 1))
    model = nn.Sequential(
        HyperConv2d(TemplateBank(2, (2, 2, 1, 1))), (Scaled if change == "forward" else HyperConv2d)(bank)
    )
    if change == "parametrization":
        nn.utils.parametrizations.weight_norm(model[1], "embedding")
    if change == "child":
        model[1].extra = nn.Linear(1, 1)
    before = list(model)
    with pytest.raises(
        NotImplementedError, match=r"expand: 1: .* which replacing it would lose; use a plain HyperConv2d"
    ):
        lp.expand(model, K, targets="embedding")
    assert list(model) == before and type(model[0]) is HyperConv2d
