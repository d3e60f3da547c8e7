"""The output gain of ensemble_batch_norm on every CPU backend, against the formula in float64.

Shapes: K members, B rows a member, C channels.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_close
from torch.autograd import gradcheck, gradgradcheck

import latephase_kernels as lp
from latephase_kernels.ops.ensemble_batch_norm_gain import forward_in_halves, normalize_with_gain

pytestmark = pytest.mark.usefixtures("backend", "poison_unwritten_memory")

K = 3
LAYOUTS = [torch.contiguous_format, torch.channels_last]
SHAPES = [(2, 5, 7, 7), (3, 67, 3, 3), (4, 17), (1, 3, 70, 70)]  # odd, a register and more, no columns, many tiles


def make(shape, dtype=torch.float32, layout=torch.contiguous_format, *, shared=False):
    """x, weight, bias, gain and dy of [K·B, C, *]; gains of both signs, and of zero."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    rows, *rest = shape
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    x, dy = (normal(K * rows, *rest).to(dtype) for _ in range(2))
    if len(rest) == 3:
        x, dy = (t.contiguous(memory_format=layout) for t in (x, dy))
    weight, bias, gain = (normal(*([rest[0]] if shared else [K, rest[0]])).to(parameters) for _ in range(3))
    gain[..., 1] = 0
    return {"x": x, "weight": weight, "bias": bias, "gain": gain, "dy": dy}


def run(function, inputs, dtype=None, **options):
    """Return y, the running statistics and every gradient; dtype: convert everything first."""
    tensors = {n: t.to(dtype or t.dtype, copy=True) for n, t in inputs.items()}
    leaves = {n: t.requires_grad_() for n, t in tensors.items() if n != "dy"}
    num_members = options.get("num_members", K)
    statistics = [torch.full((num_members, inputs["x"].size(1)), v, dtype=tensors["weight"].dtype) for v in (0.5, 2.0)]
    y = function(*leaves.values(), *statistics, **{"num_members": K, **options})
    y.backward(tensors["dy"])
    gradients = {f"d{name}": leaf.grad for name, leaf in leaves.items()}
    return {"y": y.detach(), "mean": statistics[0], "var": statistics[1], **gradients}


def ours(x, weight, bias, gain, mean, var, *, training=True, **options):
    return lp.functional.ensemble_batch_norm(x, mean, var, weight, bias, training, output_gain=gain, **options)


def plain(x, weight, bias, gain, mean, var, *, training=True, num_members, activation):
    """What a user writes in plain PyTorch."""
    gains = gain if gain.dim() == 2 else [gain] * num_members
    weights, biases = (p if p.dim() == 2 else [p] * num_members for p in (weight, bias))
    parts = []
    for k, rows in enumerate(x.chunk(num_members)):
        z = F.batch_norm(rows, mean[k], var[k], weights[k], biases[k], training)
        z = F.relu(z) if activation == "relu" else z
        parts.append(z * gains[k].to(z.dtype).view(-1, *[1] * (z.dim() - 2)))
    return torch.cat(parts)


def with_sums_together(found):
    """The three gradients that are sums over a channel as one: PyTorch's error in nine values of one is luck."""
    sums = ("dgain", "dweight", "dbias")
    return {**{n: t for n, t in found.items() if n not in sums}, "sums": torch.cat([found[n].flatten() for n in sums])}


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_values_gradients_and_running_statistics(layout, dtype, training, activation):
    shapes = SHAPES[:3] if dtype == torch.float64 else SHAPES  # its truth's own long sums are no better than ours
    for shape, shared in itertools.product(shapes, (False, True)):
        inputs = make(shape, dtype, layout, shared=shared)
        options = dict(training=training, activation=activation)
        result = run(ours, inputs, **options)
        own, truth = run(plain, inputs, **options), run(plain, inputs, torch.float64, **options)
        assert_close(*map(with_sums_together, (result, own, truth)))
        assert result["y"].stride() == inputs["x"].stride()


