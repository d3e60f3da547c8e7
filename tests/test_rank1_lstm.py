"""Rank-1 gains for LSTMs; shapes: K members, B rows each, T steps, C inputs, H units."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import latephase_kernels as lp
from latephase_kernels.models import CharLSTM
from latephase_kernels.nn import MemberLinear, Rank1Linear, Rank1LSTM
from latephase_kernels.reference.rank1_lstm import rank1_lstm as reference

K, B, T, C, H = 3, 2, 5, 4, 6


def make_arguments(bias="shared", members=K, batch=B, dtype=torch.float64, seed=0):
    """Arguments whose gains are of either sign; some are 0, where dividing by a gain would show."""
    torch.manual_seed(seed)
    rows = members * batch
    shapes = [(T, rows, C), (rows, H), (rows, H), (4 * H, C), (4 * H, H), (members, C), (members, 4 * H)]
    shapes += [(members, H), (members, 4 * H)]
    shapes += {"shared": [(4 * H,)], "own": [(members, 4 * H)], "none": []}[bias]
    arguments = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    for gain in arguments[5:9]:
        gain[0, :2] = 0
    return [t.to(dtype).requires_grad_() for t in arguments] + [None] * (bias == "none")


def plain_lstm(arguments):
    """nn.LSTM on each member's rows with that member's folded weights: every h, the last h and the last c."""
    x, h0, c0, weight_ih, weight_hh, s_ih, r_ih, s_hh, r_hh, bias = arguments
    lstm = nn.LSTM(x.size(2), h0.size(1), bias=bias is not None).to(x)
    members, outputs = len(s_ih), []
    for k in range(members):
        weights = {
            "weight_ih_l0": weight_ih * r_ih[k].unsqueeze(1) * s_ih[k],
            "weight_hh_l0": weight_hh * r_hh[k].unsqueeze(1) * s_hh[k],
        }
        if bias is not None:
            own = bias[k] if bias.dim() == 2 else bias
            weights |= {"bias_ih_l0": own, "bias_hh_l0": torch.zeros_like(own)}
        state = tuple(s.chunk(members)[k].unsqueeze(0) for s in (h0, c0))
        y, (h, c) = functional_call(lstm, weights, (x.chunk(members, 1)[k], state))
        outputs.append((y, h[0], c[0]))
    ys, hs, cs = zip(*outputs)
    return torch.cat(ys, 1), torch.cat(hs), torch.cat(cs)


# ---------------------------------------------------------------------------------------------- the op


@pytest.mark.parametrize("bias", ["shared", "own", "none"])
@pytest.mark.parametrize("members, batch", [(K, B), (1, 3), (4, 1)])
def test_every_member_is_an_lstm_with_its_own_weights(members, batch, bias):
    arguments = make_arguments(bias, members, batch)
    inputs = [t for t in arguments if t is not None]
    found, expected = lp.functional.rank1_lstm(*arguments), plain_lstm(arguments)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(reference(*arguments), (expected[0], expected[2]), rtol=1e-9, atol=1e-9)
    # The loss may take the sequence alone (an expanded gradient), the states alone, or all of them.
    for loss in (lambda y, h, c: y.sum(), lambda y, h, c: (h * c).sum(), lambda y, h, c: (y.cos() * h * c).sum()):
        gradients = torch.autograd.grad(loss(*found), inputs, retain_graph=True)
        truth = torch.autograd.grad(loss(*expected), inputs, retain_graph=True)
        torch.testing.assert_close(gradients, truth, rtol=1e-9, atol=1e-9)


def test_only_the_gradients_asked_for():
    """One argument at a time: the others' must not be needed for it."""
    arguments = make_arguments()
    expected = torch.autograd.grad(plain_lstm(arguments)[0].cos().sum(), arguments)
    for i, truth in enumerate(expected):
        alone = [t.detach().requires_grad_(i == j) for j, t in enumerate(arguments)]
        lp.functional.rank1_lstm(*alone)[0].cos().sum().backward()
        torch.testing.assert_close(alone[i].grad, truth, rtol=1e-9, atol=1e-9)
        assert all(t.grad is None for j, t in enumerate(alone) if j != i)


