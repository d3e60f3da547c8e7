"""Ensemble batch norm on awkward data: each member's values as PyTorch's for that member, the others untouched.

On the CPU, and where there is a GPU on it as well. K members, B rows a member, C channels.
"""

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_close

import latephase_kernels as lp
from latephase_kernels.ops.ensemble_batch_norm_gain import normalize_with_gain

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
CONTIGUOUS, LAST = torch.contiguous_format, torch.channels_last
FORMATS = pytest.mark.parametrize("memory_format", [CONTIGUOUS, LAST], ids=["contiguous", "channels_last"])
GIB = 1 << 30


@pytest.fixture(params=DEVICES, autouse=True)
def device(request):
    return request.param


def make(shape, num_members, dtype=torch.float32, memory_format=CONTIGUOUS, seed=0):
    """Return x, weight, bias, dy on the CPU."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    x, dy = (normal(*shape).to(dtype) for _ in range(2))
    if x.dim() == 4:
        x, dy = (t.contiguous(memory_format=memory_format) for t in (x, dy))
    return x, normal(num_members, shape[1]).float(), normal(num_members, shape[1]).float(), dy


def ours(x, weight, bias, num_members, activation):
    return lp.functional.ensemble_batch_norm(
        x, None, None, weight, bias, True, num_members=num_members, activation=activation
    )


def theirs(x, weight, bias, num_members, activation):
    members = zip(x.chunk(num_members), weight, bias, strict=True)
    y = torch.cat([F.batch_norm(rows, None, None, w, b, True) for rows, w, b in members])
    return F.relu(y) if activation == "relu" else y


def with_gradients(function, x, weight, bias, dy, num_members, activation="none", dtype=None, device="cpu"):
    """Return y, dx, dweight, dbias on the CPU; x itself is the leaf's data, strides and all."""
    x, weight, bias, dy = (t if dtype is None else t.to(dtype) for t in (x, weight, bias, dy))
    leaves = [t.to(device).detach().requires_grad_() for t in (x, weight, bias)]
    y = function(*leaves, num_members, activation)
    y.backward(dy.to(device))
    return {"y": y.detach().cpu(), **{f"d{n}": t.grad.cpu() for n, t in zip(("x", "weight", "bias"), leaves)}}


def check(device, tensors, num_members):
    """Values and gradients without activation, by the rule of every op's tests."""
    result = with_gradients(ours, *tensors, num_members, device=device)
    plain = with_gradients(theirs, *tensors, num_members, device=device)
    truth = with_gradients(theirs, *tensors, num_members, dtype=torch.float64)
    assert_close(result, plain, truth)
    return result


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [1, 3, 7, 65])
def test_odd_channels_and_planes_of_seven_by_seven(device, channels, dtype, memory_format):
    """In bfloat16 a row is 98 bytes, so that every other one starts between two words."""
    check(device, make((3 * 5, channels, 7, 7), 3, dtype, memory_format), 3)


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_storage_that_starts_one_element_late(device, dtype, memory_format):
    x, weight, bias, dy = make((2 * 3, 16, 8, 8), 2, dtype, memory_format)
    expected = with_gradients(ours, x, weight, bias, dy, 2, "relu", device=device)

    def late(t):
        storage = torch.full((t.numel() + 1,), float("nan"), dtype=dtype, device=device)
        return storage.as_strided(t.shape, t.stride(), 1).copy_(t)

    found = with_gradients(ours, late(x), weight, bias, late(dy), 2, "relu", device=device)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@FORMATS
def test_channel_slices_and_expanded_gradients(device, memory_format):
    """Of a wider tensor, as in a dense block; the gradient of a mean over positions is expanded."""
    x, weight, bias, dy = make((2 * 3, 24, 6, 6), 2, memory_format=memory_format)
    wide, dy = x.to(device), dy[:, :7, :1, :1].expand(-1, -1, 6, 6).to(device)
    narrow = (wide[:, 5:12], weight[:, 5:12], bias[:, 5:12], dy)
    assert not narrow[0].is_contiguous() and 0 in dy.stride()
    found = with_gradients(ours, *narrow, 2, "relu", device=device)
    expected = with_gradients(ours, *(t.contiguous() for t in narrow), 2, "relu", device=device)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)
    check(device, [t.cpu() for t in narrow], 2)


@pytest.mark.parametrize("members, rows, channels, size", [(300, 2, 257, 2), (3, 30_000, 2, 1)])
def test_more_groups_or_rows_than_a_grid_dimension(device, members, rows, channels, size):
    """K·C or K·B beyond 65535."""
    assert max(members * channels, members * rows) > 65535
    check(device, make((members * rows, channels, size), members), members)


@FORMATS
def test_a_mean_of_ten_thousand_deviations(device, memory_format):
    x, weight, bias, dy = make((2 * 8, 5, 16, 16), 2, memory_format=memory_format)
    check(device, (x + 1e4, weight, bias, dy), 2)


