"""ensemble_batch_norm on every CPU backend against the formula in float64. K members, B rows a member, C channels."""

import ctypes
import itertools
import os

import pytest
import torch
import torch.nn.functional as F
from accuracy import ACTIVATIONS, KINKS, STANDALONE, assert_close

import latephase_kernels as lp
from latephase_kernels.ops.relu_mask import unpack_mask
from latephase_kernels.reference import ensemble_batch_norm as reference

ensemble_batch_norm = lp.functional.ensemble_batch_norm

pytestmark = pytest.mark.usefixtures("backend", "poison_unwritten_memory")


def make_inputs(K, B, C, spatial, dtype, *, residual=False, shared=False, channels_last=False, offset=0.0, seed=0):
    """Inputs in dtype, with running statistics; the data gets a per-channel offset and scale."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shape = (K * B, C, *spatial)
    per_channel = (1, C, *[1] * len(spatial))
    x = normal(*shape) * (normal(*per_channel).abs() + 0.5) + normal(*per_channel) + offset
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = {
        "x": x.to(dtype),
        "weight": normal(*([C] if shared else [K, C])).to(parameters),
        "bias": normal(*([C] if shared else [K, C])).to(parameters),
        "residual": normal(*shape).to(dtype) if residual else None,
        "running_mean": normal(K, C).to(parameters),
        "running_var": normal(K, C).abs().to(parameters) + 0.5,
        "dy": normal(*shape).to(dtype),
    }
    if channels_last:
        memory_format = {4: torch.channels_last, 5: torch.channels_last_3d}[len(shape)]
        for name in ("x", "residual", "dy"):
            if inputs[name] is not None:
                inputs[name] = inputs[name].contiguous(memory_format=memory_format)
    return inputs


def run(function, inputs, *, dtype=None, **options):
    """Call function, run backward, return every output and gradient; dtype: convert everything first."""
    tensors = {
        name: None if t is None else t.detach().clone(memory_format=torch.preserve_format).to(dtype or t.dtype)
        for name, t in inputs.items()
    }
    leaves = {
        n: t.requires_grad_() for n, t in tensors.items() if n in ("x", "weight", "bias", "residual") and t is not None
    }
    y = function(
        tensors["x"], tensors["running_mean"], tensors["running_var"], tensors["weight"], tensors["bias"],
        residual=tensors["residual"], **options,
    )  # fmt: skip
    y.backward(tensors["dy"])
    grads = {f"d{name}": leaf.grad for name, leaf in leaves.items()}
    return {"y": y.detach(), **grads, "running_mean": tensors["running_mean"], "running_var": tensors["running_var"]}


def by_slices(x, running_mean, running_var, weight, bias, *, num_members, residual, activation, training, **options):
    """What a user writes in plain PyTorch: F.batch_norm on each member's slice."""
    rows = x.chunk(num_members)
    weights, biases = ([p] * num_members if p.dim() == 1 else p for p in (weight, bias))
    y = torch.cat(
        [
            F.batch_norm(rows[k], running_mean[k], running_var[k], weights[k], biases[k], training, **options)
            for k in range(num_members)
        ]
    )
    y = y if residual is None else y + residual
    return ACTIVATIONS[activation](y)


def compare(inputs, **options):
    result = run(ensemble_batch_norm, inputs, **options)
    plain = run(by_slices, inputs, **options)
    truth = run(by_slices, inputs, dtype=torch.float64, **options)
    kinks = KINKS.get(options["activation"], ())  # where rounding decides the side, the gradient of either is right
    for kink in kinks:
        before = run(by_slices, inputs, dtype=torch.float64, **{**options, "activation": "none"})["y"]
        assert ((before - kink).abs() < 1e-7).sum() < 2
    scales = sum_scales(inputs, **options) if options["activation"] in STANDALONE else None
    assert_close(result, plain, truth, scales)
    return result