def test_gradients_numerically_and_again():
    arguments = make_arguments("own", 2, 1)
    arguments = [t.detach()[:3].requires_grad_() if t is arguments[0] else t for t in arguments]
    assert torch.autograd.gradcheck(lp.functional.rank1_lstm, arguments, fast_mode=True)
    output = lp.functional.rank1_lstm(*arguments)[0]
    several = torch.randn(2, *output.shape, dtype=output.dtype)
    at_once = torch.autograd.grad(output, arguments, several, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(output, arguments, gradient, retain_graph=True) for gradient in several]
    for found, expected in zip(at_once, zip(*each), strict=True):
        torch.testing.assert_close(found, torch.stack(expected))
        assert not found.requires_grad
    assert torch.autograd.gradgradcheck(lp.functional.rank1_lstm, arguments, fast_mode=True)

    def penalty(function, chained):
        """The squared gradient of two windows; the second one's h0 depends on the weights as well."""
        x, h, c, *rest = chained
        for _ in range(2):
            y, h, c = function([x, h, c, *rest])
        gradients = torch.autograd.grad(y.cos().sum(), rest, create_graph=True)
        return sum(gradient.square().sum() for gradient in gradients)

    found = torch.autograd.grad(penalty(lambda a: lp.functional.rank1_lstm(*a), arguments), arguments)
    truth = torch.autograd.grad(penalty(plain_lstm, arguments), arguments)
    torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-9)


def test_transforms_of_torch_func():
    arguments = make_arguments()

    def loss(weight, function):
        return function([*arguments[:4], weight, *arguments[5:]])[0].sin().sum()

    found = torch.func.grad(lambda w: loss(w, lambda a: lp.functional.rank1_lstm(*a)))(arguments[4])
    truth = torch.autograd.grad(loss(arguments[4], plain_lstm), arguments[4])[0]
    torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-9)
    many = torch.stack([arguments[0], arguments[0] + 1])
    mapped = torch.vmap(lambda x: lp.functional.rank1_lstm(x, *arguments[1:])[0])(many)
    torch.testing.assert_close(mapped[1], lp.functional.rank1_lstm(many[1], *arguments[1:])[0])


