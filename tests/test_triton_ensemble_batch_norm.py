"""The Triton kernels of ensemble batch norm, in Triton's interpreter, against the reference in float64.

Runs in a pytest process of its own: TRITON_INTERPRET is read when the kernels are imported.

Shapes: K members, B rows a member, C channels; input [K·B, C, *]; per-member tensors [K, C].
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest

pytest.importorskip("triton")

import torch
import torch.nn.functional as F
from accuracy import ACTIVATIONS, STANDALONE

from latephase_kernels.functional import ensemble_batch_norm
from latephase_kernels.ops import registry
from latephase_kernels.ops.relu_mask import mask_shape
from latephase_kernels.reference import ensemble_batch_norm as reference
from latephase_kernels.triton_kernels import ensemble_batch_norm as kernels
from latephase_kernels.triton_kernels import ensemble_batch_norm_resident as resident
from latephase_kernels.triton_kernels.tiles import reduction

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, of the values that overflow
    pytest.mark.usefixtures("triton_backend"),
]

EPS = 1e-5
NAMES = ("y", "input gradient", "weight gradient", "bias gradient", "residual gradient")
CONTIGUOUS, LAST, LAST_3D = torch.contiguous_format, torch.channels_last, torch.channels_last_3d
LAYOUTS = [  # K, shape, memory format
    (2, (6, 5), CONTIGUOUS),
    (3, (6, 4, 1, 1), CONTIGUOUS),
    (2, (6, 3, 7), CONTIGUOUS),
    (2, (4, 5, 7, 9), CONTIGUOUS),
    (2, (4, 5, 7, 9), LAST),
    (3, (6, 3, 2, 5, 3), CONTIGUOUS),
    (2, (4, 6, 2, 4, 3), LAST_3D),
]
SEVERAL_SPLITS = [(2, (4, 2, 110, 112), CONTIGUOUS), (2, (4, 3, 50, 51), LAST)]
FUSIONS = [(False, "none"), (False, "relu"), (True, "none"), (True, "relu"), (False, "silu")]


@pytest.fixture(params=["on chip", "streaming"])
def tier(request, monkeypatch):
    """Send groups that fit on chip to the streaming tier, too."""
    if request.param == "streaming":
        monkeypatch.setattr(resident, "RESIDENT_TILE", 0)


def make(
    num_members, shape, memory_format=CONTIGUOUS, dtype=torch.float32, *, shared=False, residual=True, mean=0.0, seed=0
):
    """Return (input, weight, bias, residual or None, dy, running mean, running variance)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    def activations(offset=0.0):
        return (normal(*shape) + offset).to(dtype).contiguous(memory_format=memory_format)

    parameter = (shape[1],) if shared else (num_members, shape[1])
    statistic = (num_members, shape[1])
    statistics_dtype = reference.accumulation_dtype(dtype)
    return (
        activations(mean),
        (1 + 0.3 * normal(*parameter)).to(statistics_dtype),
        (0.3 * normal(*parameter)).to(statistics_dtype),
        activations() if residual else None,
        activations(),
        (mean + 0.3 * normal(*statistic)).to(statistics_dtype),
        (0.5 + normal(*statistic).square()).to(statistics_dtype),
    )


def with_gradients(function, tensors, dtype=None):
    """Return y and the gradients of input, weight, bias and residual of function(*tensors), in dtype if given."""
    input, weight, bias, residual, dy, running_mean, running_var = (
        t if t is None or dtype is None else t.to(dtype) for t in tensors
    )
    leaves = [t if t is None else t.detach().clone().requires_grad_() for t in (input, weight, bias, residual)]
    y = function(*leaves, running_mean.clone(), running_var.clone())
    return y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], dy)


def op(num_members, training, activation):
    def function(input, weight, bias, residual, running_mean, running_var):
        return ensemble_batch_norm(
            input, running_mean, running_var, weight, bias, training, 0.1, EPS,
            num_members=num_members, residual=residual, activation=activation,
        )  # fmt: skip

    return function


