"""rank1_linear on a GPU, natively and in Triton, against float64 on the CPU: needs a GPU."""

import itertools

import pytest
import torch
from cuda_graphs import check_replay
from test_rank1_linear import SHAPES, by_member, choose, make_inputs, naive, run

from latephase_kernels import backend
from latephase_kernels.ops import rank1_linear as module
from latephase_kernels.ops import registry

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGE = [((600, 3), 3, 96, 264), ((402,), 2, 67, 35), ((4096,), 2, 500, 1000), ((96,), 3, 500, 2000)]
OWN = ("y", "dx", "ds", "dr", "dbias")


@pytest.fixture(params=["folded", "by rows", "triton"])
def way(request, monkeypatch):
    """Both native ways for every shape, whatever the rule would choose, and Triton's."""
    if request.param == "triton":
        pytest.importorskip("triton")
    backend.set_backend("triton" if request.param == "triton" else "native")
    choose(monkeypatch, "folded" if request.param == "folded" else "by rows")
    yield request.param
    backend.set_backend("auto")


def on_gpu(inputs, device="cuda"):
    return {name: None if t is None else t.to(device) for name, t in inputs.items()}


def check(inputs):
    """At most twice PyTorch's own error on the same GPU and inputs, plus one output rounding at the tensor's scale."""
    found = run(module.rank1_linear, on_gpu(inputs))
    truth = run(by_member, inputs, dtype=torch.float64)
    plain = [run(function, on_gpu(inputs)) for function in (naive, by_member)]
    for name, value in found.items():
        assert value.dtype == (inputs["x"].dtype if name == "y" else inputs[name[1:]].dtype)
        error, *own = ((t[name].double().cpu() - truth[name]).abs().max().item() for t in (found, *plain))
        rounding = torch.finfo(value.dtype).eps * truth[name].abs().max().item()
        assert error <= 2 * max(own) + rounding, f"{name}: {error}, PyTorch: {own}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE], ids=str)