def sum_scales(inputs, *, num_members, **options):
    """The largest Σ|dz| and Σ|dz·x̂| of a member's channel: sums of float32 are rounded relative to them."""
    activation = ACTIVATIONS[options["activation"]]
    tensors = {name: None if t is None else t.double() for name, t in inputs.items()}
    running, affine = (tensors["running_mean"], tensors["running_var"]), (tensors["weight"], tensors["bias"])
    ones, zeros = torch.ones_like(affine[0]), torch.zeros_like(affine[0])
    options |= {"num_members": num_members, "residual": None, "activation": "none"}
    xhat, z = (by_slices(tensors["x"], *(t.clone() for t in running), *ab, **options) for ab in ((ones, zeros), affine))
    (dz,) = torch.autograd.grad(activation(z.requires_grad_()), z, tensors["dy"])
    sums = [t.abs().unflatten(0, (num_members, -1)).transpose(1, 2).flatten(2).sum(2).max() for t in (dz, dz * xhat)]
    return dict(zip(("dbias", "dweight"), (s.item() for s in sums)))


SHAPES = [  # K, B, C, spatial: one member, odd everything, 7×7 planes, a vector's width and one more, long rows
    (1, 4, 3, (5, 5)),
    (3, 2, 5, (7, 7)),
    (2, 3, 64, (4, 4)),
    (2, 2, 67, (3, 3)),
    (4, 5, 17, ()),
    (2, 3, 6, (33,)),
    (2, 1, 3, (70, 70)),
    (2, 2, 4, (2, 3, 5)),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients(shape, dtype, training):
    for residual, activation in [
        *itertools.product([False, True], ["none", "relu"]),
        *((False, a) for a in STANDALONE),
    ]:
        inputs = make_inputs(*shape, dtype, residual=residual)
        compare(inputs, num_members=shape[0], training=training, activation=activation)


@pytest.mark.parametrize("shape", [s for s in SHAPES if len(s[3]) >= 2], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_channels_last(shape, training):
    for residual, activation in [(True, "relu"), *((False, a) for a in STANDALONE)]:
        inputs = make_inputs(*shape, torch.float32, residual=residual, channels_last=True)
        result = compare(inputs, num_members=shape[0], training=training, activation=activation)
        assert result["y"].stride() == inputs["x"].stride()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("parameter_dtype", ["float32", "same"])
def test_half_precision(dtype, channels_last, parameter_dtype):
    inputs = make_inputs(3, 4, 67, (7, 5), dtype, channels_last=channels_last)
    if parameter_dtype == "same":
        inputs = {name: None if t is None else t.to(dtype) for name, t in inputs.items()}
    compare(inputs, num_members=3, training=True, activation="none")
    compare(inputs, num_members=3, training=True, activation="silu")
    compare(inputs, num_members=3, training=True, activation="hardswish")
    result = run(ensemble_batch_norm, inputs, num_members=3, training=True, activation="relu")
    plain = run(ensemble_batch_norm, inputs, num_members=3, training=True, activation="none")
    assert torch.equal(result["y"], F.relu(plain["y"]))
    capped = run(ensemble_batch_norm, inputs, num_members=3, training=True, activation="relu6")
    assert torch.equal(capped["y"], F.relu6(plain["y"]))
    for found, passed in ((result, plain["y"] > 0), (capped, (plain["y"] > 0) & (plain["y"] < 6))):
        masked_inputs = {**inputs, "dy": inputs["dy"] * passed}
        masked = run(ensemble_batch_norm, masked_inputs, num_members=3, training=True, activation="none")
        assert torch.equal(found["dx"], masked["dx"])  # the mask is that of the rounded output


def test_shared_affine_weights():
    inputs = make_inputs(4, 3, 5, (4, 4), torch.float32, shared=True)
    result = compare(inputs, num_members=4, training=True, activation="relu")
    assert result["dweight"].shape == (5,)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind", ["large mean", "drifting mean", "outlier first"])
def test_ill_conditioned_statistics(channels_last, kind):
    """Many tiles of values: their sums are taken about a mean that must be each tile's own."""
    inputs = make_inputs(2, 4, 3, (40, 40), torch.float32, offset=1e4, channels_last=channels_last)
    if kind == "drifting mean":
        inputs["x"] += torch.linspace(0, 1e3, 1600).view(40, 40)
    if kind == "outlier first":
        inputs["x"][::4, :, 0, 0] = -1e6
    compare(inputs, num_members=2, training=True, activation="none")


def test_no_affine_no_running_statistics():
    x = make_inputs(2, 3, 4, (5,), torch.float32)["x"]
    y = ensemble_batch_norm(x, None, None, training=True, num_members=2)
    expected = torch.cat([F.batch_norm(part, None, None, training=True) for part in x.double().chunk(2)])
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-6)


def test_tensor_and_cumulative_momentum():
    inputs = make_inputs(2, 3, 4, (5,), torch.float32)
    as_float = run(ensemble_batch_norm, inputs, num_members=2, training=True, momentum=0.25)
    as_tensor = run(ensemble_batch_norm, inputs, num_members=2, training=True, momentum=torch.full((2, 1), 0.25))
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(as_float[name], as_tensor[name])


def test_new_tensors_are_poisoned():
    """Without this the tests above would not see unwritten memory."""
    assert torch.empty(5).isnan().all() and torch.zeros(1).new_empty(5).isnan().all()
    if "malloc.perturb" not in os.environ.get("GLIBC_TUNABLES", ""):
        pytest.skip("memory of the ops' own is not filled: GLIBC_TUNABLES is not set as `make test` does")
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
    for size in (40, 1 << 22):
        data = libc.malloc(size)
        assert set(ctypes.string_at(data, size)) == {0xFE}
        libc.free(data)


# ---- members are alone

LAYOUTS = [False, True]


@pytest.mark.parametrize("channels_last", LAYOUTS)
@pytest.mark.parametrize("poison", [float("nan"), 1e30])
def test_a_poisoned_member_leaves_the_others_bit_identical(channels_last, poison):
    clean = make_inputs(3, 2, 65, (4, 4), torch.float32, residual=True, channels_last=channels_last)
    poisoned = {**clean, "x": clean["x"].clone(memory_format=torch.preserve_format)}
    poisoned["x"][2:4, 0] = poison
    options = dict(num_members=3, training=True, activation="relu")
    a, b = run(ensemble_batch_norm, clean, **options), run(ensemble_batch_norm, poisoned, **options)
    for name in ("y", "dx", "dresidual"):
        for rows in (slice(0, 2), slice(4, 6)):
            assert torch.equal(a[name][rows], b[name][rows])
    for name in ("dweight", "dbias", "running_mean", "running_var"):
        assert torch.equal(a[name][[0, 2]], b[name][[0, 2]])
    if poison != poison:
        assert b["y"][2:4, 0].isnan().all()


@pytest.mark.parametrize("channels_last", LAYOUTS)
@pytest.mark.parametrize("size", [6, 23])  # one tile of rows, and many: a member alone is shared out among the threads
def test_member_alone_and_permuted_is_bit_identical(channels_last, size):
    inputs = make_inputs(4, 3, 67, (size, size), torch.float32, residual=True, channels_last=channels_last)
    options = dict(training=True, activation="relu")
    stacked = run(ensemble_batch_norm, inputs, num_members=4, **options)
    again = run(ensemble_batch_norm, inputs, num_members=4, **options)
    order = [2, 0, 3, 1]
    rows = torch.tensor([3 * k + b for k in order for b in range(3)])
    permuted_inputs = {
        n: (t[rows] if n in ("x", "dy", "residual") else t[order]) for n, t in inputs.items() if t is not None
    }
    permuted = run(ensemble_batch_norm, permuted_inputs, num_members=4, **options)
    for name, value in stacked.items():
        assert torch.equal(value, again[name])
        assert torch.equal(value[order if value.size(0) == 4 else rows], permuted[name])
    for k in range(4):
        alone_inputs = {
            n: (t[3 * k : 3 * k + 3] if n in ("x", "dy", "residual") else t[k : k + 1]) for n, t in inputs.items()
        }
        alone = run(ensemble_batch_norm, alone_inputs, num_members=1, **options)
        for name, value in stacked.items():
            part = value[k : k + 1] if value.size(0) == 4 else value[3 * k : 3 * k + 3]
            assert torch.equal(part, alone[name]), name


@pytest.mark.parametrize("channels_last", LAYOUTS)
def test_threads_do_not_change_results(backend, channels_last):
    if backend == "reference":
        pytest.skip("PyTorch's own reductions may depend on the number of threads")
    inputs = make_inputs(3, 8, 67, (33, 9), torch.float32, residual=True, channels_last=channels_last)
    results = []
    for count in (1, 2, 3, 4):  # 3 members: all alone, one left over, all alone, all left over
        torch.set_num_threads(count)
        results.append(run(ensemble_batch_norm, inputs, num_members=3, training=True, activation="relu"))
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


@pytest.mark.parametrize("channels_last", LAYOUTS)
def test_nan_stays_in_its_place_in_eval(channels_last):
    inputs = make_inputs(2, 2, 5, (3, 3), torch.float32, channels_last=channels_last)
    inputs["x"][0, 1, 0, 0] = float("inf")
    inputs["dy"][3, 2, 1, 1] = float("nan")
    dx = run(ensemble_batch_norm, inputs, num_members=2, training=False)["dx"]
    expected = run(by_slices, inputs, num_members=2, training=False, activation="none")["dx"]
    assert expected.isnan().sum() == 1
    torch.testing.assert_close(dx, expected, equal_nan=True)


# ---- any strides, empty batches


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", STANDALONE)
def test_standalone_activations_far_from_zero(activation, dtype):
    """Where e⁻ᶻ overflows, and beside what rounds to 0, 3 and 6; PyTorch's SiLU has NaN for the gradient of ∞, too.

    PyTorch's own gradients at NaN are 1, 0 or NaN by type and position.
    """
    z = torch.tensor([-1e30, -1e4, -110.0, -89.0, -20.0, -0.0, 20.0, 89.0, 1e30, float("inf"), float("nan")])
    beside = [
        torch.nextafter(torch.tensor(v).to(dtype), torch.tensor(w).to(dtype))
        for v in (-3.0, 3.0, 6.0)
        for w in (-9.0, 9.0)
    ]
    z = torch.cat([z, torch.tensor([-3.0, 0.0, 3.0, 6.0]), torch.stack(beside).float()])
    statistics = torch.zeros(1, 1, dtype=dtype), torch.ones(1, 1, dtype=dtype)
    results = []
    options = dict(eps=0.0, num_members=1, activation=activation)
    for activated in (ACTIVATIONS[activation], lambda x: ensemble_batch_norm(x, *statistics, **options)):
        x = z.to(dtype).view(-1, 1).requires_grad_()
        y = activated(x)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        results.append((y.detach(), dx[~z.isnan()]))
    for expected, found in zip(*results):
        torch.testing.assert_close(found, expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-36, equal_nan=True)


def test_any_strides():
    base = make_inputs(2, 4, 6, (5, 8), torch.float32, residual=True)
    options = dict(num_members=2, training=True, activation="relu")
    expected = run(ensemble_batch_norm, base, **options)
    strided = {
        "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        "offset": lambda t: torch.cat([t.flatten()[:3], t.flatten()])[3:].view(t.shape),
        "every second": lambda t: t.repeat_interleave(2, dim=1)[:, ::2],
        "channel slice of channels_last": lambda t: torch.cat([t, t], 1).contiguous(memory_format=torch.channels_last)[
            :, :6
        ],
    }
    for name, change in strided.items():
        leaf = base["x"].clone().requires_grad_()
        y = ensemble_batch_norm(
            change(leaf), None, None, base["weight"], base["bias"], residual=change(base["residual"]), **options
        )
        y.backward(change(base["dy"]))
        torch.testing.assert_close(y.detach(), expected["y"], msg=name)
        torch.testing.assert_close(leaf.grad, expected["dx"], msg=name)


def test_expanded_gradient():
    inputs = make_inputs(2, 4, 6, (5,), torch.float32)
    inputs["dy"] = torch.ones(()).expand(8, 6, 5)
    x = inputs["x"].requires_grad_()
    ensemble_batch_norm(x, None, None, inputs["weight"], training=True, num_members=2).sum().backward()
    assert x.grad.abs().max() < 1e-5  # the sum of a normalized batch does not depend on x


@pytest.mark.parametrize("training", [True, False])
def test_empty_batch(training):
    inputs = make_inputs(2, 2, 4, (3, 3), torch.float32, residual=True)
    empty = {n: t[:0] if n in ("x", "dy", "residual") else t for n, t in inputs.items()}
    result = run(ensemble_batch_norm, empty, num_members=2, training=training, activation="relu")
    assert result["y"].shape == (0, 4, 3, 3)
    assert torch.equal(result["running_mean"], inputs["running_mean"])
    assert torch.equal(result["running_var"], inputs["running_var"])
    assert torch.equal(result["dweight"], torch.zeros(2, 4))


# ---- autograd, transforms, compile


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "activation, residual",
    [("none", False), ("relu", False), ("relu", True), ("relu6", False), ("silu", False), ("hardswish", False)],
)
def test_gradcheck_twice(training, activation, residual):
    inputs = make_inputs(2, 2, 3, (2, 2), torch.float64, residual=residual, seed=3)
    leaves = [inputs[n].requires_grad_() for n in ("x", "weight", "bias", "residual") if inputs[n] is not None]

    def function(x, weight, bias, residual=None):
        return ensemble_batch_norm(
            x, inputs["running_mean"].clone(), inputs["running_var"].clone(), weight, bias, training,
            num_members=2, residual=residual, activation=activation,
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize(
    "activation, residual", [("none", False), ("relu", True), ("relu6", False), ("silu", False), ("hardswish", False)]
)
def test_first_gradients_are_the_same_where_they_can_be_differentiated_again(activation, residual):
    """x is computed from the weight: that path must not count twice."""
    inputs = make_inputs(2, 2, 3, (2, 2), torch.float64, residual=residual)
    weight = inputs["weight"].requires_grad_()
    x = torch.sin(inputs["x"] * weight[0].view(1, 3, 1, 1))
    y = ensemble_batch_norm(
        x, None, None, weight, inputs["bias"], True, num_members=2, residual=inputs["residual"], activation=activation
    )
    loss = y.pow(3).sum()
    (expected,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (found,) = torch.autograd.grad(loss, weight, create_graph=True)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_only_the_needed_gradients(backend):
    inputs = make_inputs(2, 2, 3, (2, 2), torch.float32)
    weight = inputs["weight"].requires_grad_()
    y = ensemble_batch_norm(inputs["x"], None, None, weight, inputs["bias"], True, num_members=2)
    y.sum().backward()
    assert weight.grad is not None and inputs["x"].grad is None


def test_functional_transforms():
    inputs = make_inputs(2, 3, 4, (5,), torch.float64)

    def loss(x):
        return ensemble_batch_norm(x, None, None, training=True, num_members=2).pow(3).sum()

    x = inputs["x"].requires_grad_()
    (expected,) = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), expected)
    torch.testing.assert_close(torch.func.vmap(loss)(x.detach().expand(2, *x.shape)), loss(x.detach()).expand(2))


