"""Rank-1 gains as late-phase weights; shapes: K members, B samples each."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from latephase_kernels import late_phase as lp
from latephase_kernels.late_phase.targets import RANK1_TYPES
from latephase_kernels.nn import MemberLinear, Rank1Conv2d, Rank1Linear, SharedBatchNorm2d

K, B = 3, 2
CONVOLUTIONS = {
    "plain": {"padding": 1},
    "groups": {"groups": 2, "bias": False},
    "depthwise": {"groups": 4, "stride": 2},
    "dilated": {"dilation": (1, 2), "padding": "same"},
    "reflect": {"padding": (1, 2), "padding_mode": "reflect", "stride": (2, 1)},
    "one by one": {"kernel_size": 1},
}
LAYERS = {  # the plain layer, the shape of a sample
    "linear": (lambda: nn.Linear(4, 6), (4,)),
    "linear without bias, tokens": (lambda: nn.Linear(4, 6, bias=False), (3, 5, 4)),
    **{
        name: ((lambda options=options: nn.Conv2d(4, 8, **{"kernel_size": 3, **options})), (4, 7, 6))
        for name, options in CONVOLUTIONS.items()
    },
    "1d": (lambda: nn.Conv1d(4, 8, 3, padding="same", dilation=2, groups=2), (4, 9)),
    "3d": (lambda: nn.Conv3d(4, 6, (1, 2, 3), stride=(1, 2, 1)), (4, 2, 4, 5)),
}


def member_weight(weight, input_gain, output_gain):
    """W ∘ (r sᵀ), each filter of a group beside its own group's inputs."""
    groups = input_gain.numel() // weight.size(1)
    rows = []
    for out, filters in enumerate(weight):
        group = out // (weight.size(0) // groups)
        own = input_gain[group * weight.size(1) : (group + 1) * weight.size(1)]
        rows.append(filters * output_gain[out] * own.reshape(-1, *[1] * (weight.dim() - 2)))
    return torch.stack(rows)


def member_answers(plain, layer, rows):
    """What the plain layer answers to each member's rows with that member's weight, and its bias if it has its own."""
    biases = layer.bias if layer.member_bias else [layer.bias] * K
    return [
        functional_call(plain, {"weight": member_weight(layer.weight, s, r), "bias": b}, (x,))
        for s, r, b, x in zip(layer.input_gain, layer.output_gain, biases, rows)
    ]


# ---------------------------------------------------------------------------------------------- each layer


@pytest.mark.parametrize("channels_last, member_bias", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("case", LAYERS)
def test_every_member_is_the_layer_with_its_own_weight(case, channels_last, member_bias):
    make, sample = LAYERS[case]
    torch.manual_seed(0)
    plain = make().double()
    kind = RANK1_TYPES[type(plain)]
    layer = kind.from_module(plain, K, 0.5, member_bias=member_bias)
    own = member_bias and plain.bias is not None
    assert layer.weight is plain.weight and (layer.bias is plain.bias) != own and type(layer) is kind
    assert not own or len(layer.bias.unique()) == K * len(plain.bias)
    x = torch.randn(K * B, *sample, dtype=torch.float64, requires_grad=True)
    rows = x.contiguous(memory_format=torch.channels_last) if channels_last and len(sample) == 3 else x
    expected = torch.cat(member_answers(plain, layer, rows.chunk(K)))
    y = layer(rows)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    dy = torch.randn_like(y)
    inputs = [t for t in (x, *layer.parameters()) if own or t is not layer.bias]
    truth = torch.autograd.grad(expected, inputs, dy)
    found = torch.autograd.grad(y, inputs, dy, retain_graph=True)
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)
    if layer.bias is not None and not own:
        dims = list(range(y.dim() - 1)) if kind is Rank1Linear else [0, *range(2, y.dim())]
        torch.testing.assert_close(torch.autograd.grad(y, layer.bias, dy)[0], dy.sum(dims))


