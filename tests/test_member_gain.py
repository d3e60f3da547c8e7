"""member_gain on every CPU backend against the formula in float64. K members, B rows a member, C channels."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_close

import latephase_kernels as lp

member_gain = lp.functional.member_gain

pytestmark = pytest.mark.usefixtures("backend", "poison_unwritten_memory")


def make_inputs(shape, K, dtype, *, channel_dim=1, bias="per member", channels_last=False, seed=0):
    """Inputs in dtype; gains of both signs, some exactly zero."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes):
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    C = shape[channel_dim]
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    gain = normal(K, C)
    gain.flatten()[::5] = 0
    inputs = {
        "x": normal(*shape).to(dtype),
        "gain": gain.to(parameters),
        "bias": {"none": None, "shared": normal(C).to(parameters), "per member": normal(K, C).to(parameters)}[bias],
        "dy": normal(*shape).to(dtype),
    }
    if channels_last:
        memory_format = {4: torch.channels_last, 5: torch.channels_last_3d}[len(shape)]
        for name in ("x", "dy"):
            inputs[name] = inputs[name].contiguous(memory_format=memory_format)
    return inputs


def run(function, inputs, *, dtype=None, **options):
    """Call function, run backward, return the output and every gradient; dtype: convert everything first."""
    leaves = {
        name: t.detach().clone(memory_format=torch.preserve_format).to(dtype or t.dtype).requires_grad_()
        for name, t in inputs.items()
        if name != "dy" and t is not None
    }
    y = function(*leaves.values(), **options)
    y.backward(inputs["dy"].to(dtype or y.dtype))
    return {"y": y.detach(), **{f"d{name}": leaf.grad for name, leaf in leaves.items()}}


def by_slices(x, gain, bias=None, *, channel_dim=1, activation="none"):
    """What a user writes in plain PyTorch: the formula on each member's slice."""
    trailing = [1] * (x.dim() - 1 - channel_dim % x.dim())
    pieces = []
    for k, rows in enumerate(x.chunk(gain.size(0))):
        z = rows * gain[k].view(-1, *trailing)
        if bias is not None:
            z = z + (bias if bias.dim() == 1 else bias[k]).view(-1, *trailing)
        pieces.append(z)
    y = torch.cat(pieces).to(x.dtype)
    return F.relu(y) if activation == "relu" else y


def compare(inputs, **options):
    result = run(member_gain, inputs, **options)
    plain = run(by_slices, inputs, **options)
    truth = run(by_slices, inputs, dtype=torch.float64, **options)
    if options.get("activation") == "relu":  # where rounding decides the sign, the gradient of either side is right
        before = run(by_slices, inputs, dtype=torch.float64, **{**options, "activation": "none"})["y"]
        assert ((before.abs() < 1e-7) & (before != 0)).sum() == 0
    assert_close(result, plain, truth)
    assert result["y"].stride() == inputs["x"].stride()
    return result


SHAPES = [  # shape, K, channel_dim: odd everything, 7×7 planes, long runs, channels inside, several parts of a member
    ((4, 3, 5, 5), 1, 1),
    ((6, 5, 7, 7), 3, 1),
    ((6, 64, 4, 4), 2, 1),
    ((20, 17), 4, -1),
    ((6, 6, 33), 2, 1),
    ((2, 3, 210, 210), 2, 1),
    ((4, 4, 2, 3, 5), 2, 1),
    ((6, 9, 67), 3, -1),
    ((4, 3, 5, 600), 2, -1),
    ((4, 3, 5, 6), 2, 2),
    ((6, 1, 9), 2, 1),
    ((700, 35), 2, -1),
    ((4, 530), 2, 1),
    ((6, 70, 8, 8), 2, 1),
]