@pytest.mark.parametrize("gains", ["same", "float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_as_good_as_pytorch(dtype, gains):
    """At most twice the error of nn.LSTM of that type on the same numbers, and one rounding at each tensor's scale.

    The mean of four draws: the largest error of one, of so few values, is small by luck on one processor or another.
    """
    errors = [low_precision_errors(dtype, gains, seed) for seed in range(4)]
    for own, plain in torch.tensor(errors).mean(0).tolist():
        assert own <= 2 * plain + 1


def low_precision_errors(dtype, gains, seed):
    """Return the largest errors of rank1_lstm and nn.LSTM, of every output and gradient, in roundings at its scale."""
    arguments = make_arguments(dtype=dtype, seed=seed)
    exact = [t.detach().double().requires_grad_() for t in arguments]
    ours = [t.detach().float() if i >= 5 and gains == "float32" else t.detach() for i, t in enumerate(arguments)]
    ours = [t.requires_grad_() for t in ours]
    outputs = {"ours": lp.functional.rank1_lstm(*ours), "plain": plain_lstm(arguments), "exact": plain_lstm(exact)}
    assert all(t.dtype == dtype for t in outputs["ours"])
    inputs = {"ours": ours, "plain": arguments, "exact": exact}
    results = {name: [*outputs[name], *torch.autograd.grad(outputs[name][0].sum(), inputs[name])] for name in outputs}
    errors = []
    for found, plain, truth in zip(*results.values()):
        rounding = torch.finfo(dtype).eps * truth.abs().max()
        errors.append([((t - truth).abs().max() / rounding).item() for t in (found, plain)])
    return errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cells_gather_small_increments(dtype):
    """Gates wide open and tanh(g) = 1/4, exactly: 200 + 16 · 1/4, where bfloat16 (steps of 1) would stay at 200."""
    arguments = [torch.zeros_like(t, dtype=dtype) for t in make_arguments()]
    arguments[0] = torch.zeros(16, K * B, C, dtype=dtype)
    arguments[2] += 200
    arguments[9] = torch.tensor([50.0, 50.0, 0.25541281, 50.0]).repeat_interleave(H)  # atanh(1/4)
    c_n = lp.functional.rank1_lstm(*arguments)[2]
    torch.testing.assert_close(c_n, torch.full_like(c_n, 204))


def test_members_are_isolated():
    for bad in (float("nan"), 1e30):
        clean, dirty = make_arguments("own", dtype=torch.float32), make_arguments("own", dtype=torch.float32)
        with torch.no_grad():
            dirty[0].view(T, K, B, C)[:, 1] = bad
            dirty[7][1] = bad  # and a gain
        results = []
        for arguments in (clean, dirty):
            output = lp.functional.rank1_lstm(*arguments)
            gradients = torch.autograd.grad(output[0].sum(), arguments)
            own = [t for i, t in enumerate(gradients) if i not in (0, 3, 4)]
            rows = [output[0].transpose(0, 1), *output[1:], gradients[0].transpose(0, 1), *own]
            results.append([t.unflatten(0, (K, -1)) for t in rows])
        for one, other in zip(*results):
            assert torch.equal(one[[0, 2]], other[[0, 2]]) and one.isfinite().all()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeats_are_bit_equal(dtype, threads):
    torch.set_num_threads(threads)
    arguments = [torch.randn_like(t) for t in make_arguments("own", batch=64, dtype=dtype)]
    runs = []
    for _ in range(3):
        leaves = [t.clone().requires_grad_() for t in arguments]
        output = lp.functional.rank1_lstm(*leaves)
        runs.append([*output, *torch.autograd.grad(sum(t.sum() for t in output), leaves)])
    assert all(torch.equal(*pair) for again in runs[1:] for pair in zip(runs[0], again))


def test_no_units_and_no_rows():
    for sizes in ((T, K * B, C, 0), (T, 0, C, H)):
        steps, rows, inputs, units = sizes
        shapes = [(steps, rows, inputs), (rows, units), (rows, units), (4 * units, inputs), (4 * units, units)]
        shapes += [(K, inputs), (K, 4 * units), (K, units), (K, 4 * units), (4 * units,)]
        arguments = [torch.randn(shape, requires_grad=True) for shape in shapes]
        output, _, c_n = lp.functional.rank1_lstm(*arguments)
        assert output.shape == (steps, rows, units) and c_n.shape == (rows, units)
        output.sum().backward()
        assert all(torch.equal(t.grad, torch.zeros_like(t)) for t in arguments)


def test_strides_and_repeated_backward():
    arguments = make_arguments()
    rows_first = arguments[0].detach().transpose(0, 1).contiguous().transpose(0, 1)
    strided = [rows_first, *(t.detach().mT.contiguous().mT if t.dim() == 2 else t.detach() for t in arguments[1:])]
    strided = [t.requires_grad_() for t in strided]
    y, *_ = lp.functional.rank1_lstm(*strided)
    dy = torch.randn(K * B, H, T, dtype=torch.float64).permute(2, 0, 1)
    expected = torch.autograd.grad(plain_lstm(arguments)[0], arguments, dy)
    for _ in range(2):  # nothing saved may be overwritten
        found = torch.autograd.grad(y, strided, dy, retain_graph=True)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    empty = [t.detach()[:, :0] if i == 0 else t.detach()[:0] if i < 3 else t for i, t in enumerate(arguments)]
    y, h, c = lp.functional.rank1_lstm(*empty)
    assert y.shape == (T, 0, H) and h.shape == c.shape == (0, H)
    y.sum().backward()
    assert arguments[3].grad.eq(0).all()


@pytest.mark.parametrize("bias", ["shared", "own", "none"])
def test_opcheck(bias):
    ops, arguments = torch.ops.latephase_kernels, make_arguments(bias)
    torch.library.opcheck(ops.rank1_lstm.default, arguments)
    detached = [None if t is None else t.detach() for t in arguments]
    output, c_n, cells, gates = ops.rank1_lstm.default(*detached)
    needs = [t is not None for t in arguments]
    _, h0, c0, _, weight, _, _, *gains, _ = detached
    torch.library.opcheck(ops.rank1_lstm_steps.default, (gates.clone(), h0, c0, weight, *gains))
    for dy, dc_n in ((output, None), (None, c_n), (output, c_n)):
        torch.library.opcheck(ops.rank1_lstm_backward.default, (dy, dc_n, *detached, output, cells, gates, needs))
        torch.library.opcheck(ops.rank1_lstm_steps_backward.default, (gates, cells, dy, dc_n, c0, weight, *gains))


def test_compiled_module():
    layer = Rank1LSTM(C, H, K, num_layers=2, dtype=torch.float64)
    x = torch.randn(T, K * B, C, dtype=torch.float64)
    with torch._dynamo.config.patch(allow_rnn=True):  # without it, LSTMs are where a compiled graph breaks
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        found = torch.autograd.grad(compiled(x)[0].sum(), [*layer.parameters()])
    torch.testing.assert_close(found, torch.autograd.grad(layer(x)[0].sum(), [*layer.parameters()]))


# ---------------------------------------------------------------------------------------------- the module


def make_plain(**options):
    torch.manual_seed(1)
    return nn.LSTM(C, H, **options).double()


def make_rank1(noise_std=0.5, **options):
    return Rank1LSTM.from_module(make_plain(**options), K, noise_std)


def member_state_dict(state, k):
    """The plain state dict of member k."""
    plain = {name: value for name, value in state.items() if "gain" not in name}
    for name in [name for name in plain if name.replace("weight", "input_gain") in state and "weight" in name]:
        r, s = state[name.replace("weight", "output_gain")][k], state[name.replace("weight", "input_gain")][k]
        plain[name] = plain[name] * r.reshape(-1, 1) * s
    return plain


OPTIONS = {
    "one layer": {},
    "batch first": {"batch_first": True},
    "three layers": {"num_layers": 3, "batch_first": True},
    "no bias": {"num_layers": 2, "bias": False},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_module_is_an_lstm_for_every_member(case):
    plain, layer = make_plain(**OPTIONS[case]), make_rank1(**OPTIONS[case])
    batch_dim = 0 if plain.batch_first else 1
    x = torch.randn((K * B, T, C) if plain.batch_first else (T, K * B, C), dtype=torch.float64)
    states = torch.randn(2, plain.num_layers, K * B, H, dtype=torch.float64)
    parameters = [*layer.parameters()]
    for hx in (None, tuple(states)):
        parts = [
            functional_call(
                plain,
                member_state_dict(dict(layer.named_parameters()), k),
                (x.chunk(K, batch_dim)[k], None if hx is None else tuple(s.chunk(K, 1)[k] for s in hx)),
            )
            for k in range(K)
        ]
        expected = torch.cat([y for y, _ in parts], batch_dim)
        expected_state = [torch.cat(s, 1) for s in zip(*(state for _, state in parts))]
        y, state = layer(x, hx)
        torch.testing.assert_close([y, *state], [expected, *expected_state], rtol=1e-9, atol=1e-9)
        found = torch.autograd.grad(y.cos().sum() + state[1].sum(), parameters)
        truth = torch.autograd.grad(expected.cos().sum() + expected_state[1].sum(), parameters)
        torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-9)


def test_one_member_with_gains_of_one_is_nn_lstm():
    plain = make_plain(num_layers=2)
    layer = Rank1LSTM.from_module(plain, 1)
    assert layer.weight_hh_l1 is plain.weight_hh_l1 and isinstance(layer, nn.LSTM)
    x = torch.randn(T, B, C, dtype=torch.float64)
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-12, atol=1e-12)


def test_two_windows_are_one_sequence():
    layer = make_rank1(num_layers=2, batch_first=True)
    x = torch.randn(K * B, 2 * T, C, dtype=torch.float64)
    whole, (h, c) = layer(x)
    first, state = layer(x[:, :T])
    second, (h_2, c_2) = layer(x[:, T:], state)
    torch.testing.assert_close((torch.cat([first, second], 1), h_2, c_2), (whole, h, c), rtol=1e-12, atol=1e-12)
    weights = [*layer.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(second.sum(), weights), torch.autograd.grad(whole[:, T:].sum(), weights)
    )


def test_dropout_between_layers():
    layer = make_rank1(num_layers=2, dropout=0.5)
    x = torch.randn(T, K * B, C, dtype=torch.float64)
    first, second = make_rank1(), Rank1LSTM(H, H, K, dtype=torch.float64)
    first.load_state_dict({name: p for name, p in layer.state_dict().items() if name.endswith("l0")})
    second.load_state_dict({name[:-1] + "0": p for name, p in layer.state_dict().items() if name.endswith("l1")})
    torch.manual_seed(5)
    found = layer(x)[0]
    torch.manual_seed(5)
    torch.testing.assert_close(found, second(F.dropout(first(x)[0], 0.5))[0])
    torch.testing.assert_close(layer.eval()(x)[0], second(first(x)[0])[0])


def test_copies_types_and_constructor():
    torch.manual_seed(0)
    layer = Rank1LSTM(C, H, K, num_layers=2, batch_first=True)
    x = torch.randn(K * B, T, C)
    torch.testing.assert_close(layer(x), layer.collapse()(x))  # gains begin at 1
    assert repr(layer) == f"Rank1LSTM(4, 6, num_layers=2, batch_first=True, num_members={K})"
    twin = copy.deepcopy(make_rank1(num_layers=2)).float()
    marked = {name for name, p in twin.named_parameters() if getattr(p, "num_members", None) == K}
    assert marked == {name for name in twin.state_dict() if "gain" in name} and len(marked) == 8
    before = [twin.input_gain_hh_l1.clone(), twin.weight_hh_l1.clone()]
    twin.reset_parameters()
    assert twin.input_gain_hh_l1.eq(1).all() and not torch.equal(twin.weight_hh_l1, before[1])
    gain = Rank1LSTM.from_module(nn.LSTM(1, 3000), 2, 0.1).output_gain_ih_l0
    assert gain.mean().item() == pytest.approx(1, abs=0.01) and gain.std().item() == pytest.approx(0.1, abs=0.01)


def test_autocast():
    """Gains stay in their own type: in bfloat16 a gain of 1.003 would be 1."""
    model = Rank1LSTM.from_module(make_plain(num_layers=2).float(), K, 0.1)
    x = torch.randn(T, K * B, C)
    with torch.autocast("cpu", torch.bfloat16):
        y, (h, c) = model(x)
        again, _ = model(x, (h, c))  # the state of the window before is bfloat16
    assert y.dtype == h.dtype == c.dtype == again.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), model(x)[0], rtol=0.02, atol=0.02)
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_backward_inside_autocast_is_the_one_outside():
    """The types were settled in the forward: autocast must not round the sums of float32 gradients."""
    gradients = []
    for inside in (False, True):
        torch.manual_seed(0)
        model = Rank1LSTM.from_module(make_plain().float(), K, 0.1)
        loss = model(torch.randn(T, K * B, C))[0].square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


