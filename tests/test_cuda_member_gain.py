"""The compiled CUDA kernels of member_gain against the float64 reference on the CPU: needs a GPU."""

import pytest
import torch
from cuda_graphs import check_replay
from cuda_norm_cases import normal

from latephase_kernels.ops import registry
from latephase_kernels.ops.member_gain import member_gain
from latephase_kernels.reference import member_gain as reference

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("native_backend"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
LAYOUTS = ("contiguous", "channels_last")

# (K, shape, channel_dim): sizes that are multiples of nothing, runs of one value, short, long and badly aligned ones,
# one split and many, channels inside, many members.
SHAPES = (
    (3, (15, 7), 1),
    (2, (66, 64), 1),
    (2, (6, 5, 3), 1),
    (4, (32, 16, 8, 8), 1),
    (3, (12, 13, 7, 7), 1),
    (2, (12, 72, 14, 14), 1),
    (2, (4, 3, 129, 131), 1),
    (2, (6, 4, 15, 15), 1),
    (2, (32, 8, 64, 64), 1),
    (2, (4, 6, 3, 4, 10), 1),
    (2, (6, 197, 96), 2),
    (2, (4, 5, 20, 30), 2),
    (2, (2048, 40, 3), 1),
    (1, (300, 1, 5, 3), 1),
    (70000, (70000, 3, 2), 1),
)


def case_of(K, shape, channel_dim, dtype, layout, bias="per member", parameter_dtype=torch.float32) -> dict:
    C = shape[channel_dim]
    parameters = {"none": None, "shared": (C,), "per member": (K, C)}[bias]
    return {
        "input": normal(shape, dtype, layout, seed=1),
        "gain": normal((K, C), parameter_dtype, seed=2),
        "bias": None if parameters is None else normal(parameters, parameter_dtype, seed=3),
        "dy": normal(shape, dtype, layout, seed=4),
    }


def run(case: dict, channel_dim: int, activation: str) -> dict:
    """Output and gradients of the op on the GPU."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in case.items() if name != "dy" and t is not None}
    y = member_gain(*leaves.values(), channel_dim=channel_dim, activation=activation)
    grads = torch.autograd.grad(y, list(leaves.values()), case["dy"])
    return {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(leaves, grads)}}


def _expected(case: dict, channel_dim: int, activation: str, passed: torch.Tensor) -> dict:
    """The same in float64 on the CPU, through the ReLU mask that the op found (it may differ within rounding of 0)."""
    double = {name: None if t is None else t.detach().double().cpu() for name, t in case.items()}
    leaves = {name: t.requires_grad_() for name, t in double.items() if name != "dy" and t is not None}
    z = reference.member_gain(double["input"], double["gain"], double["bias"], channel_dim, "none")
    gate = passed.double().cpu() if activation == "relu" else torch.ones_like(z)
    grads = torch.autograd.grad(z, list(leaves.values()), double["dy"] * gate)
    y = z.relu() if activation == "relu" else z
    return {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(leaves, grads)}}


def check(case: dict, channel_dim: int, activation: str) -> None:
    actual = run(case, channel_dim, activation)
    expected = _expected(case, channel_dim, activation, actual["y"] > 0)
    n = max(1, case["input"].numel() // case["gain"].numel())
    assert actual["y"].dtype == case["input"].dtype and actual["y"].stride() == case["input"].stride()
    for name, value in actual.items():
        error = (value.double().cpu() - expected[name]).abs()
        rounding = ROUNDING[value.dtype]
        if name in ("dgain", "dbias"):
            rounding = max(rounding, ROUNDING[torch.float32] * n**0.5)
        scale = expected[name].abs().clamp_min(expected[name].abs().mean().item() + 1e-3)
        assert (error / scale).max().item() < 8 * rounding, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("K, shape, channel_dim", SHAPES, ids=str)
def test_values_and_gradients(K, shape, channel_dim, layout, dtype):
    for bias in ("none", "per member"):
        for activation in ("none", "relu"):
            check(case_of(K, shape, channel_dim, dtype, layout, bias), channel_dim, activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", ("shared", "per member"))
def test_parameters_in_either_type_and_shape(dtype, bias):
    for parameter_dtype in {dtype, torch.float32}:
        for layout in LAYOUTS:
            check(case_of(3, (12, 10, 6, 6), 1, dtype, layout, bias, parameter_dtype), 1, "relu")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ((20, 13, 7, 7), (8, 3, 129, 131), (64, 64, 16, 16)), ids=str)
def test_a_member_depends_on_itself_alone(shape, layout):
    """Bit for bit: alone or in the ensemble, permuted, beside NaN and huge values."""
    K = 4
    for dtype in DTYPES:
        case = case_of(K, shape, 1, dtype, layout)
        whole = run(case, 1, "relu")
        alone = run(
            {name: t.chunk(K)[2].clone(memory_format=torch.preserve_format) for name, t in case.items()}, 1, "relu"
        )
        order = [2, 0, 3, 1]
        permuted = run({name: torch.cat([t.chunk(K)[k] for k in order]) for name, t in case.items()}, 1, "relu")
        poisoned = {name: t.clone() for name, t in case.items()}
        poisoned["input"].chunk(K)[0][:] = float("nan")
        poisoned["input"].chunk(K)[1][:] = torch.finfo(dtype).max / 4
        beside = run(poisoned, 1, "relu")
        for name, value in whole.items():
            assert torch.equal(value.chunk(K)[2], alone[name]), name
            assert torch.equal(value.chunk(K)[2], permuted[name].chunk(K)[0]), name
            assert torch.equal(value.chunk(K)[2], beside[name].chunk(K)[2]), name
        assert beside["y"].chunk(K)[0].isnan().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_repeats_are_bit_equal(layout):
    case = case_of(2, (32, 24, 33, 31), 1, torch.bfloat16, layout)
    first = run(case, 1, "relu")
    for _ in range(5):
        again = run(case, 1, "relu")
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("offset", (1, 2, 4))
@pytest.mark.parametrize("spatial", ((3, 3), (40, 40)), ids=str)
def test_operands_off_alignment(spatial, offset):
    """Storage that starts between vector boundaries."""
    for dtype in DTYPES:
        case = case_of(2, (8, 16, *spatial), 1, dtype, "contiguous")
        expected = run(case, 1, "relu")
        shifted = {}
        for name in ("input", "dy"):
            storage = torch.empty(case[name].numel() + offset, dtype=dtype, device="cuda")
            shifted[name] = storage[offset:].view(case[name].shape).copy_(case[name])
        arguments = (shifted["input"], case["gain"], case["bias"], 1, "relu")
        y = registry.op(registry.NATIVE, "member_gain")(*arguments)
        grads = registry.op(registry.NATIVE, "member_gain_backward")(shifted["dy"], *arguments)
        for value, name in zip((y, *grads), ("y", "dinput", "dgain", "dbias")):
            assert torch.equal(value, expected[name]), name


def test_empty():
    for shape in ((0, 5, 4), (4, 5, 0), (4, 0, 3)):
        result = run(case_of(2, shape, 1, torch.float32, "contiguous"), 1, "relu")
        assert result["y"].shape == shape
        assert result["dgain"].eq(0).all() and result["dbias"].eq(0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cuda_graph(layout):
    """Captured on a side stream, replayed on new data."""
    case = case_of(2, (32, 24, 33, 31), 1, torch.bfloat16, layout)

    def step():
        arguments = (case["input"], case["gain"], case["bias"], 1, "relu")
        y = registry.op(registry.NATIVE, "member_gain")(*arguments)
        return y, *registry.op(registry.NATIVE, "member_gain_backward")(case["dy"], *arguments)

    change = normal(case["input"].shape, torch.bfloat16, seed=11)
    check_replay(step, lambda: case["input"].copy_(change))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_runs_on_the_tensors_device():
    case = case_of(2, (8, 8, 6, 6), 1, torch.float32, "contiguous")
    expected = run(case, 1, "relu")
    actual = run({name: t.to("cuda:1") for name, t in case.items()}, 1, "relu")
    assert all(torch.equal(expected[name], actual[name].to("cuda:0")) for name in expected)