@pytest.mark.parametrize("targets", ["rank1", "rank1_bias"])
@pytest.mark.parametrize("case", LAYERS)
def test_the_average_is_the_collapsed_layer(case, targets):
    make, sample = LAYERS[case]
    torch.manual_seed(0)
    plain = make().double()
    model = lp.expand(nn.Sequential(copy.deepcopy(plain)), K, targets=targets, noise_std=0.5).eval()
    layer = model[0]
    x = torch.randn(4, *sample, dtype=torch.float64)
    answers = member_answers(plain, layer, [x] * K)
    mean = torch.stack(answers).mean(0)
    torch.testing.assert_close(lp.predict(model, x, members="all"), torch.stack(answers), rtol=1e-12, atol=1e-12)
    alone = lp.collapse(copy.deepcopy(model), member=1)
    torch.testing.assert_close(alone(x), answers[1], rtol=1e-12, atol=1e-12)
    paper = member_weight(layer.weight, layer.input_gain.mean(0), layer.output_gain.mean(0))
    answer = model(x)
    torch.testing.assert_close(answer, mean, rtol=1e-12, atol=1e-12)
    for mode in ("exact", "weights"):
        collapsed = lp.collapse(copy.deepcopy(model), mode=mode)
        assert collapsed.state_dict().keys() == nn.Sequential(plain).state_dict().keys()
        assert type(collapsed[0]) is type(plain) and repr(collapsed[0]) == repr(plain)
        if mode == "exact":
            assert torch.equal(collapsed(x), answer)
        else:
            torch.testing.assert_close(collapsed[0].weight, paper, rtol=1e-12, atol=1e-12)
            if layer.member_bias:
                torch.testing.assert_close(collapsed[0].bias, layer.bias.mean(0), rtol=1e-12, atol=1e-12)
            assert not torch.allclose(collapsed(x), answer)


@pytest.mark.parametrize("targets, mode", [("rank1", "exact"), ("rank1", "weights"), ("rank1_bias", "exact")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("case", LAYERS)
def test_gains_of_one_collapse_bit_for_bit(case, dtype, targets, mode):
    plain = nn.Sequential(LAYERS[case][0]()).to(dtype)
    with torch.no_grad():
        plain[0].weight.view(-1)[:2] = torch.tensor([-0.0, float("inf")])
    plain[0].weight.requires_grad_(False)
    calls = []
    handle = plain[0].register_forward_hook(lambda *_: calls.append(1))
    original = copy.deepcopy(plain.state_dict())
    lp.expand(plain, 49, targets=targets)  # 49 · (1 / 49) is not 1
    assert plain[0].input_gain.requires_grad and plain[0].input_gain.dtype == dtype
    lp.collapse(plain, mode=mode)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, original[name]) and torch.equal(value.signbit(), original[name].signbit())
    plain.float()(torch.randn(2, *LAYERS[case][1]))
    handle.remove()
    assert calls == [1] and not plain[0].weight.requires_grad and list(plain.state_dict()) == list(original)


def test_noise_and_constructors():
    torch.manual_seed(0)
    gain = Rank1Linear.from_module(nn.Linear(4000, 4), 2, 0.1).input_gain
    assert gain.mean().item() == pytest.approx(1, abs=0.01) and gain.std().item() == pytest.approx(0.1, abs=0.01)
    linear, conv = Rank1Linear(4, 6, K, bias=False, dtype=torch.float64), Rank1Conv2d(4, 6, 3, K, groups=2)
    for layer, x in ((linear, torch.randn(K, 4).double()), (conv, torch.randn(K, 4, 5, 5))):
        torch.testing.assert_close(layer(x), layer.collapse()(x))  # gains begin at 1
        assert repr(layer).endswith(f"num_members={K})")
        marked = {name: hasattr(p, "num_members") for name, p in copy.deepcopy(layer).float().named_parameters()}
        assert marked.pop("input_gain") and marked.pop("output_gain") and not any(marked.values())


@pytest.mark.parametrize(
    "make", [lambda own: Rank1Linear(4, 6, K, member_bias=own), lambda own: Rank1Conv2d(4, 6, 1, K, member_bias=own)]
)
def test_own_biases_begin_alike_and_are_drawn_again_with_the_rest(make):
    torch.manual_seed(0)
    shared = make(False)
    torch.manual_seed(0)
    layer = make(True)
    assert torch.equal(layer.weight, shared.weight) and torch.equal(layer.bias, shared.bias.expand(K, -1))
    assert layer.bias.num_members == K and repr(layer).endswith(f"num_members={K}, member_bias=True)")
    assert repr(copy.deepcopy(layer).half()) == repr(layer) and not hasattr(layer.weight, "num_members")
    layer = layer.to("meta").to_empty(device="cpu")
    for parameter in layer.parameters():
        nn.init.constant_(parameter, float("nan"))
    torch.manual_seed(0)
    layer.reset_parameters()
    torch.manual_seed(0)
    expected = make(True).state_dict()
    for name, value in layer.state_dict().items():
        bound = expected[name].abs().max()
        assert (value.abs() <= 2 * bound).all() and (name == "weight" or torch.equal(value[1:], value[:-1]))
    assert torch.equal(layer.weight, expected["weight"]) and torch.equal(layer.input_gain, expected["input_gain"])


def test_state_dicts():
    plain = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(3, 4, 1))
    model = lp.expand(copy.deepcopy(plain), K, targets="rank1", noise_std=0.5)
    assert sorted(model.state_dict()) == sorted(
        [*plain.state_dict(), *(f"{i}.{side}put_gain" for i in (0, 1) for side in ("in", "out"))]
    )
    other = lp.expand(copy.deepcopy(plain), K, targets="rank1")
    other.load_state_dict(model.state_dict())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in other.state_dict().items())
    with torch.no_grad():
        plain[0].weight.add_(1)
    other.load_state_dict(plain.state_dict())  # a plain checkpoint: the gains are 1 again
    collapsed = lp.collapse(other).state_dict()
    assert all(torch.equal(value, collapsed[name]) for name, value in plain.state_dict().items())
    assert set(model.load_state_dict({}, strict=False).missing_keys) == set(model.state_dict())  # of no layer at all
    own = lp.expand(copy.deepcopy(plain), K, targets="rank1_bias", noise_std=0.5)
    assert [list(own[i].bias.shape) for i in (0, 1)] == [[K, 4]] * 2
    with pytest.raises(RuntimeError, match='0.bias is each member.s own in the checkpoint .*target "rank1_bias"'):
        model.load_state_dict(own.state_dict())
    for checkpoint in (plain.state_dict(), model.state_dict()):
        own.load_state_dict(checkpoint)
        assert torch.equal(own[0].bias, checkpoint["0.bias"].expand(K, 4)) and own[0].bias.num_members == K
    collapsed = lp.collapse(own).state_dict()
    assert torch.equal(collapsed["0.bias"], plain[0].bias) and collapsed.keys() == plain.state_dict().keys()