# ---------------------------------------------------------------------------------------------- the converter


def test_average_and_collapse():
    plain = nn.ModuleDict({"lstm": make_plain(num_layers=2)})
    keys = list(plain.state_dict())
    model = lp.expand(copy.deepcopy(plain), K, targets="rank1", noise_std=0.5).eval()
    layer, x = model["lstm"], torch.randn(T, 7, C, dtype=torch.float64)
    state = tuple(torch.randn(2, 2, 7, H, dtype=torch.float64))
    answer = layer(x, state)
    members = [member_state_dict(layer.state_dict(), k) for k in range(K)]
    for mode in ("exact", "weights"):
        collapsed = lp.collapse(copy.deepcopy(model), mode=mode)
        assert list(collapsed.state_dict()) == keys and type(collapsed["lstm"]) is nn.LSTM
        assert repr(collapsed) == repr(plain)
        gain = {name: p.mean(0, keepdim=True) for name, p in layer.state_dict().items() if "gain" in name}
        paper = member_state_dict(layer.state_dict() | gain, 0)
        for name in paper:
            mean = torch.stack([member[name] for member in members]).mean(0)
            expected = mean if mode == "exact" else paper[name]
            torch.testing.assert_close(collapsed["lstm"].state_dict()[name], expected, rtol=1e-12, atol=1e-12)
        found = collapsed["lstm"](x, state)
        torch.testing.assert_close(
            found, functional_call(plain["lstm"], dict(collapsed["lstm"].named_parameters()), (x, state))
        )
        assert (mode == "exact") == torch.equal(found[0], answer[0])
    with lp.members(model, 1), torch.no_grad():
        torch.testing.assert_close(layer(x)[0], functional_call(plain["lstm"], members[1], (x,))[0])