def op_arguments(activation="relu"):
    inputs = make_inputs(2, 2, 9, (3, 3), torch.float32, residual=True)
    leaves = [inputs[n].requires_grad_() for n in ("weight", "bias", "residual")]
    return inputs["x"].requires_grad_(), None, None, *leaves, True, 1e-5, 2, activation


def test_opcheck(backend):
    if backend == "reference":
        pytest.skip("the reference is no registered op")
    torch.library.opcheck(torch.ops.latephase_kernels.ensemble_batch_norm.default, op_arguments())
    x = op_arguments()[0].detach()
    torch.library.opcheck(torch.ops.latephase_kernels.ensemble_batch_norm_statistics.default, (x, 2))


@pytest.mark.parametrize("channels_last", LAYOUTS)
@pytest.mark.parametrize("size", [3, 23])  # one tile of rows and many
def test_halves_equal_the_whole(backend, channels_last, size):
    if backend == "reference":
        pytest.skip("the reference is no registered op")
    ops = torch.ops.latephase_kernels
    t = make_inputs(2, 3, 67, (size, size), torch.float32, residual=True, channels_last=channels_last)
    x, weight, bias, residual, dy = (t[n] for n in ("x", "weight", "bias", "residual", "dy"))
    y, mean, rstd, var, mask = ops.ensemble_batch_norm(x, None, None, weight, bias, residual, True, 1e-5, 2, "relu")
    half_mean, half_var = ops.ensemble_batch_norm_statistics(x, 2)
    half_y, half_mask = ops.ensemble_batch_norm_apply(x, mean, rstd, weight, bias, residual, 2, "relu")
    assert all(map(torch.equal, (half_mean, half_var, half_y, half_mask), (mean, var, y, mask)))
    assert torch.equal(unpack_mask(mask, x), y > 0)
    saved = (dy, x, mean, rstd, weight, bias, mask)
    dx, dweight, dbias, dresidual = ops.ensemble_batch_norm_backward(*saved, True, 2, "relu", True)
    sum_dz, sum_dz_xhat = ops.ensemble_batch_norm_backward_reduce(*saved, 2, "relu")
    half_dx, half_dr = ops.ensemble_batch_norm_backward_apply(
        *saved, sum_dz, sum_dz_xhat, 3.0 * size**2, 2, "relu", True
    )
    assert all(map(torch.equal, (sum_dz, sum_dz_xhat, half_dx, half_dr), (dbias, dweight, dx, dresidual)))