# ---------------------------------------------------------------------------------------------- the target


class Reads(nn.Module):
    """Takes the weight of one layer without calling it, as swin's attention does, and only the type of another's."""

    def __init__(self):
        super().__init__()
        self.read, self.called = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.called(F.linear(x.to(self.called.weight.dtype), self.read.weight, self.read.bias))


class ReadsElsewhere(Reads):
    """Its forward leaves the reading to a method."""

    def forward(self, x):
        return self.project(x)

    def project(self, x):
        return super().forward(x) + F.linear(x, self.read.weight)

    def reset(self):
        nn.init.zeros_(self.called.weight)


class TiedAutoencoder(nn.Module):
    """Its decoder takes the encoder's weight, which collapse would multiply by the gains of the encoder."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 3), nn.ModuleDict({"last": nn.Linear(3, 3)}), nn.Linear(3, 3))

    def forward(self, x):
        x = self.encoder[2](self.encoder[1]["last"](self.encoder[0](x)))
        return F.linear(F.linear(x, self.encoder[1]["last"].weight.T), self.encoder[-3].weight.T)


class MyLinear(nn.Linear):
    pass


def test_what_rank1_targets():
    model = nn.Sequential(
        nn.MultiheadAttention(4, 2, batch_first=True),
        Reads(),
        MyLinear(4, 4),
        nn.Conv2d(4, 4, 1),
        nn.BatchNorm2d(4),
        nn.ConvTranspose1d(4, 4, 1),
        nn.Linear(4, 2),
    )
    lp.expand(model, K, targets=("head", "rank1"))
    kinds = {name: type(m) for name, m in model.named_modules() if hasattr(m, "num_members")}
    assert kinds == {"1.called": Rank1Linear, "3": Rank1Conv2d, "4": SharedBatchNorm2d, "6": MemberLinear}
    tied = lp.expand(TiedAutoencoder(), K, targets="rank1")
    assert [name for name, m in tied.named_modules() if hasattr(m, "num_members")] == ["encoder.2"]
    with pytest.raises(ValueError, match="0.weight is tied to 1.weight, but collapse"):
        tied = nn.Sequential(nn.Linear(4, 4), nn.Embedding(4, 4))
        tied[1].weight = tied[0].weight
        lp.expand(tied, K, targets="rank1")
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(), MyLinear(4, 4))
    lp.expand(model, K, targets=lambda name, module: {"0": True, "3": "rank1"}.get(name))
    assert [type(m) for m in model] == [MemberLinear, nn.Linear, nn.ReLU, Rank1Linear]
    assert type(lp.collapse(model)[3]) is MyLinear
    with pytest.raises(ValueError, match='must return a bool, "rank1" or "rank1_bias", got .gains.'):
        lp.expand(model, K, targets=lambda name, module: "gains" if name == "0" else False)
    with pytest.raises(
        NotImplementedError,
        match="2 is a .*ReLU, which cannot be expanded, only Linear, Conv1d, Conv2d, Conv3d, LSTM can",
    ):
        lp.expand(model, K, targets=lambda name, module: "rank1" if name == "2" else False)
    with pytest.raises(NotImplementedError, match="0.read cannot have rank-1 gains"):
        lp.expand(nn.Sequential(Reads()), K, targets=lambda name, module: "rank1" if name == "0.read" else False)
    model = lp.expand(nn.Sequential(ReadsElsewhere()), K, targets="rank1")
    assert type(model[0].read) is nn.Linear and type(model[0].called) is Rank1Linear
    shared = nn.Linear(4, 4)  # one layer in two places has one pair of gains
    model = lp.expand(nn.Sequential(shared, nn.ReLU(), shared), K, targets="rank1")
    assert model[0] is model[2] and lp.collapse(model)[0] is model[2]
    layers = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.LSTM(4, 4, batch_first=True)
    model = nn.ModuleList([*layers, nn.Linear(4, 2)])
    lp.expand(model, K, targets=(lambda name, _: name == "0" and "rank1", "rank1_bias", "head", "rank1"))
    assert {name: p.dim() for name, p in model.named_parameters() if "bias" in name} == {
        "0.bias": 2, "1.bias": 2, "3.bias_ih_l0": 1, "3.bias_hh_l0": 1, "4.bias": 2,
    }  # fmt: skip
    assert type(model[4]) is MemberLinear and model[2].bias is None
    with pytest.raises(NotImplementedError, match=r"linear1 is in 0 .*batch_first=True"):
        lp.expand(nn.Sequential(nn.TransformerEncoderLayer(4, 2)), K, targets="rank1")


def test_attention_of_torchvision_is_left_alone():
    models = pytest.importorskip("torchvision").models
    torch.manual_seed(0)
    model = models.SwinTransformer([2, 2], 8, [2], [2], [4, 4], stochastic_depth_prob=0.0, num_classes=5)
    lp.expand(model, K, targets="rank1", noise_std=0.3)
    alone = [name for name, m in model.named_modules() if type(m) is nn.Linear]
    assert alone and all(name.endswith(("attn.qkv", "attn.proj")) for name in alone)
    model(torch.randn(K, 3, 16, 16)).sum().backward()
    gains = [p for name, p in model.named_parameters() if name.endswith("gain")]
    assert gains and all(gain.grad.abs().sum() > 0 for gain in gains)


def test_encoder_layers_call_their_linear_layers_in_eval_mode():
    """The fast path of nn.TransformerEncoderLayer would read linear1.weight and miss the gains."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2)
    lp.expand(model, K, targets="rank1", noise_std=0.5).eval()
    x = torch.randn(B, 5, 8)
    with torch.no_grad():
        answer = model(x)
        torch.testing.assert_close(lp.collapse(model)(x), answer)