@pytest.mark.parametrize("mode", ["exact", "weights"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_gains_of_one_collapse_bit_for_bit(dtype, mode):
    plain = nn.Sequential(make_plain(num_layers=2)).to(dtype)
    with torch.no_grad():
        plain[0].weight_hh_l1.view(-1)[0] = -0.0
    plain[0].weight_ih_l1.requires_grad_(False)
    original, weight = copy.deepcopy(plain.state_dict()), plain[0].weight_ih_l0
    calls = []
    plain[0].register_forward_hook(lambda *_: calls.append(1))
    lp.expand(plain, 49, targets="rank1")  # 49 · (1 / 49) is not 1
    plain[0](torch.randn(T, 49, C, dtype=dtype))
    lp.collapse(plain, mode=mode)
    assert list(plain.state_dict()) == list(original) and plain[0].bias_ih_l0.requires_grad
    for name, value in plain.state_dict().items():
        assert torch.equal(value, original[name]) and torch.equal(value.signbit(), original[name].signbit())
    untouched = make_plain(num_layers=2).to(dtype)
    untouched.load_state_dict({name[2:]: value for name, value in original.items()})
    x = torch.randn(T, B, C, dtype=dtype)
    assert torch.equal(plain(x)[0], untouched(x)[0]) and calls == [1, 1]
    assert not plain[0].weight_ih_l1.requires_grad and weight.shape == plain[0].weight_ih_l0.shape


def test_plain_checkpoints_load():
    plain = nn.Sequential(make_plain(num_layers=2))
    model = lp.expand(copy.deepcopy(plain), K, targets="rank1", noise_std=0.5)
    other = lp.expand(copy.deepcopy(plain), K, targets="rank1")
    other.load_state_dict(model.state_dict())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in other.state_dict().items())
    with torch.no_grad():
        plain[0].weight_hh_l1.add_(1)
    other.load_state_dict(plain.state_dict())  # the gains are 1 again
    collapsed = lp.collapse(other).state_dict()
    assert all(torch.equal(value, collapsed[name]) for name, value in plain.state_dict().items())


def test_char_lstm_trains_as_the_loop_over_members():
    """The paper's loop: every member's turn is a plain model's whose weights are W ∘ (r_k s_kᵀ)."""
    torch.manual_seed(0)
    plain = CharLSTM(7, H, num_layers=2).double()
    assert sum(p.numel() for p in CharLSTM(205, 500).parameters()) == 1_558_730
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    model = copy.deepcopy(plain)
    model_optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    lp.expand(model, K, targets="rank1", noise_std=0.3, optimizers=model_optimizer)
    assert type(model.lstm) is Rank1LSTM and type(model.fc) is Rank1Linear
    held = [p for group in model_optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held)) == len(list(model.parameters()))  # every gain found the optimizer
    gains = [
        {name: p[k].detach().clone().requires_grad_() for name, p in model.named_parameters() if "gain" in name}
        for k in range(K)
    ]
    optimizers = [torch.optim.SGD(own.values(), lr=0.05, momentum=0.9) for own in gains]
    start, stacked_state, member_states = copy.deepcopy(model.state_dict()), None, [None] * K
    text = torch.randint(7, (K * B, 30 * T + 1))
    for step in range(30):
        x, target = text[:, step * T : (step + 1) * T], text[:, step * T + 1 : (step + 1) * T + 1]
        optimizer.zero_grad()
        for k, (rows, labels) in enumerate(zip(x.chunk(K), target.chunk(K))):
            own = {name: p.unsqueeze(0) for name, p in gains[k].items()}
            weights = member_state_dict(dict(plain.named_parameters()) | own, 0)
            optimizers[k].zero_grad()
            logits, member_states[k] = functional_call(plain, weights, (rows, member_states[k]))
            F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
            optimizers[k].step()
        optimizer.step()

        model_optimizer.zero_grad()
        logits, stacked_state = model(x, stacked_state)
        assert not stacked_state[0].requires_grad and not stacked_state[1].requires_grad
        loss = lp.member_loss(lambda y, t: F.cross_entropy(y.flatten(0, 1), t.flatten()), logits, target, num_members=K)
        loss.backward()
        model_optimizer.step()
    for name, value in model.state_dict().items():
        expected = torch.stack([own[name] for own in gains]) if "gain" in name else plain.state_dict()[name]
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
        assert not torch.equal(value, start[name])
    torch.testing.assert_close(stacked_state[0], torch.cat([h for h, _ in member_states], 1))


