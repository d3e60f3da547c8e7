"""The Triton time loop of the rank-1 LSTM, in Triton's interpreter, against nn.LSTM in float64: the op's own tests.

Runs in a pytest process of its own: TRITON_INTERPRET is read when the kernels are imported.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest

pytest.importorskip("triton")

import test_rank1_lstm as op_tests
import torch

from latephase_kernels.ops import rank1_lstm_steps as op
from latephase_kernels.ops import registry
from latephase_kernels.triton_kernels import rank1_lstm as kernels

pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered"),  # exp(large): σ is 0 or 1 there
    pytest.mark.usefixtures("triton_backend"),
]


@pytest.mark.parametrize("bias", ["shared", "own", "none"])
@pytest.mark.parametrize("members, batch", [(3, 2), (1, 3)])
def test_every_member_is_an_lstm_with_its_own_weights(members, batch, bias):
    op_tests.test_every_member_is_an_lstm_with_its_own_weights(members, batch, bias)


@pytest.mark.parametrize("gains", ["same", "float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_as_good_as_pytorch(dtype, gains):
    op_tests.test_low_precision_is_as_good_as_pytorch(dtype, gains)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_cells_gather_small_increments(dtype):
    op_tests.test_cells_gather_small_increments(dtype)


def test_members_are_isolated():
    op_tests.test_members_are_isolated()


def test_strides_and_repeated_backward():
    op_tests.test_strides_and_repeated_backward()


def make_steps(members, steps, batch, units, dtype):
    """Arguments of both ops; gates before and after their activations."""
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes):
        return torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype)

    rows = members * batch
    states, weight = (normal(rows, units), normal(rows, units)), normal(4 * units, units)
    return normal(members, steps, batch, 4 * units), *states, weight, normal(members, units), normal(members, 4 * units)


def run_steps(steps, steps_backward, arguments, dy):
    """Return what both directions of a time loop return."""
    gates, h0, c0, *parameters = (t.clone() for t in arguments)
    output, cells = steps(gates, h0, c0, *parameters)
    return gates, output, cells, *steps_backward(gates, cells, dy, None, c0, *parameters)


def test_several_tiles(monkeypatch):
    """More rows and units than a tile has, in float64 against the loop of PyTorch's own operators."""
    assert (kernels.step_tile(torch.float64, "ieee", 33, 40)[:3]) == (32, 16, 16)
    arguments = make_steps(1, 2, 33, 40, torch.float64)
    dy = torch.randn(2, 33, 40, dtype=torch.float64)
    found = run_steps(kernels.rank1_lstm_steps, kernels.rank1_lstm_steps_backward, arguments, dy)
    expected = run_steps(op._steps, op._steps_backward, arguments, dy)
    for ours, right in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-9)


def test_small_values_keep_their_digits():
    """tanh of small gates, in float32, to its last digits."""
    arguments = [t * 1e-4 for t in make_steps(2, 1, 2, 16, torch.float32)]
    gates, _, *rest = (t.clone() for t in arguments)
    kernels.rank1_lstm_steps(gates, torch.zeros_like(rest[0]), *rest)
    right = arguments[0][..., 32:48].double().tanh()
    assert ((gates[..., 32:48] - right) / right).abs().max() < 4 * torch.finfo(torch.float32).eps


def test_lone_and_repeated_members_are_bit_equal():
    arguments = make_steps(3, 2, 2, 6, torch.float32)
    dy = torch.randn(2, 6, 6)
    loops = kernels.rank1_lstm_steps, kernels.rank1_lstm_steps_backward
    whole, again = run_steps(*loops, arguments, dy), run_steps(*loops, arguments, dy)
    gates, h0, c0, weight, *gains = arguments
    lone = run_steps(*loops, [*(t.chunk(3)[1] for t in (gates, h0, c0)), weight, *(t[1:2] for t in gains)], dy[:, 2:4])
    for i, (one, other, alone) in enumerate(zip(whole, again, lone)):
        assert torch.equal(one, other)
        assert torch.equal(one[:, 2:4] if i in (1, 2) else one.chunk(3)[1], alone)


def test_opcheck():
    gates, h0, c0, *parameters = make_steps(2, 2, 1, 3, torch.float32)
    utils = ("test_schema", "test_faketensor")
    steps, backward = (registry.op(registry.TRITON, f"rank1_lstm_steps{end}") for end in ("", "_backward"))
    torch.library.opcheck(steps, (gates, h0, c0, *parameters), test_utils=utils)
    _, cells = steps(gates, h0, c0, *parameters)
    torch.library.opcheck(backward, (gates, cells, torch.randn(2, 2, 3), None, c0, *parameters), test_utils=utils)
