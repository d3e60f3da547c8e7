"""The Triton kernels of member gain, in Triton's interpreter, against the reference in float64.

Runs in a pytest process of its own: TRITON_INTERPRET is read when the kernels are imported.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest

pytest.importorskip("triton")

import torch

from latephase_kernels.functional import member_gain
from latephase_kernels.ops import registry
from latephase_kernels.reference import member_gain as reference
from latephase_kernels.triton_kernels import member_gain as kernels
from latephase_kernels.triton_kernels.tiles import reduction

pytestmark = pytest.mark.usefixtures("triton_backend")

CONTIGUOUS, LAST, LAST_3D = torch.contiguous_format, torch.channels_last, torch.channels_last_3d
LAYOUTS = [  # K, shape, channel_dim, memory format
    (2, (6, 5), 1, CONTIGUOUS),
    (3, (6, 4, 1, 1), 1, CONTIGUOUS),
    (2, (6, 3, 7), 1, CONTIGUOUS),
    (2, (6, 3, 7), 2, CONTIGUOUS),
    (2, (4, 5, 7, 9), 1, CONTIGUOUS),
    (2, (4, 5, 7, 9), 1, LAST),
    (2, (4, 5, 3, 2), 2, CONTIGUOUS),
    (2, (4, 5, 3, 2), 3, LAST),
    (2, (4, 6, 2, 4, 3), 1, LAST_3D),
]
SEVERAL_SPLITS = [(2, (4, 2, 110, 112), 1, CONTIGUOUS), (2, (4, 3, 50, 51), 1, LAST), (2, (4, 2600, 3), 2, CONTIGUOUS)]


def make(num_members, shape, channel_dim, memory_format=CONTIGUOUS, dtype=torch.float32, *, shared=False):
    """Return (input, gain, bias, dy)."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    input, dy = (normal(*shape).to(dtype).contiguous(memory_format=memory_format) for _ in range(2))
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    channels = shape[channel_dim]
    bias = normal(channels) if shared else normal(num_members, channels)
    return input, normal(num_members, channels).to(parameters), bias.to(parameters), dy


def with_gradients(function, tensors, channel_dim, activation, dtype=None):
    """Return y and the gradients of input, gain and bias, in dtype if given."""
    *inputs, dy = (t if t is None or dtype is None else t.to(dtype) for t in tensors)
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
    y = function(*leaves, channel_dim=channel_dim, activation=activation)
    return y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], dy)


