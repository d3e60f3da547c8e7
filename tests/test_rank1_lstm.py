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
NAMES = ("weight_ih", "weight_hh", "input_gain_ih", "output_gain_ih", "input_gain_hh", "output_gain_hh")


def make_arguments(bias="shared", members=K, batch=B, dtype=torch.float64):
    """Arguments whose gains are of either sign; some are 0, where dividing by a gain would show."""
    torch.manual_seed(0)
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
    lstm = nn.LSTM(x.size(2), h0.size(1), bias=bias is not None).to(x.dtype)
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
    """At most twice the error of nn.LSTM of that type on the same numbers, and one rounding at each tensor's scale."""
    arguments = make_arguments(dtype=dtype)
    exact = [t.detach().double().requires_grad_() for t in arguments]
    ours = [t.detach().float() if i >= 5 and gains == "float32" else t.detach() for i, t in enumerate(arguments)]
    ours = [t.requires_grad_() for t in ours]
    outputs = {"ours": lp.functional.rank1_lstm(*ours), "plain": plain_lstm(arguments), "exact": plain_lstm(exact)}
    assert all(t.dtype == dtype for t in outputs["ours"])
    inputs = {"ours": ours, "plain": arguments, "exact": exact}
    results = {
        name: [*outputs[name], *torch.autograd.grad(outputs[name][0].sum(), inputs[name])] for name in outputs
    }
    for found, plain, truth in zip(*results.values()):
        rounding = torch.finfo(dtype).eps * truth.abs().max()
        assert (found - truth).abs().max() <= 2 * (plain - truth).abs().max() + rounding


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


def test_registered_op_and_compiled_module():
    checks = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    arguments = make_arguments()
    torch.library.opcheck(torch.ops.latephase_kernels.rank1_lstm.default, arguments, test_utils=checks)
    layer = Rank1LSTM(C, H, K, num_layers=2, dtype=torch.float64)
    x = torch.randn(T, K * B, C, dtype=torch.float64)
    with torch._dynamo.config.patch(allow_rnn=True):  # without it, LSTMs are where a compiled graph breaks
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        found = torch.autograd.grad(compiled(x)[0].sum(), [*layer.parameters()])
    torch.testing.assert_close(found, torch.autograd.grad(layer(x)[0].sum(), [*layer.parameters()]))
