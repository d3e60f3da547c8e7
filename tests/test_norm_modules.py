"""Layer, group and RMS norms as late-phase weights; shapes: K members, B samples each."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from latephase_kernels import late_phase as lp
from latephase_kernels.nn import EnsembleGroupNorm, EnsembleLayerNorm, EnsembleRMSNorm, norms

K, B = 3, 2


class ScaledLayerNorm(nn.LayerNorm):
    """A subclass that does something behind the norm, by super().forward()."""

    def forward(self, input):
        return 0.5 * torch.tanh(super().forward(input))


class GemmaRMSNorm(nn.Module):
    """As in language models: known by its name alone, and no plain multiplication by weight."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.variance_epsilon = 1e-6

    def forward(self, hidden):
        rms = hidden.pow(2).mean(-1, keepdim=True).add(self.variance_epsilon).rsqrt()
        return hidden * rms * (1 + self.weight)


class T5LayerNorm(GemmaRMSNorm):
    """Known by its name alone, too, which is a layer norm's."""

    def forward(self, hidden):
        return super().forward(hidden) - hidden


class RMSNormGated(GemmaRMSNorm):
    """Takes a gate with a row for each of the input's, or none."""

    def forward(self, hidden, gate=None, *, power=1.0):
        return super().forward(hidden if gate is None else hidden * F.silu(gate) ** power)


def timm_norm(name, *arguments, fast=False, **options):
    def make():
        layers = pytest.importorskip("timm").layers
        from timm.layers import fast_norm

        fast_norm.set_fast_norm(fast)
        try:
            return getattr(layers, name)(*arguments, **options)
        finally:
            fast_norm.set_fast_norm(False)

    return make


def torchvision_layer_norm_2d():
    pytest.importorskip("torchvision")
    from torchvision.models.convnext import LayerNorm2d

    return LayerNorm2d(4, eps=1e-6)


LAYER, GROUP, RMS, OWN = "EnsembleLayerNorm", "EnsembleGroupNorm", "EnsembleRMSNorm", "Memberwise"
IMAGE, TOKENS = (4, 3, 2), (5, 4)  # [C, H, W] and [tokens, C]
CASES = {  # the plain norm, the shape of a sample, the target, the class that it becomes
    "layer": (lambda: nn.LayerNorm(4), TOKENS, "layer_norm", LAYER),
    "layer of rows": (lambda: nn.LayerNorm(4), (4,), "layer_norm", LAYER),
    "layer over two dimensions": (lambda: nn.LayerNorm((5, 4), eps=1e-3), (2, *TOKENS), "layer_norm", LAYER),
    "layer over the whole sample": (lambda: nn.LayerNorm(IMAGE), IMAGE, "layer_norm", LAYER),
    "layer without bias": (lambda: nn.LayerNorm(4, bias=False), TOKENS, "layer_norm", LAYER),
    "group": (lambda: nn.GroupNorm(2, 4), IMAGE, "group_norm", GROUP),
    "group of rows": (lambda: nn.GroupNorm(2, 4, eps=1e-2), (4,), "group_norm", GROUP),
    "rms": (lambda: nn.RMSNorm(4), TOKENS, "rms_norm", RMS),
    "rms over two dimensions": (lambda: nn.RMSNorm((5, 4), eps=1e-2), TOKENS, "rms_norm", RMS),
    "subclass": (lambda: ScaledLayerNorm(4), TOKENS, "layer_norm", OWN),
    "rms by name": (lambda: GemmaRMSNorm(4), TOKENS, "rms_norm", OWN),
    "layer by name": (lambda: T5LayerNorm(4), TOKENS, "layer_norm", OWN),
    "torchvision 2d": (torchvision_layer_norm_2d, IMAGE, "layer_norm", "EnsembleLayerNorm2d"),
    "timm layer": (timm_norm("LayerNorm", 4), TOKENS, "layer_norm", LAYER),
    "timm layer 2d": (timm_norm("LayerNorm2d", 4), IMAGE, "layer_norm", "EnsembleLayerNorm2d"),
    "timm fast layer": (timm_norm("LayerNorm", 4, fast=True), TOKENS, "layer_norm", OWN),
    "timm layer fp32": (timm_norm("LayerNormFp32", 4), TOKENS, "layer_norm", OWN),
    "timm layer act": (timm_norm("LayerNormAct", 4), TOKENS, "layer_norm", OWN),
    "timm group": (timm_norm("GroupNorm", 4, 2), IMAGE, "group_norm", GROUP),
    "timm group 1": (timm_norm("GroupNorm1", 4), IMAGE, "group_norm", GROUP),
    "timm group act": (timm_norm("GroupNormAct", 4, 2), IMAGE, "group_norm", OWN),
    "timm rms": (timm_norm("RmsNorm", 4), TOKENS, "rms_norm", RMS),
    "timm rms 2d": (timm_norm("RmsNorm2d", 4), IMAGE, "rms_norm", OWN),
    "timm simple": (timm_norm("SimpleNorm", 4), TOKENS, "rms_norm", OWN),
}
EXACT = {"timm layer fp32": 1e-6}  # computes in float32