def check(num_members, tensors, channel_dim, activation):
    """Allow two roundings at the tensor's scale, and for sums of n values √n / 4 times as much."""
    exact = with_gradients(reference.member_gain, tensors, channel_dim, activation, torch.float64)
    ours = with_gradients(member_gain, tensors, channel_dim, activation)
    assert ours[0].stride() == tensors[0].stride() and ours[0].dtype == tensors[0].dtype
    n = tensors[0].numel() // tensors[1].numel()
    for right, our, values in zip(exact, ours, (1, 1, n, n)):
        allowed = 2 * torch.finfo(our.dtype).eps * right.abs().max() * max(1, values**0.5 / 4)
        assert (our.double() - right).abs().max() <= allowed


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_members, shape, channel_dim, memory_format", LAYOUTS, ids=str)
def test_values_and_gradients(num_members, shape, channel_dim, memory_format, dtype, activation):
    tensors = make(num_members, shape, channel_dim, memory_format, dtype)
    check(num_members, tensors, channel_dim, activation)
    input, gain, _, dy = tensors
    check(num_members, (input, gain, None, dy), channel_dim, activation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_members, shape, channel_dim, memory_format", SEVERAL_SPLITS, ids=str)
def test_several_splits(num_members, shape, channel_dim, memory_format, dtype):
    tensors = make(num_members, shape, channel_dim, memory_format, dtype, shared=True)
    assert reduction(kernels._sizes(*tensors[:2], channel_dim)).splits > 1
    check(num_members, tensors, channel_dim, "relu")


@pytest.mark.parametrize("num_members, shape, channel_dim, memory_format", LAYOUTS[4:6], ids=str)
def test_float64_is_computed_in_float64(num_members, shape, channel_dim, memory_format):
    tensors = make(num_members, shape, channel_dim, memory_format, torch.float64)
    ours = with_gradients(member_gain, tensors, channel_dim, "relu")
    for right, our in zip(with_gradients(reference.member_gain, tensors, channel_dim, "relu"), ours, strict=True):
        torch.testing.assert_close(our, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_members, shape, channel_dim, memory_format", LAYOUTS[4:6] + SEVERAL_SPLITS, ids=str)
def test_permuted_repeated_lone_and_poisoned_members_are_bit_equal(num_members, shape, channel_dim, memory_format):
    tensors = make(num_members, shape, channel_dim, memory_format)
    found = with_gradients(member_gain, tensors, channel_dim, "relu")
    assert equal(found, with_gradients(member_gain, tensors, channel_dim, "relu"))

    def member(t, k):
        return t.chunk(num_members)[k]

    flipped = [torch.cat([member(t, 1), member(t, 0)]) for t in tensors]
    flipped = with_gradients(member_gain, flipped, channel_dim, "relu")
    for k in range(num_members):
        alone = with_gradients(member_gain, [member(t, k) for t in tensors], channel_dim, "relu")
        assert equal([member(t, k) for t in found], alone)
        assert equal([member(t, 1 - k) for t in flipped], alone)
    member(tensors[0], 1)[:] = float("nan")
    poisoned = with_gradients(member_gain, tensors, channel_dim, "relu")
    assert equal([member(t, 0) for t in found], [member(t, 0) for t in poisoned])
    assert member(poisoned[0], 1).isnan().all() and member(poisoned[2], 1).isnan().all()
    assert torch.equal(member(poisoned[3], 1), with_gradients(member_gain, tensors, channel_dim, "none")[3][1:])


def test_strided_input_and_gradient():
    tensors = make(2, (4, 3, 6, 5), 1)
    right = with_gradients(member_gain, tensors, 1, "relu")
    leaf = torch.stack([tensors[0]] * 2, -1)[..., 1].detach().requires_grad_()
    y = member_gain(leaf, *tensors[1:3], activation="relu")
    assert torch.equal(y, right[0])
    dy = torch.stack([tensors[3]] * 2, -1)[..., 0]
    assert not leaf.is_contiguous() and not dy.is_contiguous()
    assert torch.equal(torch.autograd.grad(y, leaf, dy)[0], right[1])


def test_no_rows():
    tensors = make(2, (0, 3, 4), 1)
    y, dx, dgain, dbias = with_gradients(member_gain, tensors, 1, "relu")
    assert y.shape == dx.shape == (0, 3, 4)
    assert torch.equal(dgain, torch.zeros(2, 3)) and torch.equal(dbias, torch.zeros(2, 3))


@pytest.mark.parametrize("memory_format", [CONTIGUOUS, LAST], ids=str)
def test_opcheck(memory_format):
    input, gain, bias, dy = make(2, (4, 3, 3, 3), 1, memory_format)
    leaves = [t.clone().requires_grad_() for t in (input, gain, bias)]
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(registry.op(registry.TRITON, "member_gain"), (*leaves, 1, "relu"), test_utils=utils)
    backward = registry.op(registry.TRITON, "member_gain_backward")
    torch.library.opcheck(backward, (dy, input, gain, bias, 1, "relu"), test_utils=utils)


@pytest.mark.parametrize("channel_dim", [1, 3])
def test_in_place_is_bit_identical(channel_dim):
    x, gain, bias, dy = make(2, (4, 5, 3, 5), channel_dim)
    rest = (gain, bias, channel_dim, "relu")
    y, (dx, *sums) = kernels.member_gain(x, *rest), kernels.member_gain_backward(dy, x, *rest)
    into = (registry.op(registry.TRITON, f"member_gain{name}_into") for name in ("_backward", ""))
    sums_in_place = next(into)(dy, x, *rest, dy)
    next(into)(x, *rest, x)
    assert torch.equal(x, y) and torch.equal(dy, dx)
    assert all(torch.equal(*pair) for pair in zip(sums_in_place, sums))