def truth(num_members, training, activation):
    def function(input, weight, bias, residual, running_mean, running_var):
        return reference.ensemble_batch_norm(
            input, running_mean, running_var, weight, bias, residual, training, EPS, num_members, activation
        )[0]

    return function


def pytorch(num_members, training, activation):
    """F.batch_norm on each member's slice."""

    def function(input, weight, bias, residual, running_mean, running_var):
        slices = []
        for k, x in enumerate(input.chunk(num_members)):
            w, b = (p if p.dim() == 1 else p[k] for p in (weight, bias))
            slices.append(F.batch_norm(x, running_mean[k], running_var[k], w, b, training, 0.1, EPS))
        z = torch.cat(slices)
        z = z if residual is None else z + residual
        return ACTIVATIONS[activation](z)

    return function


def sum_scales(num_members, tensors, training):
    """The largest Σ|dy · x̂| and Σ|dy|: what the sums in the gradients of weight and bias are rounded relative to."""
    input, weight, _, _, dy, running_mean, running_var = (t if t is None else t.double() for t in tensors)
    xhat = truth(num_members, training, "none")(input, None, None, None, running_mean, running_var)
    members = 1 if weight.dim() == 1 else num_members
    sums = [t.abs().unflatten(0, (members, -1)).transpose(1, 2).flatten(2).sum(2).max() for t in (dy * xhat, dy)]
    return dict(zip(NAMES[2:4], sums, strict=True))