def test_autocast_and_low_precision():
    x = torch.randn(K * B, 4, 5, 5)
    for weights in (torch.float32, torch.bfloat16):
        plain = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(36, 3)).to(weights)
        model = lp.expand(copy.deepcopy(plain), K, targets="rank1")
        with torch.autocast("cpu", torch.bfloat16):
            y, expected = model(x), plain(x)
        assert y.dtype == expected.dtype == torch.bfloat16
        torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)


# ---------------------------------------------------------------------------------------------- optimizers


def test_gains_join_live_optimizers():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [(n, p) for n, p in named.items() if p.dim() == 2], "weight_decay": 0.1},
            {"params": [(n, p) for n, p in named.items() if p.dim() == 1]},
        ],
        lr=0.01,
    )
    model(torch.randn(8, 4)).sum().backward()
    optimizer.step()
    state = dict(optimizer.state)
    options = {"lr": 0.5}
    lp.expand(
        model, K, targets=("rank1", "head", "batch_norm"), optimizers=optimizer, member_state="copy",
        member_options=options,
    )  # fmt: skip
    assert [group["param_names"] for group in optimizer.param_groups] == [
        ["0.weight", "2.weight"],
        ["0.bias", "2.bias"],
        ["4.weight", "0.input_gain", "0.output_gain", "2.input_gain", "2.output_gain"],
        ["3.weight", "3.bias", "4.bias"],
    ]
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (0.01, 0.1), (0.01, 0.01), (0.5, 0.1), (0.5, 0.01),
    ]  # fmt: skip
    now = dict(model.named_parameters())
    assert all(p is now[n] for g in optimizer.param_groups for n, p in zip(g["param_names"], g["params"]))
    for name in ("0.weight", "0.bias", "2.weight"):
        assert now[name] is named[name] and optimizer.state[named[name]] is state[named[name]]
    assert now["0.input_gain"] not in optimizer.state and now["4.weight"] in optimizer.state
    model(torch.randn(K * B, 4)).sum().backward()
    optimizer.step()
    groups = {g["name"]: g["params"] for g in lp.param_groups(model, lr=0.1, weight_decay=0.1, no_decay=True)}
    assert set(groups["base"]) == {now["0.weight"], now["2.weight"]}
    assert set(groups["member_no_decay"]) >= {now["0.input_gain"], now["2.output_gain"]}


