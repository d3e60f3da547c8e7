"""rank1_lstm on a GPU, its time loop natively and in Triton, against float64 on the CPU: needs a GPU."""

import pytest
import torch
from cuda_graphs import check_replay
from test_rank1_lstm import plain_lstm

from latephase_kernels import backend
from latephase_kernels.functional import rank1_lstm
from latephase_kernels.ops import registry

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = [(1, 1, 1, 1, 1), (3, 5, 2, 4, 6), (2, 4, 5, 7, 33), (4, 3, 32, 20, 64), (2, 3, 70, 16, 100)]  # K, T, B, in, H


@pytest.fixture(params=["native", "triton"], autouse=True)
def backend_name(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    backend.set_backend(request.param)
    yield request.param
    backend.set_backend("auto")


def make_arguments(K, T, B, C, H, *, bias="own", dtype=torch.float32, parameters=None, seed=0):
    """The op's ten arguments on the CPU; gains of either sign, some zero."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(T, K * B, C), (K * B, H), (K * B, H), (4 * H, C), (4 * H, H), (K, C), (K, 4 * H), (K, H), (K, 4 * H)]
    shapes += {"shared": [(4 * H,)], "own": [(K, 4 * H)], "none": []}[bias]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    for weight in tensors[3:5]:
        weight /= H**0.5
    for gain in tensors[5:9]:
        gain.flatten()[::5] = 0
    tensors = [t.to(parameters or dtype) if i >= 3 else t.to(dtype) for i, t in enumerate(tensors)]
    return tensors + [None] * (bias == "none")


def run(function, arguments, dtype=None, device="cuda"):
    """Return every output, and the gradients of a loss of all of them."""
    leaves = [None if t is None else t.detach().to(device, dtype or t.dtype, copy=True) for t in arguments]
    leaves = [None if t is None else t.requires_grad_() for t in leaves]
    y, h, c = function(leaves)
    loss = y.double().cos().sum() + (h.double() * c.double()).sum()
    return [t.detach() for t in (y, h, c)] + list(torch.autograd.grad(loss, [t for t in leaves if t is not None]))


def ours(leaves):
    return rank1_lstm(*leaves)


def formula(leaves):
    """The plain formula, a step at a time, in the arguments' type."""
    x, h, c, weight_ih, weight_hh, *gains, bias = leaves
    batch = len(h) // len(gains[0])
    s_ih, r_ih, s_hh, r_hh = (gain.repeat_interleave(batch, 0) for gain in gains)
    shift = 0 if bias is None else bias if bias.dim() == 1 else bias.repeat_interleave(batch, 0)
    outputs = []
    for x_t in x:
        z = ((x_t * s_ih) @ weight_ih.T) * r_ih + ((h * s_hh) @ weight_hh.T) * r_hh + shift
        i, f, g, o = z.chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    return torch.stack(outputs), h, c


def check(*sizes, dtype, **options):
    """At most twice PyTorch's own error on the same GPU and inputs, plus one output rounding at the tensor's scale.

    Over several draws together: of a few values the largest error is a matter of luck.
    """
    draws = []
    for seed in range(4):
        arguments = make_arguments(*sizes, dtype=dtype, seed=seed, **options)
        own_type = [None if t is None else t.to(dtype) for t in arguments]
        truth = run(plain_lstm, arguments, torch.float64, "cpu")
        found = [run(ours, arguments), *(run(function, own_type) for function in (plain_lstm, formula))]
        draws.append([torch.tensor([_distance(t, right) for t, right in zip(each, truth)]) for each in found])
        roundings = [torch.finfo(t.dtype).eps * right.abs().max() for t, right in zip(found[0], truth)]
        draws[-1].append(torch.stack(roundings))
    error, lstm, plain, rounding = (torch.stack(each).amax(0) for each in zip(*draws))
    allowed = 2 * torch.maximum(lstm, plain) + rounding
    assert (error <= allowed).all(), (error.tolist(), allowed.tolist())


def _distance(found, right):
    return (found.double().cpu() - right).abs().max().nan_to_num(torch.inf).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_values_and_gradients(sizes, dtype):
    check(*sizes, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parameters_in_either_type_and_shape(dtype):
    for bias in ("none", "shared", "own"):
        check(3, 4, 5, 7, 12, bias=bias, dtype=dtype)
    check(3, 4, 5, 7, 12, dtype=dtype, parameters=torch.float32)


def test_members_do_not_meet():
    """A member's values and gradients are the same bits beside NaN and huge values."""
    for dtype in DTYPES:
        clean = make_arguments(4, 5, 3, 8, 24, dtype=dtype)
        dirty = [t.clone() for t in clean]
        dirty[0].unflatten(1, (4, -1))[:, 1] = float("nan")
        dirty[7][0] = torch.finfo(dtype).max / 4
        first, second = run(ours, clean), run(ours, dirty)
        for i in (0, 3):  # sequences: the members are in dim 1
            first[i], second[i] = first[i].transpose(0, 1), second[i].transpose(0, 1)
        for i, (one, other) in enumerate(zip(first, second)):
            if i in (6, 7):  # the shared weights' gradients
                continue
            assert torch.equal(one.unflatten(0, (4, -1))[2:], other.unflatten(0, (4, -1))[2:]), i


def test_the_time_loop_off_alignment():
    """Storage that starts between vector boundaries, and no gradients from behind the end."""

    def off(tensor):
        storage = torch.full((tensor.numel() + 1,), torch.nan, dtype=tensor.dtype, device="cuda")
        return storage[1:].view(tensor.shape).copy_(tensor)

    namespace = {"native": registry.NATIVE, "triton": registry.TRITON}[backend.backend_for(torch.zeros(1).cuda())]
    steps, steps_backward = (registry.op(namespace, f"rank1_lstm_steps{end}") for end in ("", "_backward"))
    for dtype in DTYPES:
        generator = torch.Generator().manual_seed(0)
        K, T, B, H = 3, 4, 5, 24
        shapes = [(K, T, B, 4 * H), (K * B, H), (K * B, H), (4 * H, H), (K, H), (K, 4 * H), (T, K * B, H)]
        straight = [torch.randn(shape, generator=generator).to("cuda", dtype) for shape in shapes]
        results = []
        for gates, h0, c0, *parameters, dy in ([t.clone() for t in straight], [off(t) for t in straight]):
            output, cells = steps(gates, h0, c0, *parameters)
            results.append([output, cells, gates, *steps_backward(gates, cells, dy, None, c0, *parameters)])
        assert all(torch.equal(one, other) for one, other in zip(*results))
        assert not any(t.isnan().any() for t in results[0])


def test_repeats_are_bit_equal():
    arguments = make_arguments(4, 10, 32, 20, 64, dtype=torch.bfloat16)
    first = run(ours, arguments)
    for _ in range(3):
        assert all(torch.equal(*pair) for pair in zip(first, run(ours, arguments)))


def test_no_rows():
    arguments = [t[:, :0] if i == 0 else t[:0] if i < 3 else t for i, t in enumerate(make_arguments(2, 3, 2, 4, 6))]
    y, h, c, *gradients = run(ours, arguments)
    assert y.shape == (3, 0, 6) and h.shape == c.shape == (0, 6)
    assert all(gradient.eq(0).all() for gradient in gradients)


def test_on_streams_of_their_own():
    arguments = make_arguments(3, 6, 8, 16, 40, dtype=torch.bfloat16)
    expected, results = run(ours, arguments), []
    for stream in [torch.cuda.Stream() for _ in range(2)]:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            results.append(run(ours, arguments))
    torch.cuda.synchronize()
    assert all(torch.equal(*pair) for result in results for pair in zip(expected, result))


def test_captured_in_a_cuda_graph():
    leaves = [t.cuda().requires_grad_() for t in make_arguments(3, 6, 8, 16, 40, dtype=torch.bfloat16)]
    dy = torch.randn(6, 24, 40, dtype=torch.bfloat16, device="cuda")

    def step():
        return torch.autograd.grad(rank1_lstm(*leaves)[0], leaves, dy)

    change = torch.randn_like(dy)
    check_replay(step, lambda: dy.copy_(change))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_runs_on_the_tensors_device():
    arguments = make_arguments(2, 3, 4, 8, 24)
    first, second = (run(ours, arguments, device=device) for device in ("cuda:0", "cuda:1"))
    assert all(torch.equal(one, other.to("cuda:0")) for one, other in zip(first, second))