def randomize(model, seed=0):
    """Weights around 1 and biases around 0.5, so that a forgotten one shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_((0.5 if name.endswith("bias") else 1.0) + 0.3 * noise)
    return model


def plain_members(model, plain):
    """K copies of the plain model with the members' tensors."""
    copies = []
    for k in range(K):
        state = {
            name: value[k] if value.shape != plain.state_dict()[name].shape else value
            for name, value in model.state_dict().items()
        }
        copies.append(copy.deepcopy(plain))
        copies[-1].load_state_dict(state)
    return copies


def assert_gradients_equal(model, plains, tolerance):
    """Member weights have each member's gradient, base weights the sum."""
    for name, parameter in model.named_parameters():
        members = torch.stack([dict(plain.named_parameters())[name].grad for plain in plains])
        expected = members if hasattr(parameter, "num_members") else members.sum(0)
        torch.testing.assert_close(parameter.grad, expected, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------------------------- each norm


@pytest.mark.parametrize("gains", [False, True])
@pytest.mark.parametrize(
    "case, channels_last", [(case, last) for case in CASES for last in (False, True)[: 1 + (CASES[case][1] == IMAGE)]]
)
def test_every_member_is_the_plain_norm(case, channels_last, gains, monkeypatch):
    monkeypatch.setattr(norms, "_gains_pay", lambda input: gains)  # both ways, whatever kernels there are
    make, sample, target, cls = CASES[case]
    tolerance = EXACT.get(case, 1e-12)
    torch.manual_seed(0)
    plain = randomize(nn.Sequential(make())).double()
    model = lp.expand(copy.deepcopy(plain), K, targets=target, noise_std=0.5)
    assert type(model[0]).__name__ == cls and model[0].weight.shape == (K, *plain[0].weight.shape)
    x = torch.randn(K * B, *sample, dtype=torch.float64)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    dy = torch.randn_like(x)
    plains = plain_members(model, plain)
    y = model(x)
    expected = torch.cat([member(rows) for member, rows in zip(plains, x.chunk(K))])
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    assert y.is_contiguous(memory_format=torch.channels_last) or not plain(x).is_contiguous(
        memory_format=torch.channels_last
    )
    (dx,) = torch.autograd.grad(expected, x, dy, retain_graph=True)
    expected.backward(dy)
    x.grad = None
    y.backward(dy)
    torch.testing.assert_close(x.grad, dx, rtol=tolerance, atol=tolerance)
    assert_gradients_equal(model, plains, tolerance)
    with lp.members(model, range(1, 3)):
        torch.testing.assert_close(model(x[B:]), expected[B:], rtol=tolerance, atol=tolerance)
    with lp.members(model, 2):
        torch.testing.assert_close(model(x[2 * B :]), expected[2 * B :], rtol=tolerance, atol=tolerance)


def test_what_a_norm_takes_beside_its_input_goes_along():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = RMSNormGated(4)

        def forward(self, x, *gate, **options):
            return self.norm(x, *gate, **options)

    torch.manual_seed(0)
    plain = randomize(Gated()).double()
    model = lp.expand(copy.deepcopy(plain), K, targets="rms_norm", noise_std=0.5)
    x, gate = torch.randn(2, K * B, 5, 4, dtype=torch.float64)
    plains = plain_members(model, plain)
    calls = (
        lambda net, x, gate: net(x, gate, power=2.0),
        lambda net, x, gate: net(x, gate=gate),
        lambda net, x, _: net(x),
    )
    for call in calls:
        members = [call(*parts) for parts in zip(plains, x.chunk(K), gate.chunk(K))]
        torch.testing.assert_close(call(model.train(), x, gate), torch.cat(members))
        average = torch.stack([call(member, x, gate) for member in plains]).mean(0)
        torch.testing.assert_close(call(model.eval(), x, gate), average)


@pytest.mark.parametrize("mode", ["exact", "weights"])
@pytest.mark.parametrize("case", CASES)
def test_the_average_is_the_collapsed_norm(case, mode):
    make, sample, target, cls = CASES[case]
    plain = randomize(nn.Sequential(make()))
    model = lp.expand(copy.deepcopy(plain), K, targets=target, noise_std=0.5).eval()
    x = torch.randn(4, *sample)
    outputs = torch.stack([member(x) for member in plain_members(model, plain)])
    means = {name: value.double().mean(0) for name, value in model.state_dict().items()}
    answer = model(x)
    lp.collapse(model, mode=mode)
    assert torch.equal(model(x), answer)
    assert list(model.state_dict()) == list(plain.state_dict()) and type(model[0]) is type(plain[0])
    for name, value in model.state_dict().items():
        assert torch.equal(value, means[name].float())
    if cls != OWN:  # whatever stands behind the norm does not average
        torch.testing.assert_close(answer, outputs.mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_identical_members_collapse_bit_for_bit(case, dtype):
    make, _, target, _ = CASES[case]
    plain = randomize(nn.Sequential(make())).to(dtype)
    with torch.no_grad():
        plain[0].weight.view(-1)[:2] = torch.tensor([-0.0, float("inf")])
    original = {name: value.clone() for name, value in plain.state_dict().items()}
    attributes = {key: value for key, value in vars(plain[0]).items() if not key.startswith("_")}
    plain[0].weight.requires_grad_(False)
    calls = []
    handle = plain[0].register_forward_hook(lambda *_: calls.append(1))
    lp.expand(plain, K, targets=target)
    assert not plain[0].weight.requires_grad and plain[0].weight.dtype == dtype
    lp.collapse(plain)
    assert {key: value for key, value in vars(plain[0]).items() if not key.startswith("_")} == attributes
    for name, value in plain.state_dict().items():
        assert torch.equal(value, original[name]) and torch.equal(value.signbit(), original[name].signbit())
    plain.float()(torch.randn(2, *CASES[case][1]))
    handle.remove()
    assert calls == [1] and not plain[0].weight.requires_grad


@pytest.mark.parametrize("parameter_dtype", ["same", torch.float32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", ["layer", "group", "rms"])
def test_low_precision_rounds_no_more_than_the_plain_norm(case, dtype, parameter_dtype):
    """A rounded x̂ would triple the error of dx, and be 10⁴ times that of float32 weights' gradients."""
    make, sample, target, _ = CASES[case]
    plain = randomize(nn.Sequential(make())).to(dtype if parameter_dtype == "same" else parameter_dtype)
    model = lp.expand(copy.deepcopy(plain), K, targets=target, noise_std=0.5)
    x = torch.randn(K * B, *sample).to(dtype).requires_grad_()
    dy = torch.randn_like(x)
    plains = plain_members(model, plain)
    expected = torch.cat([member(rows) for member, rows in zip(plains, x.chunk(K))])
    expected.backward(dy)
    dx, x.grad = x.grad, None
    y = model(x)
    y.backward(dy)
    assert torch.equal(y, expected) and torch.equal(x.grad, dx)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, torch.stack([dict(p.named_parameters())[name].grad for p in plains]))


@pytest.mark.parametrize("case", ["layer", "group", "rms"])
def test_float32_error_is_at_most_twice_the_plain_norms(case, monkeypatch):
    monkeypatch.setattr(norms, "_gains_pay", lambda input: True)
    make, _, target, _ = CASES[case]
    sample = (4, 9, 9) if case == "group" else (81, 4)
    plain = randomize(nn.Sequential(make()))
    model = lp.expand(copy.deepcopy(plain), K, targets=target, noise_std=0.5)
    x = 3 + torch.randn(K * 16, *sample)
    dy = torch.randn_like(x)

    def results(dtype, stacked):
        network = copy.deepcopy(model).to(dtype)
        data = x.to(dtype).requires_grad_()
        if stacked:
            y = network(data)
        else:  # PyTorch's own norm, member by member
            norm, weights = network[0], [p.unbind(0) for p in network.parameters()]
            bias = weights[1] if len(weights) > 1 else [None] * K
            y = torch.cat([norm._norm(rows, w, b) for rows, w, b in zip(data.chunk(K), weights[0], bias)])
        return [y, *torch.autograd.grad(y, [data, *network.parameters()], dy.to(dtype))]

    for truth, own, ours in zip(
        results(torch.float64, False), results(torch.float32, False), results(torch.float32, True)
    ):
        rounding = torch.finfo(torch.float32).eps * truth.abs().max()
        assert (ours - truth).abs().max() <= 2 * (own - truth).abs().max() + rounding


MIXTURES = ((torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16))


@pytest.mark.parametrize(
    "case, dtype, weights",
    [
        *((case, *of) for case in ("layer", "group", "rms", "torchvision 2d", "timm fast layer") for of in MIXTURES),
        ("rms", torch.float32, torch.bfloat16),  # the others refuse this mixture on the CPU
    ],
)
def test_autocast_is_what_the_plain_norm_makes_of_it(case, dtype, weights):
    make, sample, target, _ = CASES[case]
    plain = randomize(nn.Sequential(make())).to(weights)
    model = lp.expand(copy.deepcopy(plain), K, targets=target, noise_std=0.5)
    x = torch.randn(K * B, *sample).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        expected = torch.cat([member(rows) for member, rows in zip(plain_members(model, plain), x.chunk(K))])
        y = model(x)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)


def test_constructors_and_state_dicts():
    x = torch.randn(K * B, 4, 4)
    for ensemble, plain in (
        (EnsembleLayerNorm(4, K, eps=1e-3), nn.LayerNorm(4, eps=1e-3)),
        (EnsembleLayerNorm((4, 4), K, bias=False), nn.LayerNorm((4, 4), bias=False)),
        (EnsembleLayerNorm(4, K, elementwise_affine=False), nn.LayerNorm(4, elementwise_affine=False)),
        (EnsembleGroupNorm(2, 4, K, dtype=torch.float64), nn.GroupNorm(2, 4, dtype=torch.float64)),
        (EnsembleGroupNorm(2, 4, K, affine=False), nn.GroupNorm(2, 4, affine=False)),
        (EnsembleRMSNorm(4, K), nn.RMSNorm(4)),
        (EnsembleRMSNorm(4, K, elementwise_affine=False), nn.RMSNorm(4, elementwise_affine=False)),
    ):
        dtype = next((p.dtype for p in plain.parameters()), torch.float32)
        torch.testing.assert_close(ensemble(x.to(dtype)), plain(x.to(dtype)))  # weights begin at 1, biases at 0
        assert ensemble.state_dict().keys() == plain.state_dict().keys()
        randomize(plain)
        ensemble.load_state_dict(plain.state_dict())  # a plain checkpoint is broadcast
        torch.testing.assert_close(ensemble(x.to(dtype)), plain(x.to(dtype)))
        assert all(p.num_members == K for p in copy.deepcopy(ensemble).double().parameters())
        assert repr(ensemble).endswith(f"num_members={K})")
        assert repr(ensemble.collapse()) == repr(plain)


# ---------------------------------------------------------------------------------------------- models


class Block(nn.Module):
    """A GPT's: pre-norm attention and MLP."""

    def __init__(self, width, norm):
        super().__init__()
        self.norm1, self.norm2 = norm(width), norm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.out(attended)
        return x + self.mlp(self.norm2(x))


class SmallGPT(nn.Module):
    """Two blocks; the head is tied to the embedding."""

    def __init__(self, norm=nn.LayerNorm):
        super().__init__()
        words, width = 7, 8
        self.words, self.places = nn.Embedding(words, width), nn.Parameter(torch.randn(5, width))
        self.blocks = nn.Sequential(*(Block(width, norm) for _ in range(2)))
        self.norm = norm(width)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens):
        return self.head(self.norm(self.blocks(self.words(tokens) + self.places)))


def torchvision_model(name):
    models = pytest.importorskip("torchvision").models
    if name == "convnext":
        settings = [models.convnext.CNBlockConfig(8, 16, 1), models.convnext.CNBlockConfig(16, None, 1)]
        return models.ConvNeXt(settings, num_classes=5)
    if name == "swin":
        return models.SwinTransformer([2, 2], 8, [2, 1], [2, 2], [4, 4], stochastic_depth_prob=0.0, num_classes=5)
    return models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=5
    )