@FORMATS
def test_a_gain_before_the_norm(device, memory_format):
    """Of both signs, and of 0."""
    x, weight, bias, dy = make((3 * 5, 7, 6, 6), 3, memory_format=memory_format)
    gain = torch.randn(3, 7, generator=torch.Generator().manual_seed(1))
    gain[:, ::3] = 0

    def run(function, dtype, device):
        leaves = [t.to(device, dtype, copy=True).requires_grad_() for t in (x, gain, weight, bias)]
        y = function(*leaves)
        y.backward(dy.to(device, dtype))
        gradients = (leaf.grad.cpu() for leaf in leaves)
        return {"y": y.detach().cpu(), **dict(zip(("dx", "dgain", "dweight", "dbias"), gradients))}

    def in_the_norm(x, gain, weight, bias):
        return normalize_with_gain(x, gain, None, weight, bias, None, 1e-5, 3, "none")[0]

    def before(x, gain, weight, bias):
        return theirs(x * gain.repeat_interleave(5, 0)[:, :, None, None], weight, bias, 3, "none")

    plain, truth = run(before, torch.float32, device), run(before, torch.float64, "cpu")
    assert_close(run(in_the_norm, torch.float32, device), plain, truth)


@FORMATS
@pytest.mark.parametrize("row", [0, 7], ids=["first", "last"])
def test_one_row_far_from_the_others(device, row, memory_format):
    """A guess of the mean from the first rows, or from those so far, is then of no use."""
    x, weight, bias, dy = make((2 * 8, 5, 16, 16), 2, memory_format=memory_format)
    x[row::8] += 1e4
    check(device, (x, weight, bias, dy), 2)


@FORMATS
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_broken_value_breaks_its_group_alone(device, value, memory_format):
    x, weight, bias, dy = make((3 * 4, 5, 6, 6), 3, memory_format=memory_format)
    before = with_gradients(ours, x, weight, bias, dy, 3, "relu", device=device)
    x[5, 2, 1, 1] = value
    after = with_gradients(ours, x, weight, bias, dy, 3, "relu", device=device)
    plain = with_gradients(theirs, x, weight, bias, dy, 3, "relu", device=device)
    for name in ("y", "dx"):
        others = torch.ones(12, 5, dtype=torch.bool)
        others[4:8, 2] = False
        assert torch.equal(before[name][others], after[name][others]), name
        assert torch.equal(after[name].isnan(), plain[name].isnan()), name
        assert after[name][4:8, 2].isnan().all(), name


@FORMATS
def test_float16_near_its_largest_value(device, memory_format):
    """Squares and sums leave float16 by far; an output beyond 65504 is infinite where PyTorch's is."""
    x, weight, bias, dy = make((2 * 4, 5, 6, 6), 2, torch.float16, memory_format)
    x = (65504 - 1000 * x.float().abs()).half().copysign(x)
    check(device, (x, weight, bias, dy), 2)
    weight[1] *= 1e5
    found = with_gradients(ours, x, weight, bias, dy, 2, device=device)["y"]
    plain = with_gradients(theirs, x, weight, bias, dy, 2, device=device)["y"]
    assert 0 < found.isinf().sum() < found.numel()
    assert torch.equal(found.isinf(), plain.isinf()) and found[:4].isfinite().all()


@FORMATS
@pytest.mark.parametrize("zero", [0.0, -0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
def test_the_relu_stops_both_zeros(device, dtype, zero, with_residual, memory_format):
    """Weight and bias of zero: every value before the ReLU is +0 or −0, and no gradient passes, as in PyTorch."""
    x, weight, bias, dy = (t.to(device) for t in make((2 * 3, 4, 5, 5), 2, dtype, memory_format))
    weight, bias = torch.zeros_like(weight), torch.full_like(bias, zero)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    residual = torch.full_like(x, zero).detach().requires_grad_() if with_residual else None
    y = lp.functional.ensemble_batch_norm(
        *(x, None, None, weight, bias, True), num_members=2, residual=residual, activation="relu"
    )
    y.backward(dy)
    assert not y.any()
    for leaf in (*leaves, *([residual] if with_residual else [])):
        assert not leaf.grad.any()


@FORMATS
def test_more_elements_than_an_int32_counts(device, memory_format):
    """Beyond 2³¹ in bfloat16: 4 GiB a tensor, so on a GPU with room for it; the last rows are as those rows alone."""
    if device == "cpu" or torch.cuda.mem_get_info()[0] < 30 * GIB:
        pytest.skip("needs a GPU with 30 GiB free")
    K, B, C, size = 5, 33, 256, 226
    x = torch.randn(K * B, C, size, size, device=device, dtype=torch.bfloat16).contiguous(memory_format=memory_format)
    assert x.numel() > 2**31
    last = x[-B:].clone(memory_format=torch.preserve_format).requires_grad_()
    weight, bias = (torch.randn(K, C, device=device) for _ in range(2))
    y = ours(x.requires_grad_(), weight, bias, K, "relu")
    expected = ours(last, weight[-1:], bias[-1:], 1, "relu")
    assert torch.equal(y[-B:], expected)
    y.backward(y.detach())
    expected.backward(expected.detach())
    assert torch.equal(x.grad[-B:], last.grad)