def test_what_a_gain_of_one_leaves_as_it_is():
    inputs = make(SHAPES[0])
    inputs["gain"].fill_(1)
    found = run(ours, inputs, activation="relu")

    def without(x, weight, bias, gain, mean, var, **options):
        return lp.functional.ensemble_batch_norm(x, mean, var, weight, bias, True, **options) + 0 * gain.sum()

    for name, value in run(without, inputs, activation="relu").items():
        assert name == "dgain" or torch.equal(found[name], value), name


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_member_depends_on_itself_alone(layout, broken):
    clean = make(SHAPES[0], layout=layout)
    options = dict(activation="relu")
    found = run(ours, clean, **options)
    for name in ("x", "gain"):
        bad = {**clean, name: clean[name].clone()}
        part = bad[name].chunk(K)[1]
        part[0, 0] = broken
        other = run(ours, bad, **options)
        assert not other["y"].chunk(K)[1].isfinite().all()
        for kept in (0, 2):
            assert all(torch.equal(found[n].chunk(K)[kept], other[n].chunk(K)[kept]) for n in found)
    for k in range(K):
        alone = run(ours, {n: t.chunk(K)[k] for n, t in clean.items()}, num_members=1, **options)
        assert all(torch.equal(found[n].chunk(K)[k], alone[n]) for n in found)