def test_gains_join_copied_momenta_in_the_fused_step():
    results = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=fused)
        for step in range(4):
            if step == 2:
                lp.expand(model, K, targets=("rank1", "head"), optimizers=optimizer, member_state="copy")
            optimizer.zero_grad()
            model(torch.randn(K * B, 4)).square().sum().backward()
            optimizer.step()
        results.append(model.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, msg=name)


def test_own_biases_move_in_live_optimizers():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    optimizer = torch.optim.SGD(lp.param_groups(model, lr=0.1, weight_decay=0.1, no_decay=1), momentum=0.9)
    lp.expand(model, K, targets="rank1_bias", optimizers=optimizer)
    now = {parameter: name for name, parameter in model.named_parameters()}
    for groups in (optimizer.param_groups, lp.param_groups(model, lr=0.1, weight_decay=0.1, no_decay=1)):
        held = {g["name"]: sorted(now[p] for p in g["params"]) for g in groups if g["params"]}
        gains = [f"{i}.{side}put_gain" for i in (0, 2) for side in ("in", "out")]
        biases, decayed = ["0.bias", "2.bias"], groups is optimizer.param_groups  # gains join their weight's group
        assert held["base"] == ["0.weight", "2.weight"] and held["member_no_decay"] == sorted(
            biases + gains * (not decayed)
        )
        assert held.get("member", []) == gains * decayed and "base_no_decay" not in held


def test_gains_that_no_optimizer_takes_are_named():
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="no optimizer trains 0.input_gain"):
        lp.expand(model, K, targets="rank1", optimizers=optimizer)
    assert len(optimizer.param_groups[-1]["params"]) == 2
    model = nn.Sequential(nn.Linear(4, 5, bias=False))
    muon = torch.optim.Muon(model.parameters(), lr=0.1)  # would take a gain, [K, C], for a matrix
    with pytest.warns(UserWarning, match="no optimizer trains 0.input_gain"):
        lp.expand(model, K, targets="rank1", optimizers=muon)
    assert [group["params"] for group in muon.param_groups] == [[model[0].weight]]


# ---------------------------------------------------------------------------------------------- training


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(32, 6), nn.Tanh(), nn.Linear(6, 3))


def cnn():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 2, groups=2),
        nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


def rule_for(rule, parameters):
    if rule == "sgd":
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-3)
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.05)