@pytest.mark.parametrize("shape, K, channel_dim", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients(shape, K, channel_dim, dtype):
    for bias, activation in itertools.product(["none", "per member", "shared"], ["none", "relu"]):
        inputs = make_inputs(shape, K, dtype, channel_dim=channel_dim, bias=bias)
        compare(inputs, channel_dim=channel_dim, activation=activation)


@pytest.mark.parametrize("channel_dim", [1, 2, -1])
@pytest.mark.parametrize("shape", [(6, 5, 7, 7), (4, 67, 3, 3), (4, 4, 2, 3, 5)], ids=str)
def test_channels_last(shape, channel_dim):
    inputs = make_inputs(shape, 2, torch.float32, channel_dim=channel_dim, channels_last=True)
    result = compare(inputs, channel_dim=channel_dim, activation="relu")
    assert result["dx"].stride() == inputs["x"].stride()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("parameter_dtype", ["float32", "same"])
def test_half_precision(dtype, channels_last, parameter_dtype):
    inputs = make_inputs((12, 67, 7, 5), 3, dtype, channels_last=channels_last)
    if parameter_dtype == "same":
        inputs = {name: t.to(dtype) for name, t in inputs.items()}
    compare(inputs)
    relu, plain = run(member_gain, inputs, activation="relu"), run(member_gain, inputs)
    assert torch.equal(relu["y"], F.relu(plain["y"]))
    masked = run(member_gain, {**inputs, "dy": inputs["dy"] * (plain["y"] > 0)})
    for name in ("dx", "dgain", "dbias"):  # the mask is that of the rounded output
        assert torch.equal(relu[name], masked[name])


def test_new_tensors_are_poisoned():
    """Without this the tests above would not see unwritten memory."""
    assert torch.empty(5).isnan().all() and torch.zeros(1).new_empty(5).isnan().all()


# ---- members are alone

LAYOUTS = [False, True]


@pytest.mark.parametrize("channels_last", LAYOUTS)
@pytest.mark.parametrize("poison", [float("nan"), 1e30])
def test_a_poisoned_member_leaves_the_others_bit_identical(channels_last, poison):
    clean = make_inputs((6, 65, 4, 4), 3, torch.float32, channels_last=channels_last)
    a = run(member_gain, clean, activation="relu")
    for argument in clean:
        poisoned = {**clean, argument: clean[argument].clone(memory_format=torch.preserve_format)}
        poisoned[argument].unflatten(0, (3, -1))[1, 0] = poison
        b = run(member_gain, poisoned, activation="relu")
        for name, value in a.items():
            assert torch.equal(*(t.unflatten(0, (3, -1))[[0, 2]] for t in (value, b[name]))), (argument, name)
        if argument == "x" and poison != poison:
            assert b["y"][2, :].isnan().all()
            torch.testing.assert_close(b["dx"][2], clean["dy"][2] * clean["gain"][1].view(-1, 1, 1))


@pytest.mark.parametrize("channels_last", LAYOUTS)
def test_member_alone_and_permuted_is_bit_identical(channels_last):
    inputs = make_inputs((12, 67, 20, 20), 4, torch.float32, channels_last=channels_last)
    stacked, again = (run(member_gain, inputs, activation="relu") for _ in range(2))
    order = [2, 0, 3, 1]
    rows = torch.tensor([3 * k + b for k in order for b in range(3)])
    permuted_inputs = {n: t[rows] if n in ("x", "dy") else t[order] for n, t in inputs.items()}
    permuted = run(member_gain, permuted_inputs, activation="relu")
    for name, value in stacked.items():
        assert torch.equal(value, again[name])
        assert torch.equal(value[order if value.size(0) == 4 else rows], permuted[name])
    for k in range(4):
        alone = run(member_gain, {n: t.chunk(4)[k] for n, t in inputs.items()}, activation="relu")
        for name, value in stacked.items():
            assert torch.equal(value.chunk(4)[k], alone[name]), name


@pytest.mark.parametrize("channels_last", LAYOUTS)
def test_threads_do_not_change_results(backend, channels_last):
    if backend == "reference":
        pytest.skip("PyTorch's own reductions may depend on the number of threads")
    inputs = make_inputs((16, 67, 33, 9), 2, torch.float32, channels_last=channels_last)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(run(member_gain, inputs, activation="relu"))
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


# ---- any strides, empty batches


def test_any_strides():
    base = make_inputs((8, 6, 5, 8), 2, torch.float32)
    expected = run(member_gain, base, activation="relu")
    strided = {
        "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        "rows innermost": lambda t: t.movedim(0, 2).contiguous().movedim(2, 0),
        "offset": lambda t: torch.cat([t.flatten()[:3], t.flatten()])[3:].view(t.shape),
        "every second": lambda t: t.repeat_interleave(2, dim=1)[:, ::2],
        "channel slice of channels_last": lambda t: torch.cat([t, t], 1).contiguous(memory_format=torch.channels_last)[
            :, :6
        ],
    }
    for name, change in strided.items():
        leaves = [base[n].clone().requires_grad_() for n in ("x", "gain", "bias")]
        x, gain, bias = leaves
        gain, bias = (p.t().contiguous().t() for p in (gain, bias))
        y = member_gain(change(x), gain, bias, activation="relu")
        y.backward(change(base["dy"]))
        assert torch.equal(y.detach(), expected["y"]), name
        for leaf, expected_grad in zip(leaves, ("dx", "dgain", "dbias")):
            torch.testing.assert_close(leaf.grad, expected[expected_grad], msg=name)


def test_expanded_arguments():
    x = torch.randn(6, 4, 5).requires_grad_()
    gain = torch.randn(4, requires_grad=True)
    member_gain(x, gain.expand(3, 4)).sum().backward()
    torch.testing.assert_close(x.grad, gain.detach().view(4, 1).expand(6, 4, 5))
    torch.testing.assert_close(gain.grad, x.detach().sum((0, 2)))


@pytest.mark.parametrize("shape", [(0, 4, 3), (6, 4, 0), (6, 0, 3)], ids=str)
def test_empty(shape):
    result = run(member_gain, make_inputs(shape, 2, torch.float32), activation="relu")
    assert result["y"].shape == shape
    assert all(torch.equal(result[name], torch.zeros(2, shape[1])) for name in ("dgain", "dbias"))


# ---- autograd, transforms, compile


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("bias", ["none", "shared", "per member"])
@pytest.mark.parametrize("channel_dim", [1, -1])
def test_gradcheck_twice(channel_dim, bias, activation):
    inputs = make_inputs((4, 3, 2), 2, torch.float64, channel_dim=channel_dim, bias=bias)
    if bias == "none" and activation == "relu":
        inputs["gain"][inputs["gain"] == 0] = -0.5  # x · 0 would sit on the ReLU's kink
    leaves = [inputs[n].requires_grad_() for n in ("x", "gain", "bias") if inputs[n] is not None]

    def function(*arguments):
        y = member_gain(*arguments, channel_dim=channel_dim, activation=activation)
        return y + 0.1 * y.pow(3)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_first_gradients_are_the_same_where_they_can_be_differentiated_again():
    """x is computed from the gain: that path must not count twice."""
    inputs = make_inputs((4, 3, 2), 2, torch.float64)
    gain = inputs["gain"].requires_grad_()
    loss = member_gain(torch.sin(inputs["x"] * gain[0].view(1, 3, 1)), gain, inputs["bias"]).pow(3).sum()
    (expected,) = torch.autograd.grad(loss, gain, retain_graph=True)
    (found,) = torch.autograd.grad(loss, gain, create_graph=True)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_only_the_needed_gradients():
    inputs = make_inputs((4, 3, 2), 2, torch.float32)
    for name in ("x", "gain", "bias"):
        leaves = {n: inputs[n].clone().requires_grad_(n == name) for n in ("x", "gain", "bias")}
        member_gain(*leaves.values()).backward(inputs["dy"])
        assert [n for n, leaf in leaves.items() if leaf.grad is not None] == [name]


def test_functional_transforms():
    inputs = make_inputs((6, 4, 5), 2, torch.float64)
    x, gain, bias = (inputs[n] for n in ("x", "gain", "bias"))

    def loss(x, gain):
        return member_gain(x, gain, bias, activation="relu").pow(3).sum()

    leaves = [t.clone().requires_grad_() for t in (x, gain)]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close(torch.func.grad(loss, argnums=(0, 1))(x, gain), expected)
    many = torch.func.vmap(loss, in_dims=(0, None))(x.expand(2, *x.shape), gain)
    torch.testing.assert_close(many, loss(x, gain).expand(2))


@pytest.mark.parametrize("channels_last", LAYOUTS)
@pytest.mark.parametrize("bias", ["none", "shared"])
def test_opcheck(backend, bias, channels_last):
    if backend == "reference":
        pytest.skip("the reference is no registered op")
    inputs = make_inputs((4, 9, 3, 3), 2, torch.float32, bias=bias, channels_last=channels_last)
    x, gain, bias, dy = inputs.values()
    leaves = [None if t is None else t.clone().requires_grad_() for t in (x, gain, bias)]
    ops = torch.ops.latephase_kernels
    torch.library.opcheck(ops.member_gain.default, (*leaves, 1, "relu"))
    torch.library.opcheck(ops.member_gain_backward.default, (dy, x, gain, bias, 1, "relu"))
    torch.library.opcheck(ops.member_gain_into.default, (x, gain, bias, 1, "relu", torch.empty_like(x)))
    out = torch.empty_like(dy)
    torch.library.opcheck(ops.member_gain_backward_into.default, (dy, x, gain, bias, 1, "relu", out))


@pytest.mark.parametrize("channels_last", LAYOUTS)
def test_in_place_is_bit_identical(backend, channels_last):
    if backend == "reference":
        pytest.skip("the reference is no registered op")
    x, gain, bias, dy = make_inputs((4, 37, 3, 3), 2, torch.float32, channels_last=channels_last).values()
    ops, rest = torch.ops.latephase_kernels, (gain, bias, 1, "relu")
    y, (dx, *sums) = ops.member_gain(x, *rest), ops.member_gain_backward(dy, x, *rest)
    sums_in_place = ops.member_gain_backward_into(dy, x, *rest, dy)
    ops.member_gain_into(x, *rest, x)
    assert torch.equal(x, y) and torch.equal(dy, dx)
    assert all(torch.equal(*pair) for pair in zip(sums_in_place, sums))
    with pytest.raises(RuntimeError, match="member_gain: out must have input's shape"):
        ops.member_gain_into(x, *rest, x[:2])


@pytest.mark.parametrize("channel_dim", [1, -1])
def test_compiles_without_graph_break(channel_dim):
    inputs = make_inputs((4, 9, 3, 9), 2, torch.bfloat16, channel_dim=channel_dim)
    torch._dynamo.reset()
    compiled = torch.compile(member_gain, fullgraph=True, backend="aot_eager")
    options = dict(channel_dim=channel_dim, activation="relu")
    eager, graph = run(member_gain, inputs, **options), run(compiled, inputs, **options)
    for name, value in eager.items():
        assert torch.equal(graph[name], value), name


# ---- malformed calls


X, GAIN = torch.zeros(6, 4, 5), torch.ones(2, 4)

BAD_CALLS = [
    # what is changed, the exception, words the message must have
    (dict(input=[[1.0]]), TypeError, ["input", "Tensor", "list"]),
    (dict(input=torch.zeros(6)), ValueError, ["input", "(6,)"]),
    (dict(input=torch.zeros(6, 4, dtype=torch.int64)), NotImplementedError, ["int64", ".float()"]),
    (dict(input=torch.zeros(7, 4)), ValueError, ["input.size(0)=7", "2 members", "minibatches"]),
    (dict(channel_dim=0), ValueError, ["channel_dim", "1 to 2", "members"]),
    (dict(channel_dim=-3), ValueError, ["channel_dim", "-1 to -2", "-3"]),
    (dict(channel_dim=3), ValueError, ["channel_dim", "got 3"]),
    (dict(channel_dim=1.0), TypeError, ["channel_dim", "float"]),
    (dict(gain=None), TypeError, ["gain", "NoneType"]),
    (dict(gain=torch.ones(4)), ValueError, ["gain", "[K, C]", "[4]"]),
    (dict(gain=torch.ones(0, 4)), ValueError, ["gain", "at least one member", "[0, 4]"]),
    (dict(channel_dim=-1), ValueError, ["gain", "[2, 5]", "[2, 4]"]),
    (dict(gain=GAIN.double()), NotImplementedError, ["gain", "float64", "float32"]),
    (dict(gain=GAIN.to("meta")), ValueError, ["gain", "meta", "cpu"]),
    (dict(bias=torch.ones(3, 4)), ValueError, ["bias", "[2, 4] or [4]", "[3, 4]"]),
    (dict(bias=1.0), TypeError, ["bias", "float"]),
    (dict(activation="gelu"), ValueError, ["activation", "none, relu", "gelu"]),
]


@pytest.mark.parametrize("changed, exception, words", BAD_CALLS, ids=lambda v: str(v)[:40])
def test_bad_calls(changed, exception, words):
    arguments = {"input": X, "gain": GAIN, **changed}
    with pytest.raises(exception) as raised:
        member_gain(**arguments)
    assert all(word in str(raised.value) for word in ["member_gain: ", *words]), raised.value


def test_an_older_library_leaves_the_op_to_the_reference(monkeypatch):
    """The backend is chosen for each op: one that the library lacks runs on the reference, and says so once."""
    monkeypatch.setitem(lp.backend._missing_ops, ("member_gain", "cpu"), "too old")
    monkeypatch.setattr(lp.backend, "_warned", set())
    lp.set_backend("auto")
    torch._dynamo.reset()
    compiled = torch.compile(member_gain, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(X + 1, GAIN * 2), X + 2)  # the warning breaks no graph
    with pytest.warns(UserWarning, match="reference path .* too old"):
        assert torch.equal(member_gain(X + 1, GAIN * 2), X + 2)
    lp.set_backend("native")
    with pytest.raises(RuntimeError, match="too old"):
        member_gain(X, GAIN)