def timm_model(name, **options):
    return pytest.importorskip("timm").create_model(name, num_classes=5, **options)


MODELS = {  # the model, its targets, the number of norms
    "timm convnext": (
        lambda: timm_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 16)), "layer_norm", 9,
    ),
    "timm vit": (
        lambda: timm_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=2), ("layer_norm", "head"), 5,
    ),
    "torchvision convnext": (lambda: torchvision_model("convnext"), "layer_norm", 5),
    "torchvision swin": (lambda: torchvision_model("swin"), "layer_norm", 9),
    "torchvision vit": (lambda: torchvision_model("vit"), "layer_norm", 5),
    "timm resnet": (
        lambda: timm_model("resnet18", norm_layer="groupnorm", layers=(1, 1, 1, 1), channels=(32, 32, 64, 64)),
        ("group_norm", "head"), 13,
    ),
    "gpt": (SmallGPT, "layer_norm", 5),
    "gpt with rms norm": (lambda: SmallGPT(nn.RMSNorm), "rms_norm", 5),
}  # fmt: skip


@pytest.mark.parametrize("case", MODELS)
def test_models(case):
    make, targets, norms = MODELS[case]
    torch.manual_seed(0)
    plain = make().double()
    with torch.no_grad():
        for parameter in plain.parameters():  # some begin at 0, and would hide what stands before them
            parameter.add_(0.05 * torch.randn_like(parameter))
    x = torch.randn(K * B, 3, 32, 32, dtype=torch.float64)
    if case.startswith("gpt"):
        x = torch.randint(7, (K * B, 5))
    model = lp.expand(copy.deepcopy(plain), K, targets=targets, noise_std=0.2)
    assert sum("Norm" in type(m).__name__ and hasattr(m, "num_members") for m in model.modules()) == norms
    plains = plain_members(model, plain)
    expected = torch.cat([member(rows) for member, rows in zip(plains, x.chunk(K))])
    y = model(x)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    expected.square().sum().backward()
    y.square().sum().backward()
    assert_gradients_equal(model, plains, 1e-9)

    original = copy.deepcopy(plain.state_dict())
    answer = plain.eval()(x[:B])
    model = lp.expand(plain, K, targets=targets)
    assert torch.equal(model(x[:B]), answer)
    collapsed = lp.collapse(model).state_dict()
    assert list(collapsed) == list(original) and torch.equal(model(x[:B]), answer)
    assert all(torch.equal(value, original[name]) for name, value in collapsed.items())