def test_values_and_gradients(shape, dtype, way):
    for bias in ("none", "shared", "per member"):
        check(make_inputs(*shape, bias=bias, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_parameters_in_either_type_and_shape(dtype, way):
    for bias, parameters in itertools.product(("shared", "per member"), (torch.float32, None)):
        check(make_inputs((24, 5), 3, 40, 24, bias=bias, dtype=dtype, parameters=parameters))


def test_tf32_is_as_good_as_torchs(way):
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        check(make_inputs((384, 4), 3, 128, 96, bias="per member", dtype=torch.float32))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_members_do_not_meet(way):
    """Bit for bit: beside NaN and huge values, and permuted; in Triton alone as well (cuBLAS may choose by K)."""
    for dtype in DTYPES:
        inputs = on_gpu(make_inputs((48, 3), 4, 40, 24, bias="per member", dtype=dtype))
        clean = run(module.rank1_linear, inputs)

        def members(result, count=4):
            return {name: result[name].unflatten(0, (count, -1)) for name in OWN}

        def chosen(order, tensors=inputs):
            return {n: t if n == "weight" else torch.cat([t.chunk(4)[k] for k in order]) for n, t in tensors.items()}

        poisoned = {name: t.clone() for name, t in inputs.items()}
        poisoned["x"].chunk(4)[1][:] = float("nan")
        poisoned["s"][0] = torch.finfo(dtype).max / 4
        beside = members(run(module.rank1_linear, poisoned))
        permuted = members(run(module.rank1_linear, chosen([2, 0, 3, 1])))
        alone = members(run(module.rank1_linear, chosen([2])), 1) if way == "triton" else None
        for name, value in members(clean).items():
            assert torch.equal(value[[2, 3]], beside[name][[2, 3]]), name
            assert torch.equal(value[2], permuted[name][0]), name
            assert alone is None or torch.equal(value[2], alone[name][0]), name
        assert beside["y"][1].isnan().all()


def test_repeats_are_bit_equal(way):
    inputs = on_gpu(make_inputs((1026, 4), 3, 96, 264, bias="per member", dtype=torch.bfloat16))
    first = run(module.rank1_linear, inputs)
    for _ in range(5):
        again = run(module.rank1_linear, inputs)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("K, out, columns", [(3, 24, 40), (5, 33, 500), (2, 7, 3), (9, 130, 785)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_folded_weights_off_alignment(K, out, columns, dtype):
    """The kernels around the products, on storage that starts between vector boundaries."""
    fold, fold_backward = (registry.op(registry.NATIVE, name) for name in ("rank1_fold", "rank1_fold_backward"))
    generator = torch.Generator().manual_seed(0)

    def off(*sizes, dtype=torch.float32):
        values = torch.randn(sizes, generator=generator, dtype=torch.float64).to("cuda", dtype)
        storage = torch.full((values.numel() + 1,), torch.nan, dtype=dtype, device="cuda")
        return storage[1:].view(sizes).copy_(values)

    for weight_dtype in {torch.float32, dtype}:
        weight, s, r = off(out, columns, dtype=weight_dtype), off(K, columns), off(K, out)
        folded, products = off(K, out, columns, dtype=dtype), off(K, out, columns, dtype=dtype)
        fold(weight, s, r, folded)
        w, s64, r64, h = (t.double() for t in (weight, s.unsqueeze(1), r.unsqueeze(2), products))
        torch.testing.assert_close(folded, (w * s64 * r64).to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=0)
        dweight = off(out, columns)
        expected = [dweight.double() + (h * s64 * r64).sum(0), (h * w * r64).sum(1), (h * w * s64).sum(2)]
        found = [dweight, *fold_backward(products, weight, s, r, dweight)]
        again = fold_backward(products, weight, s, r, None)
        for ours, right in zip(found, expected):
            torch.testing.assert_close(ours.double(), right, rtol=1e-5, atol=1e-5 * right.abs().max().item())
        assert torch.equal(again[0], found[1]) and torch.equal(again[1], found[2])


@pytest.mark.parametrize("leading, in_features", [((0,), 3), ((0, 4), 3), ((6, 0), 3), ((6,), 0)], ids=str)
def test_empty(leading, in_features, way):
    inputs = make_inputs(leading, 3, in_features, 4, dtype=torch.float32)
    result, expected = run(module.rank1_linear, on_gpu(inputs)), run(by_member, inputs)
    for name, value in result.items():
        torch.testing.assert_close(value.cpu(), expected[name])


def test_float64_runs_on_torchs_operators():
    for shape in SHAPES[:3]:
        inputs = make_inputs(*shape)
        found, truth = run(module.rank1_linear, on_gpu(inputs)), run(by_member, inputs)
        for name, value in found.items():
            torch.testing.assert_close(value.cpu(), truth[name])


def test_on_a_stream_of_its_own(way):
    inputs = on_gpu(make_inputs((512, 4), 2, 96, 264, bias="per member", dtype=torch.bfloat16))
    expected = run(module.rank1_linear, inputs)
    streams, results = [torch.cuda.Stream() for _ in range(2)], []
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            results.append(run(module.rank1_linear, inputs))
    torch.cuda.synchronize()
    assert all(torch.equal(expected[name], result[name]) for result in results for name in expected)


def test_captured_in_a_cuda_graph(way):
    inputs = on_gpu(make_inputs((256, 3), 3, 96, 40, bias="per member", dtype=torch.bfloat16))
    leaves = [inputs[name].requires_grad_() for name in ("x", "weight", "s", "r", "bias")]

    def step():
        return torch.autograd.grad(module.rank1_linear(*leaves), leaves, inputs["dy"])

    change = torch.randn_like(inputs["dy"])
    check_replay(step, lambda: inputs["dy"].copy_(change))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_runs_on_the_tensors_device(way):
    inputs = make_inputs((64, 3), 2, 40, 24, bias="per member", dtype=torch.float32)
    first, second = (run(module.rank1_linear, on_gpu(inputs, device)) for device in ("cuda:0", "cuda:1"))
    assert all(torch.equal(first[name], second[name].to("cuda:0")) for name in first)