def check_against_pytorch(num_members, tensors, training, activation):
    """Assert at most twice PyTorch's error plus one rounding at the tensor's scale, for y and every gradient.

    PyTorch adds up in float64 on the CPU; a float32 sum is granted its rounding at the scale of the absolute sum.
    """
    arguments = (num_members, training, activation)
    exact = with_gradients(truth(*arguments), tensors, torch.float64)
    theirs = with_gradients(pytorch(*arguments), tensors)
    ours = with_gradients(op(*arguments), tensors)
    scales = sum_scales(num_members, tensors, training)
    assert ours[0].stride() == tensors[0].stride()
    for name, right, their, our in zip(NAMES, exact, theirs, ours, strict=False):
        assert our.dtype == their.dtype and our.shape == right.shape
        rounding = torch.finfo(our.dtype).eps * scales.get(name, right.abs().max())
        allowed = 2 * (their.double() - right).abs().max() + rounding
        assert (our.double() - right).abs().max() <= allowed, name


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("residual, activation", FUSIONS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_members, shape, memory_format", LAYOUTS, ids=str)
def test_values_and_gradients(num_members, shape, memory_format, dtype, training, residual, activation, tier):
    tensors = make(num_members, shape, memory_format, dtype, residual=residual)
    check_against_pytorch(num_members, tensors, training, activation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_members, shape, memory_format", LAYOUTS[3:5], ids=str)
def test_activations_far_from_zero(num_members, shape, memory_format, dtype, tier):
    input, weight, bias, *others = make(num_members, shape, memory_format, dtype, residual=False)
    for activation in STANDALONE:
        check_against_pytorch(num_members, (input, weight, bias * 4, *others), True, activation)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("num_members, shape, memory_format", LAYOUTS[3:5], ids=str)
def test_float64_is_computed_in_float64(num_members, shape, memory_format, training):
    tensors = make(num_members, shape, memory_format, torch.float64)
    ours = with_gradients(op(num_members, training, "relu"), tensors)
    for right, our in zip(with_gradients(truth(num_members, training, "relu"), tensors), ours, strict=True):
        torch.testing.assert_close(our, right, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_members, shape, memory_format", SEVERAL_SPLITS, ids=str)
def test_reductions_of_several_splits(num_members, shape, memory_format, dtype):
    tensors = make(num_members, shape, memory_format, dtype)
    sizes = kernels._sizes(tensors[0], num_members)
    assert reduction(sizes).splits > 1 and resident.resident_plan(sizes, 1) is None
    check_against_pytorch(num_members, tensors, True, "relu")


@pytest.mark.parametrize("num_members, shape, memory_format", LAYOUTS[3:5], ids=str)
def test_weights_that_all_members_share(num_members, shape, memory_format, tier):
    check_against_pytorch(num_members, make(num_members, shape, memory_format, shared=True), True, "relu")


@pytest.mark.parametrize("num_members, shape, memory_format", LAYOUTS[3:5] + SEVERAL_SPLITS, ids=str)
def test_mean_of_ten_thousand_deviations(num_members, shape, memory_format, tier):
    check_against_pytorch(num_members, make(num_members, shape, memory_format, mean=1e4), True, "none")


@pytest.mark.parametrize("memory_format", [CONTIGUOUS, LAST], ids=str)
def test_without_weight_and_bias(memory_format, tier):
    input = make(2, (4, 3, 5, 3), memory_format)[0]
    y = ensemble_batch_norm(input, None, None, training=True, num_members=2)
    right = reference.ensemble_batch_norm(input.double(), None, None, None, None, None, True, EPS, 2, "none")[0]
    torch.testing.assert_close(y.double(), right, rtol=2e-6, atol=2e-6)


def test_strided_input_and_gradient():
    tensors = list(make(2, (4, 3, 6, 5)))
    right = with_gradients(op(2, True, "relu"), tensors)
    leaf = torch.stack([tensors[0]] * 2, -1)[..., 1].detach().requires_grad_()
    dy = torch.stack([tensors[4]] * 2, -1)[..., 0]
    assert not leaf.is_contiguous() and not dy.is_contiguous()
    y = op(2, True, "relu")(leaf, *tensors[1:4], *tensors[5:])
    assert torch.equal(y, right[0])
    assert torch.equal(torch.autograd.grad(y, leaf, dy)[0], right[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("num_members, shape, memory_format", LAYOUTS[3:5] + SEVERAL_SPLITS[1:], ids=str)
def test_a_broken_member_leaves_the_others_bit_identical(num_members, shape, memory_format, value, tier):
    tensors = make(num_members, shape, memory_format)
    before = with_gradients(op(num_members, True, "relu"), tensors)
    batch = shape[0] // num_members
    tensors[0][batch:] = value  # every member but the first
    after = with_gradients(op(num_members, True, "relu"), tensors)
    rows = (batch, batch, 1, 1, batch)
    assert equal([t[:r] for t, r in zip(before, rows)], [t[:r] for t, r in zip(after, rows)])


def test_nan_passes_the_relu_and_its_gradient(tier):
    tensors = make(2, (4, 3, 5, 3), residual=False)
    tensors[0][0, 0] = float("nan")
    y, dx, *_ = with_gradients(op(2, True, "relu"), tensors)
    assert y[:2, 0].isnan().all() and dx[:2, 0].isnan().all()
    assert y[2:].isfinite().all() and dx[:, 1:].isfinite().all()


@pytest.mark.parametrize("num_members, shape, memory_format", LAYOUTS[3:5] + SEVERAL_SPLITS, ids=str)
def test_permuted_repeated_and_lone_members_are_bit_equal(num_members, shape, memory_format, tier):
    tensors = make(num_members, shape, memory_format)
    found = with_gradients(op(num_members, True, "relu"), tensors)
    assert equal(found, with_gradients(op(num_members, True, "relu"), tensors))

    def flip(t):
        return t.unflatten(0, (num_members, -1)).flip(0).flatten(0, 1).contiguous(memory_format=_format_of(t))

    def _format_of(t):
        return memory_format if t.dim() == len(shape) else CONTIGUOUS

    flipped = with_gradients(op(num_members, True, "relu"), [flip(t) for t in tensors])
    assert equal(found, [flip(t) for t in flipped])

    for k in range(num_members):
        alone = with_gradients(op(1, True, "relu"), [t.chunk(num_members)[k] for t in tensors])
        assert equal([t.chunk(num_members)[k] for t in found], alone)


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("num_members, shape, memory_format", LAYOUTS[3:5] + SEVERAL_SPLITS[:1], ids=str)
def test_halves_compose_to_the_whole(num_members, shape, memory_format, activation, tier):
    ops = {
        name: registry.op(registry.TRITON, f"ensemble_batch_norm{name}")
        for name in ("", "_statistics", "_apply", "_backward", "_backward_reduce", "_backward_apply")
    }
    input, weight, bias, residual, dy, *_ = make(num_members, shape, memory_format)
    y, mean, rstd, var, mask = ops[""](input, None, None, weight, bias, residual, True, EPS, num_members, activation)
    assert equal((mean, var), ops["_statistics"](input, num_members))
    torch.testing.assert_close(rstd, (var + EPS).rsqrt(), rtol=5e-7, atol=0)
    assert equal((y, mask), ops["_apply"](input, mean, rstd, weight, bias, residual, num_members, activation))

    saved = (dy, input, mean, rstd, weight, bias, mask)
    dx, dweight, dbias, dresidual = ops["_backward"](*saved, True, num_members, activation, True)
    sums = ops["_backward_reduce"](*saved, num_members, activation)
    assert equal((dbias, dweight), sums)
    count = float(input.numel() // mean.numel())
    assert equal((dx, dresidual), ops["_backward_apply"](*saved, *sums, count, num_members, activation, True))
    without = ops["_backward_apply"](*saved, *sums, count, num_members, activation, False)
    assert torch.equal(without[0], dx) and without[1].shape == (0,)


@pytest.mark.parametrize("num_members, shape, memory_format", [*LAYOUTS, (2, (4, 12, 2, 2), LAST)], ids=str)
def test_mask_has_one_bit_a_value(num_members, shape, memory_format, tier):
    input, weight, bias, residual, *_ = make(num_members, shape, memory_format)
    y, _, _, _, mask = registry.op(registry.TRITON, "ensemble_batch_norm")(
        input, None, None, weight, bias, residual, True, EPS, num_members, "relu"
    )
    assert list(mask.shape) == mask_shape(input, residual, "relu")
    rows_of_channels = input.dim() == 2 or not input.is_contiguous() or input[0, 0].numel() == 1
    passed = (y.movedim(1, -1) if rows_of_channels else y) > 0
    passed = passed.reshape(-1, shape[1] if rows_of_channels else input[0, 0].numel())
    bits = torch.stack([(mask >> bit) & 1 for bit in range(8)], -1).flatten(1)
    assert torch.equal(bits[:, : passed.shape[1]].bool(), passed)
    assert not bits[:, passed.shape[1] :].any()


@pytest.mark.parametrize("num_members, shape, memory_format", [*LAYOUTS[3:5], SEVERAL_SPLITS[1]], ids=str)
def test_running_statistics_move_in_the_same_kernels(num_members, shape, memory_format, tier):
    for momentum in (0.1, 0.8):
        input, weight, bias, residual, _, mean, var = make(num_members, shape, memory_format)
        batches = torch.tensor([3, 5])
        right = (mean.clone(), var.clone())
        update = registry.op(registry.TRITON, "ensemble_batch_norm_update")
        arguments = (input, mean, var, batches, weight, bias, residual, momentum, EPS, num_members, "relu")
        y, batch_mean, batch_rstd, _ = update(*arguments)
        whole = registry.op(registry.TRITON, "ensemble_batch_norm")
        expected = whole(input, None, None, weight, bias, residual, True, EPS, num_members, "relu")
        for found, right_one in zip((y, batch_mean, batch_rstd), expected):
            assert torch.equal(found, right_one)
        batch_var = expected[3]
        n = input.numel() // mean.numel()
        for found, old, new in zip((mean, var), right, (batch_mean, batch_var * n / (n - 1)), strict=True):
            torch.testing.assert_close(found, old.lerp(new, momentum), rtol=1e-6, atol=1e-7)
        assert batches.tolist() == [4, 6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training, activation", [(True, "relu"), (True, "none"), (False, "relu")])
@pytest.mark.parametrize("num_members, shape, memory_format", LAYOUTS[3:5], ids=str)
def test_output_gain(num_members, shape, memory_format, training, activation, dtype, tier):
    tensors = list(make(num_members, shape, memory_format, dtype, residual=False))
    gain = torch.randn(num_members, shape[1], generator=torch.Generator().manual_seed(1))
    gain[0, 0] = 0
    tensors[3] = gain if activation == "relu" else gain[0]  # in place of a residual; shared by the members
    arguments = (num_members, training, activation)

    def ours(input, weight, bias, gain, mean, var):
        return ensemble_batch_norm(
            input, mean, var, weight, bias, training, 0.1, EPS,
            num_members=num_members, activation=activation, output_gain=gain,
        )  # fmt: skip

    def times_gain(function):
        def gained(input, weight, bias, gain, *statistics):
            y = function(*arguments)(input, weight, bias, None, *statistics)
            return (y * reference.per_row(gain, y)).to(y.dtype)

        return gained

    exact = with_gradients(times_gain(truth), tensors, torch.float64)
    theirs, found = (with_gradients(function, tensors) for function in (times_gain(pytorch), ours))
    scales = {name: scale * gain.abs().max() for name, scale in sum_scales(num_members, tensors, training).items()}
    scales[NAMES[4]] = sum(t.abs().max() * s for t, s in zip(tensors[1:3], scales.values())) / gain.abs().max()
    for name, right, their, our in zip(NAMES, exact, theirs, found, strict=True):
        rounding = torch.finfo(our.dtype).eps * scales.get(name, right.abs().max())
        allowed = 2 * (their.double() - right).abs().max() + rounding
        assert our.dtype == their.dtype and (our.double() - right).abs().max() <= allowed, name


def test_no_rows():
    input = torch.empty(0, 3, 4, 4, requires_grad=True)
    weight = torch.ones(2, 3, requires_grad=True)
    y = ensemble_batch_norm(input, None, None, weight, None, True, num_members=2, activation="relu")
    assert y.shape == input.shape
    y.sum().backward()
    assert input.grad.shape == input.shape and torch.equal(weight.grad, torch.zeros(2, 3))


def test_gradients_can_be_differentiated_again():
    tensors = make(2, (4, 3, 5, 3))
    plain = with_gradients(op(2, True, "relu"), tensors)
    leaves = [t.clone().requires_grad_() for t in tensors[:4]]
    y = op(2, True, "relu")(*leaves, *tensors[5:])
    gradients = torch.autograd.grad(y, leaves, tensors[4], create_graph=True)
    for found, right in zip(gradients, plain[1:], strict=True):
        torch.testing.assert_close(found.detach(), right, rtol=1e-4, atol=1e-5)
    assert torch.autograd.grad(gradients[0].square().sum(), leaves[0])[0].isfinite().all()


@pytest.mark.parametrize("memory_format", [CONTIGUOUS, LAST], ids=str)
def test_opcheck(memory_format):
    input, weight, bias, residual, _, running_mean, running_var = make(2, (4, 3, 3, 3), memory_format)
    leaves = [t.requires_grad_() for t in (weight, bias, residual)]
    for training in (True, False):
        arguments = (input.requires_grad_(), running_mean, running_var, *leaves, training, EPS, 2, "relu")
        torch.library.opcheck(
            registry.op(registry.TRITON, "ensemble_batch_norm"), arguments,
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )  # fmt: skip