@pytest.mark.parametrize("rule", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("norm, target", [(nn.LayerNorm, "layer_norm"), (nn.RMSNorm, "rms_norm")])
def test_stacked_training_of_a_gpt_equals_the_loop(rule, norm, target):
    torch.manual_seed(0)
    plain = SmallGPT(norm).double()
    model = lp.expand(copy.deepcopy(plain), K, targets=target)
    trainer = lp.SequentialTrainer(plain, K, targets=target, optimizer=lambda p: rule(p, lr=0.02, weight_decay=0.1))
    optimizer = rule(model.parameters(), lr=0.02, weight_decay=0.1)

    def loss_fn(output, tokens):
        return F.cross_entropy(output[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    for _ in range(20):
        tokens = torch.randint(7, (K * B, 5))
        losses = trainer.step(loss_fn, [(rows, rows) for rows in tokens.chunk(K)])
        optimizer.zero_grad()
        loss = lp.member_loss(loss_fn, model(tokens), tokens, num_members=K)
        loss.backward()
        optimizer.step()
        assert loss.item() == pytest.approx(sum(losses), abs=1e-9)
    for name, value in trainer.expanded().state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_layers_call_their_norms_in_eval_mode(norm_first):
    """The fast path of nn.TransformerEncoderLayer would read norm1.weight, [K, …]."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, nn.LayerNorm(8), enable_nested_tensor=not norm_first)
    randomize(model, 1)
    x = torch.randn(B, 5, 8)
    padding = torch.zeros(B, 5, dtype=torch.bool)
    padding[1, 3:] = True  # makes a nested tensor of the batch, where norm_first allows it
    with torch.no_grad():
        expected = [model.eval()(x), model(x, src_key_padding_mask=padding)]
        lp.expand(model, K, targets="layer_norm")
        for copied in (model, copy.deepcopy(model)):
            torch.testing.assert_close([copied(x), copied(x, src_key_padding_mask=padding)], expected)
        torch.testing.assert_close(lp.predict(model, x, members="all"), torch.stack([expected[0]] * K))
        if not norm_first:
            with lp.members(model, "stacked"), pytest.raises(NotImplementedError, match="or set use_nested_tensor = "):
                model(x.repeat(K, 1, 1), src_key_padding_mask=padding.repeat(K, 1))
            model.use_nested_tensor = False
            valid = lp.predict(model, x, src_key_padding_mask=padding, members="all")[:, ~padding]
            torch.testing.assert_close(valid, torch.stack([expected[1][~padding]] * K))
        lp.collapse(model)
        assert torch.equal(model(x), expected[0]) and not model.layers[0]._forward_pre_hooks


def test_compiles_without_a_graph_break():
    torch.manual_seed(0)
    layers = [nn.GroupNorm(2, 4), nn.Flatten(2), nn.LayerNorm(6), nn.RMSNorm(6)]
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13):  # dynamo before it breaks the graph at these
        layers.append(ScaledLayerNorm(6))
    model = randomize(nn.Sequential(*layers))
    lp.expand(model, K, targets=("group_norm", "layer_norm", "rms_norm"), noise_std=0.5)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for rows, training in ((K * B, True), (B, False)):
        x = torch.randn(rows, *IMAGE)
        expected = model.train(training)(x)
        torch.testing.assert_close(compiled(x), expected)


# ---------------------------------------------------------------------------------------------- refused


class Attention(nn.Module):
    """Attention of the user's own, with the sequence in dim 0."""

    def __init__(self):
        super().__init__()
        self.norm, self.attention, self.head = nn.LayerNorm(4), nn.MultiheadAttention(4, 2), nn.Linear(4, 3)

    def forward(self, x):
        x = self.norm(x)
        return self.head(self.attention(x, x, x)[0][0])


class WithBuffer(nn.LayerNorm):
    def __init__(self):
        super().__init__(4)
        self.register_buffer("seen", torch.zeros(1))


def parametrized():
    norm = nn.LayerNorm(4)
    nn.utils.parametrize.register_parametrization(norm, "weight", nn.Identity())
    return norm


def patched():
    norm = nn.LayerNorm(4)
    norm.forward = lambda x: x
    return norm


REFUSED = {
    "encoder": (lambda: nn.TransformerEncoderLayer(4, 2), "layer_norm", "norm1 is in 0 .*batch_first=True"),
    "decoder": (
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2), 1, nn.LayerNorm(4)),
        lambda name, module: name == "0.norm",
        r"0.norm is in 0 \(TransformerDecoder\)",
    ),
    "attention": (Attention, "layer_norm", r"0.norm is in 0 \(Attention\)"),
    "parametrized": (parametrized, "layer_norm", "0: .*other tensors than weight and bias"),
    "buffer": (WithBuffer, "layer_norm", "0: .*WithBuffer has other tensors"),
    "patched": (patched, "layer_norm", "0: .*called by other than its class's forward"),
    "no norm": (
        lambda: nn.LocalResponseNorm(2),
        lambda name, module: name == "0",
        "0: .*LocalResponseNorm has no parameters",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case):
    make, target, message = REFUSED[case]
    model = nn.Sequential(make())
    modules = list(model.modules())
    with pytest.raises(NotImplementedError, match=message):
        lp.expand(model, K, targets=target)
    assert modules == list(model.modules())


def test_a_head_behind_attention_is_no_matter_of_its_layout():
    with pytest.warns(UserWarning, match="0.attention has batch_first=False"):  # its head takes a token: of a row each
        model = lp.expand(nn.Sequential(Attention()), K, targets="head")
    assert model(torch.randn(5, K * B, 4)).shape == (K * B, 3)


def test_wrong_arguments():
    with pytest.raises(TypeError, match="EnsembleLayerNorm.from_module: module must be a LayerNorm, got GroupNorm"):
        EnsembleLayerNorm.from_module(nn.GroupNorm(2, 4), K)
    with pytest.raises(TypeError, match="EnsembleRMSNorm.from_module: module must be a RMSNorm"):
        EnsembleRMSNorm.from_module(nn.LayerNorm(4), K)
    with pytest.raises(ValueError, match="num_members must be at least 1"):
        EnsembleGroupNorm(2, 4, 0)
    with pytest.raises(ValueError, match="noise_std must be finite"):
        EnsembleGroupNorm.from_module(nn.GroupNorm(2, 4), K, noise_std=-1.0)
    with pytest.raises(ValueError, match=r"EnsembleLayerNorm: input.size\(0\)=4 is not divisible by num_members=3"):
        EnsembleLayerNorm(4, K)(torch.randn(4, 4))
    with pytest.raises(ValueError, match="collapse: mode must be"):
        EnsembleRMSNorm(4, K).collapse("best")
    with pytest.warns(UserWarning, match="targets match no module"):  # nothing to replicate
        lp.expand(nn.Sequential(nn.LayerNorm(4, elementwise_affine=False)), K, targets="layer_norm")