def test_threads_do_not_change_results(backend):
    if backend == "reference":
        pytest.skip("PyTorch's own reductions may depend on the number of threads")
    results = []
    for layout, count in itertools.product(LAYOUTS, (1, 2, 4)):
        torch.set_num_threads(count)
        results.append(run(ours, make((8, 67, 33, 9), layout=layout), activation="relu"))
    for place, other in enumerate(results):
        assert all(torch.equal(results[place // 3 * 3][name], other[name]) for name in other)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_gradcheck_twice(training, activation):
    inputs = make((2, 3, 4), torch.float64)
    statistics = [torch.full((K, 3), value, dtype=torch.float64) for value in (0.1, 2.0)]
    leaves = [inputs[n].requires_grad_() for n in ("x", "weight", "bias", "gain")]

    def function(*leaves):
        return ours(*leaves, *(t.clone() for t in statistics), training=training, num_members=K, activation=activation)

    assert gradcheck(function, leaves) and gradgradcheck(function, leaves)


def test_parameters_with_strides_beside_an_input_gain():
    x, weight, bias, gain, _ = make(SHAPES[0]).values()
    parameters = (gain, gain, weight, bias)
    apart = [torch.stack([t, t], -1)[..., 0] for t in parameters]
    assert not any(t.is_contiguous() for t in apart)
    y, expected = (normalize_with_gain(x, *given, None, 1e-5, K, "relu", given[0])[0] for given in (apart, parameters))
    assert torch.equal(y, expected)


@pytest.mark.parametrize("activation", ["none", "relu", "relu6", "silu", "hardswish"])
def test_gradcheck_beside_an_input_gain(activation):
    inputs = make((2, 3, 4), torch.float64)
    generator = torch.Generator().manual_seed(1)
    input_gain, shift = (torch.randn(K, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    input_gain[0, 2] = 0
    names = ("x", "weight", "bias", "gain")
    leaves = [t.requires_grad_() for t in (*(inputs[n] for n in names), input_gain, shift[0])]

    def function(x, weight, bias, gain, r, shift):
        behind = gain if activation in ("none", "relu") else None
        return normalize_with_gain(x, r, shift, weight, bias, None, 1e-2, K, activation, behind)[0]

    assert gradcheck(function, leaves) and gradgradcheck(function, leaves)


def test_compiled_and_transformed():
    inputs = make((2, 9, 3, 3), torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    eager, graph = (run(function, inputs, activation="relu") for function in (ours, compiled))
    for name, value in eager.items():
        torch.testing.assert_close(graph[name], value)

    x, weight, bias, gain, _ = inputs.values()

    def loss(gain):
        return ours(x, weight, bias, gain, None, None, num_members=K, activation="relu").pow(3).sum()

    (expected,) = torch.autograd.grad(loss(gain.requires_grad_()), gain)
    torch.testing.assert_close(torch.func.grad(loss)(gain.detach()), expected)


def op_arguments(layout=torch.contiguous_format):
    x, weight, bias, gain, dy = (t.detach() for t in make((2, 67, 5, 5), layout=layout).values())
    return x, dy, (weight, bias), gain


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_halves_equal_the_whole(backend, layout):
    if backend == "reference":
        pytest.skip("the reference is no registered op")
    ops = torch.ops.latephase_kernels
    x, dy, affine, gain = op_arguments(layout)
    y, mean, rstd, _, mask = ops.ensemble_batch_norm(x, None, None, *affine, None, True, 1e-5, K, "relu", gain)
    assert torch.equal(y, ops.ensemble_batch_norm_apply(x, mean, rstd, *affine, None, K, "relu", gain)[0])
    saved = (dy, x, mean, rstd, *affine, mask)
    dx, product, total, _ = ops.ensemble_batch_norm_backward(*saved, True, K, "relu", False, gain)
    sums = ops.ensemble_batch_norm_backward_reduce(*saved, K, "relu")
    assert torch.equal(sums[0], total) and torch.equal(sums[1], product)
    half = ops.ensemble_batch_norm_backward_apply(*saved, *sums, 50.0, K, "relu", False, gain)[0]
    assert torch.equal(half, dx)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_an_input_gain_in_halves(backend, layout):
    """What runs where no kernel has the whole."""
    if backend == "reference":
        pytest.skip("the reference is no registered op")
    x, weight, bias, gain, _ = make(SHAPES[0], torch.float64, layout).values()
    arguments = (x, gain, weight, bias, None, 1e-5, K, "relu", gain)
    whole = torch.ops.latephase_kernels.ensemble_batch_norm_with_gain(*arguments)
    for one, other in zip(whole, forward_in_halves("latephase_kernels", *arguments), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_opcheck(backend):
    if backend == "reference":
        pytest.skip("the reference is no registered op")
    x, _, affine, gain = op_arguments()
    leaves = [t.requires_grad_() for t in (x, *affine, gain)]
    arguments = (leaves[0], None, None, *leaves[1:3], None, True, 1e-5, K, "relu", leaves[3])
    torch.library.opcheck(torch.ops.latephase_kernels.ensemble_batch_norm.default, arguments)
    arguments = (x.detach(), gain.detach(), *(t.detach() for t in leaves[1:3]), None, 1e-5, K, "relu", gain.detach())
    torch.library.opcheck(torch.ops.latephase_kernels.ensemble_batch_norm_with_gain.default, arguments)


def test_wrong_arguments():
    x, weight, bias, gain, _ = make(SHAPES[0]).values()
    statistics = torch.zeros(K, 5), torch.ones(K, 5)
    wrong = [
        (dict(output_gain=gain[:2]), ValueError, r"output_gain must have shape \[3, 5\] or \[5\].*got \[2, 5\]"),
        (dict(output_gain=2.0), TypeError, "output_gain must be a Tensor or None, got float"),
        (dict(output_gain=gain.double()), NotImplementedError, r"output_gain must be torch.float32 .*\.to\("),
        (dict(output_gain=gain.to("meta")), ValueError, "output_gain is on meta, input on cpu"),
        (
            dict(output_gain=gain, residual=x),
            ValueError,
            "output_gain must be None where there is a residual.*member_gain",
        ),
    ]
    for options, error, message in wrong:
        for running in (statistics, (None, None)):
            with pytest.raises(error, match=message):
                lp.functional.ensemble_batch_norm(x, *running, weight, bias, True, num_members=K, **options)
    assert not statistics[0].any()