# ---------------------------------------------------------------------------------------------- errors


class MyLSTM(nn.LSTM):
    def forward(self, input, hx=None):
        return super().forward(2 * input, hx)


def test_what_rank1_targets():
    model = nn.Sequential(nn.LSTM(C, H, batch_first=True), MyLSTM(C, H), nn.Linear(H, 2))
    lp.expand(model, K, targets="rank1")
    assert [type(module) for module in model] == [Rank1LSTM, MyLSTM, Rank1Linear]
    # Where dim 0 is time, a layer behind would take T steps for K·B rows, in silence where K divides T.
    model = nn.Sequential(nn.LSTM(C, H), nn.Linear(H, H), nn.Linear(H, 2))
    with pytest.raises(NotImplementedError, match="0 has batch_first=False, but 1 takes dim 0 for the batch"):
        lp.expand(model, K, targets="rank1")
    with pytest.warns(UserWarning, match="0 has batch_first=False. If time is in dim 0 of what reaches 2"):
        lp.expand(model, K, targets=("head", lambda name, module: "rank1" if name == "0" else False))
    assert [type(module) for module in model] == [Rank1LSTM, nn.Linear, MemberLinear]
    for plain, message in {
        nn.LSTM(C, H, bidirectional=True): "0: Rank1LSTM.from_module: bidirectional must be False",
        nn.LSTM(C, H, proj_size=2): "proj_size must be 0, got 2",
        nn.utils.parametrizations.weight_norm(nn.LSTM(C, H), "weight_hh_l0"): "other parameters, buffers or children",
        MyLSTM(C, H): "MyLSTM overrides forward of LSTM",
    }.items():
        with pytest.raises(NotImplementedError, match=message):
            lp.expand(nn.Sequential(plain), K, targets=lambda name, module: "rank1" if name == "0" else False)


