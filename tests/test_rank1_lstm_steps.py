"""The time loop of rank1_lstm: the CPU's kernels against PyTorch's own operators in float64."""

import pytest
import torch

import latephase_kernels as lp
from latephase_kernels.ops import rank1_lstm_steps as module
from latephase_kernels.reference.precision import accumulation_dtype

FORWARD = torch.ops.latephase_kernels.rank1_lstm_steps.default
BACKWARD = torch.ops.latephase_kernels.rank1_lstm_steps_backward.default
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def make(members, steps, batch, units, dtype):
    """Arguments of both directions: gates, h0, c0, weight, gains (some 0), dy and dc_n; in float64 as in dtype."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(members, steps, batch, 4 * units), (members * batch, units), (members * batch, units)]
    shapes += [(4 * units, units), (members, units), (members, 4 * units)]
    shapes += [(steps, members * batch, units), (members * batch, units)]
    tensors = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
    tensors[3] /= units**0.5
    tensors[4].flatten()[::5] = 0
    tensors[5].flatten()[::4] = 0
    return [t.to(dtype) for t in tensors]


def run(forward, backward, tensors, *, with_dy=True, with_dc_n=True):
    gates, h0, c0, weight, s, r, dy, dc_n = tensors
    gates = gates.clone()
    output, cells = forward(gates, h0, c0, weight, s, r)
    gradients = (dy if with_dy else None, dc_n if with_dc_n else None)
    return output, cells, gates, *backward(gates, cells, *gradients, c0, weight, s, r)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 4, 2, 19), (2, 3, 70, 33)], ids=str)
def test_values(sizes, dtype):
    """At most twice the error of PyTorch's operators in this type, and a rounding at each tensor's scale."""
    tensors = make(*sizes, dtype)
    exact = [t.double() for t in tensors]
    for with_dy, with_dc_n in ((True, True), (True, False), (False, True)):
        options = {"with_dy": with_dy, "with_dc_n": with_dc_n}
        found = run(FORWARD, BACKWARD, tensors, **options)
        plain = run(module._steps, module._steps_backward, tensors, **options)
        truth = run(module._steps, module._steps_backward, exact, **options)
        for value, other, true in zip(found, plain, truth, strict=True):
            assert value.dtype == other.dtype and value.shape == other.shape
            roundings = 16 if dtype == torch.float64 else 2
            rounding = roundings * torch.finfo(dtype).eps * true.abs().max()
            assert (value - true).abs().max() <= 2 * (other - true).abs().max() + rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_activations(dtype):
    """sigmoid, tanh: a few roundings off at any size that is no denormal; ±∞ and NaN as PyTorch's."""
    ends = torch.tensor([0.0, -0.0, 1e-30, -1e-6, 0.6249, 0.6251, -0.625, 1e30, float("inf"), -float("inf")])
    z = torch.cat([ends, torch.linspace(-100, 100, 4001), torch.linspace(-1, 1, 1000), torch.tensor([float("nan")])])
    z = z.to(dtype)
    gates = z.repeat(4).view(1, 1, 1, -1)
    zeros = torch.zeros(1, len(z), dtype=dtype)
    FORWARD(gates, zeros, zeros, torch.zeros(4 * len(z), len(z), dtype=dtype), zeros, zeros.repeat(1, 4))
    for found, function in zip(gates.view(4, -1), (torch.sigmoid, torch.sigmoid, torch.tanh, torch.sigmoid)):
        truth = function(z.double()).to(dtype)
        tiny = torch.finfo(dtype).smallest_normal
        torch.testing.assert_close(found, truth, rtol=4 * torch.finfo(dtype).eps, atol=tiny, equal_nan=True)
        assert torch.equal(found[z.isinf()], truth[z.isinf()])


def test_same_loop_without_kernels():
    tensors = make(2, 3, 4, 5, torch.float32)
    lp.set_backend("reference")
    try:
        plain = run(module.run_steps, module.run_steps_backward, tensors)
    finally:
        lp.set_backend("auto")
    for value, other in zip(run(module.run_steps, module.run_steps_backward, tensors), plain, strict=True):
        torch.testing.assert_close(value, other)


def test_threads_do_not_change_a_bit():
    """Of the steps; the products are PyTorch's, and of zeros here."""
    tensors = make(3, 4, 9, 300, torch.float32)
    tensors[3].zero_()
    torch.set_num_threads(1)
    one = run(FORWARD, BACKWARD, tensors)
    torch.set_num_threads(2)
    two = run(FORWARD, BACKWARD, tensors)
    assert all(torch.equal(*pair) for pair in zip(one, two, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    gates, h0, c0, weight, s, r, dy, _ = make(2, 3, 4, 5, dtype)
    torch.library.opcheck(FORWARD, (gates, h0, c0, weight, s, r))
    cells = torch.zeros(3, 8, 5, dtype=accumulation_dtype(dtype))
    torch.library.opcheck(BACKWARD, (gates, cells, dy, None, c0, weight, s, r))


def test_wrong_arguments():
    gates, h0, c0, weight, s, r, dy, _ = make(2, 3, 4, 5, torch.float32)
    cells = torch.zeros(3, 8, 5)
    forward = [
        ("gates must be contiguous, .K, T, B, 4H.", (gates[..., :19], h0, c0, weight, s, r)),
        ("gates must have at least one step", (gates[:, :0].contiguous(), h0, c0, weight, s, r)),
        ("h0 must be .K·B, H.", (gates, h0[:7], c0, weight, s, r)),
        ("c0 must be .8, 5.", (gates, h0, c0[:7], weight, s, r)),
        ("weight must be .20, 5.", (gates, h0, c0, weight.t(), s, r)),
        ("input_gain must be .2, 5.", (gates, h0, c0, weight, r, r)),
        ("output_gain must be .2, 20.", (gates, h0, c0, weight, s, s)),
    ]
    backward = [
        ("cells must be .T, K·B, H. of the accumulation type", (gates, cells[:2], dy, None, c0, weight, s, r)),
        ("dc_n must be .K·B, H.", (gates, cells, dy, c0[:1], c0, weight, s, r)),
        ("dy must be .T, K·B, H. of gates' type", (gates, cells, dy.double(), None, c0, weight, s, r)),
    ]
    for op, wrong in ((FORWARD, forward), (BACKWARD, backward)):
        for message, arguments in wrong:
            with pytest.raises(RuntimeError, match="rank1_lstm: " + message):
                op(*arguments)