def test_compiles_without_graph_break():
    inputs = make_inputs(2, 2, 9, (3, 3), torch.float32, residual=True)
    options = dict(num_members=2, training=True, activation="relu")
    torch._dynamo.reset()
    compiled = torch.compile(ensemble_batch_norm, fullgraph=True, backend="aot_eager")
    eager, graph = run(ensemble_batch_norm, inputs, **options), run(compiled, inputs, **options)
    for name, value in eager.items():
        torch.testing.assert_close(graph[name], value)


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_for_any_batch_and_memory_format(dynamic, backend):
    torch._dynamo.reset()
    compiled = torch.compile(ensemble_batch_norm, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    options = dict(num_members=2, training=True, activation="relu")
    formats = torch.contiguous_format, torch.channels_last
    for batch, of_x, of_residual in itertools.product((2, 3), formats, formats):
        if backend == "reference" and of_x != of_residual:  # plain PyTorch mixes them, and takes dynamo long
            continue
        inputs = make_inputs(2, batch, 9, (3, 3), torch.float32, residual=True)
        inputs["x"] = inputs["x"].contiguous(memory_format=of_x)
        inputs["residual"] = inputs["residual"].contiguous(memory_format=of_residual)
        eager, graph = run(ensemble_batch_norm, inputs, **options), run(compiled, inputs, **options)
        for name, value in eager.items():
            torch.testing.assert_close(graph[name], value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_gradient_of_the_input_is_rounded_once(dtype):
    """Also where its parts, straight and through the statistics, nearly cancel."""
    inputs, options = make_inputs(3, 4, 5, (2, 2), dtype), {"num_members": 3, "training": True, "activation": "none"}
    inputs["dy"] += 100.0
    found = run(ensemble_batch_norm, inputs, **options)["dx"].double()
    exact = run(by_slices, inputs, dtype=torch.float64, **options)["dx"]
    allowed = 0.5 * torch.finfo(dtype).eps * exact.abs() + 100.0 * 64 * torch.finfo(torch.float32).eps
    assert ((found - exact).abs() <= allowed).all()


def test_reference_agrees_with_plain_pytorch():
    inputs = make_inputs(3, 4, 5, (2, 2), torch.float64)
    _, mean, var = reference.ensemble_batch_norm(inputs["x"], None, None, None, None, None, True, 1e-5, 3, "none")
    for k, rows in enumerate(inputs["x"].chunk(3)):
        torch.testing.assert_close(var[k], rows.var((0, 2, 3), correction=0))
        torch.testing.assert_close(mean[k], rows.mean((0, 2, 3)))