@pytest.mark.parametrize(  # every pair of two choices
    "make, rule, scale, chunk, targets",
    [
        *((mlp, "sgd", "sum", K, "rank1"), (mlp, "adamw", "mean", 1, "rank1_bias"), (mlp, "adamw", "sum", K, "rank1")),
        *((cnn, "sgd", "mean", 1, "rank1"), (cnn, "adamw", "mean", K, "rank1"), (cnn, "sgd", "sum", 1, "rank1_bias")),
    ],
)
def test_stacked_training_equals_the_loop(make, rule, scale, chunk, targets):
    """The paper's loop: every member's turn is a plain model's whose weights are W ∘ (r_k s_kᵀ)."""
    torch.manual_seed(0)
    plain = make().double()
    model = lp.expand(copy.deepcopy(plain), K, targets=targets, noise_std=0.3)
    late = {name for name, parameter in model.named_parameters() if hasattr(parameter, "num_members")}
    gains = [
        {name: p[k].detach().clone().requires_grad_() for name, p in model.named_parameters() if name in late}
        for k in range(K)
    ]
    base = [parameter for name, parameter in plain.named_parameters() if name not in late]
    base_optimizer = rule_for(rule, base)
    optimizers = [rule_for(rule, own.values()) for own in gains]
    optimizer = rule_for(rule, model.parameters())
    lp.set_base_grad_scale(optimizer, model, scale)
    start = copy.deepcopy(model.state_dict())
    for _ in range(30):
        x, target = torch.randn(K * B, 2, 4, 4, dtype=torch.float64), torch.randint(3, (K * B,))
        base_optimizer.zero_grad()
        for own, member_optimizer, rows, labels in zip(gains, optimizers, x.chunk(K), target.chunk(K)):
            weights = {
                name: member_weight(p, own[name[:-6] + "input_gain"], own[name[:-6] + "output_gain"])
                for name, p in plain.named_parameters()
                if name[:-6] + "input_gain" in own and name.endswith("weight")
            }
            weights |= {name: value for name, value in own.items() if name.endswith("bias")}
            member_optimizer.zero_grad()
            F.cross_entropy(functional_call(plain, weights, (rows,)), labels).backward()
            member_optimizer.step()
        for parameter in base:
            parameter.grad *= 1 if scale == "sum" else 1 / K
        base_optimizer.step()

        optimizer.zero_grad()
        for first in range(0, K, chunk):
            rows = slice(first * B, (first + chunk) * B)
            with lp.members(model, range(first, first + chunk)):
                lp.member_loss(F.cross_entropy, model(x[rows]), target[rows], num_members=chunk).backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        expected = torch.stack([own[name] for own in gains]) if name in late else plain.state_dict()[name]
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
        assert not torch.equal(value, start[name])


def test_wrong_arguments():
    with pytest.raises(TypeError, match="Rank1Linear.from_module: module must be a Linear, got Conv2d"):
        Rank1Linear.from_module(nn.Conv2d(4, 4, 1), K)
    with pytest.raises(NotImplementedError, match="projection of an nn.MultiheadAttention"):
        Rank1Linear.from_module(nn.MultiheadAttention(4, 2).out_proj, K)
    with pytest.raises(NotImplementedError, match="0: .*other parameters than weight and bias"):
        lp.expand(nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4))), K, targets="rank1")
    with pytest.raises(ValueError, match="num_members must be at least 1"):
        Rank1Conv2d(4, 4, 1, 0)
    with pytest.raises(ValueError, match=r"Rank1Linear: input must be \[K·B, …, 4\], got shape \[6, 5\]"):
        Rank1Linear(4, 4, K)(torch.randn(6, 5))
    with pytest.raises(ValueError, match=r"Rank1Conv2d: input must be \[K·B, 4, H, W\], got shape \[4, 5, 5\]"):
        Rank1Conv2d(4, 4, 3, K)(torch.randn(4, 5, 5))
    with pytest.raises(ValueError, match=r"Rank1Linear: input.size\(0\)=4 is not divisible by num_members=3"):
        Rank1Linear(4, 4, K)(torch.randn(4, 4))
    with pytest.raises(RuntimeError, match="predict: model is not expanded: its Rank1Linear was put in by hand"):
        lp.predict(nn.Sequential(Rank1Linear(4, 4, K)), torch.randn(2, 4), members="all")
    with pytest.raises(ValueError, match="collapse: mode must be"):
        Rank1Linear(4, 4, K).collapse("best")


def test_compiles_without_a_graph_break():
    model = lp.expand(cnn(), K, targets="rank1_bias", noise_std=0.3)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for rows, training in ((K * B, True), (B, False)):
        x = torch.randn(rows, 2, 4, 4)
        model.train(training)
        before = copy.deepcopy(model)
        torch.testing.assert_close(compiled(x), before(x))