def test_wrong_module_arguments():
    layer = make_rank1()
    x = torch.randn(T, K * B, C, dtype=torch.float64)
    zeros = (x.new_zeros(1, K * B, H),) * 2
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.full((K * B,), T))
    with pytest.raises(NotImplementedError, match="Rank1LSTM: input must be a padded tensor, got a PackedSequence"):
        layer(packed)
    for error, message, call in (
        (ValueError, r"input must be \[T, K·B, 4\], got shape \[6, 4\]", lambda: layer(x[0])),
        (ValueError, r"input.size\(1\)=5 is not divisible by num_members=3", lambda: layer(x[:, :5])),
        (ValueError, r"hx must be \(h, c\), each \[1, 6, 6\]", lambda: layer(x, (x[:1], x[:1]))),
        (NotImplementedError, "rank1_lstm: h0 must be torch.float32", lambda: layer(x.float(), zeros)),
        (NotImplementedError, "bidirectional must be False", lambda: Rank1LSTM(C, H, K, bidirectional=True)),
        (ValueError, "num_members must be at least 1", lambda: Rank1LSTM(C, H, 0)),
        (TypeError, "module must be an LSTM, got GRU", lambda: Rank1LSTM.from_module(nn.GRU(C, H), K)),
        (ValueError, "collapse: mode must be", lambda: layer.collapse("best")),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize(
    "position, wrong, error, message",
    [
        (0, [1.0], TypeError, "input must be a Tensor, got list"),
        (0, torch.zeros(T, 6, C, dtype=torch.int64), NotImplementedError, "input must be float32"),
        (0, torch.zeros(0, 6, C), ValueError, r"input must be \[T, K·B, in\] with at least one step"),
        (0, torch.zeros(T, 5, C), ValueError, r"input.size\(1\)=5 is not divisible by the 3 members"),
        (1, torch.zeros(5, H), ValueError, r"h0 must have shape \[6, 6\] for 3 members, 6 units"),
        (2, None, TypeError, "c0 must be a Tensor, got NoneType"),
        (3, torch.zeros(4 * H, C + 1), ValueError, r"weight_ih must have shape \[24, 4\]"),
        (4, torch.zeros(4 * H), ValueError, r"weight_hh must be \[4H, H\]"),
        (5, torch.zeros(C), ValueError, r"input_gain_ih must be \[K, in\] with at least one member"),
        (8, torch.zeros(K, H), ValueError, r"output_gain_hh must have shape \[3, 24\]"),
        (8, torch.zeros(K, 4 * H).double(), NotImplementedError, "output_gain_hh must be torch.float32 for"),
        (4, torch.zeros(4 * H, H).to_sparse(), NotImplementedError, "weight_hh must be a dense strided tensor"),
        (9, torch.zeros(K), ValueError, r"bias must have shape \[3, 24\] or \[24\]"),
        (9, torch.zeros(4 * H, device="meta"), ValueError, "bias is on meta, input on cpu"),
    ],
)
def test_wrong_arguments(position, wrong, error, message):
    arguments = make_arguments(dtype=torch.float32)
    arguments[position] = wrong
    with pytest.raises(error, match="rank1_lstm: " + message):
        lp.functional.rank1_lstm(*arguments)
