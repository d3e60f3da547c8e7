"""The compiled CUDA kernels of ensemble_batch_norm against the float64 reference on the CPU: needs a GPU."""

import pytest
import torch

from latephase_kernels import backend
from latephase_kernels.ops import registry
from latephase_kernels.ops.ensemble_batch_norm import ensemble_batch_norm, mask_shape
from latephase_kernels.reference import ensemble_batch_norm as reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
LAYOUTS = ("contiguous", "channels_last")

# (K, B, C, spatial): sizes that are multiples of nothing, one split and many, few channels and more than a block's.
SHAPES = (
    (3, 5, 7, ()),
    (2, 33, 64, ()),
    (2, 3, 5, (3,)),
    (4, 8, 16, (8, 8)),
    (3, 4, 13, (7, 7)),
    (2, 6, 72, (14, 14)),
    (2, 3, 130, (5, 5)),
    (2, 2, 3, (129, 131)),
    (2, 16, 8, (64, 64)),
    (2, 2, 6, (3, 4, 10)),
    (1, 300, 1, (5, 3)),
)

# Groups beside the edges of the tiers on devices with 228 KiB of shared memory a multiprocessor: one block or a cluster
# of two, of four, of sixteen with half and with all of a multiprocessor a block, and too large for the chip.
LARGE_SHAPES = (
    (2, 64, 3, (21, 21)),  # 56 KB in bfloat16: just more than a quarter of the shared memory
    (2, 64, 2, (28, 28)),
    (1, 64, 2, (56, 56)),
    (1, 13, 2, (257, 255)),
    (1, 8, 1, (450, 450)),
    (1, 8, 1, (500, 500)),
    (2, 40, 72, (14, 14)),  # channels_last: slabs of 64 channels, of which the second has 8
)

# What the shared memory of a block is lowered to, so that small groups take every tier.
TIERS = {"as they fit": None, "clusters": "6", "streaming": "0"}


@pytest.fixture(autouse=True)
def _native():
    backend.set_backend("native")
    yield
    backend.set_backend("auto")


@pytest.fixture(params=TIERS)
def _tier(request, monkeypatch):
    if TIERS[request.param] is not None:
        monkeypatch.setenv("LATEPHASE_CUDA_SHARED_KIB", TIERS[request.param])


def _memory_format(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if layout == "contiguous" or tensor.dim() not in formats:
        return tensor
    return tensor.contiguous(memory_format=formats[tensor.dim()])


def _random(shape, dtype, layout="contiguous", *, seed=0, scale=1.0, shift=0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale + shift
    return _memory_format(values.to("cuda", dtype), layout)


def _case(shape, dtype, layout, residual=False, shared=False, parameter_dtype=torch.float32) -> dict:
    K, B, C, spatial = shape
    parameters = (C,) if shared else (K, C)
    return {
        "input": _random((K * B, C, *spatial), dtype, layout, seed=1, scale=2, shift=0.5),
        "weight": _random(parameters, parameter_dtype, seed=2),
        "bias": _random(parameters, parameter_dtype, seed=3),
        "residual": _random((K * B, C, *spatial), dtype, layout, seed=4) if residual else None,
        "running_mean": _random((K, C), torch.float32, seed=5, scale=0.1),
        "running_var": _random((K, C), torch.float32, seed=6).square() + 0.5,
        "dy": _random((K * B, C, *spatial), dtype, layout, seed=7),
    }


def _run(case: dict, K: int, training: bool, activation: str) -> dict:
    """Output, gradients and new running statistics of the op on the GPU."""
    leaves = {name: case[name].detach().clone().requires_grad_() for name in ("input", "weight", "bias")}
    if case["residual"] is not None:
        leaves["residual"] = case["residual"].detach().clone().requires_grad_()
    running_mean, running_var = case["running_mean"].clone(), case["running_var"].clone()
    assert backend.backend_for(leaves["input"]) == "native"
    y = ensemble_batch_norm(
        leaves["input"],
        running_mean,
        running_var,
        leaves["weight"],
        leaves["bias"],
        training,
        num_members=K,
        residual=leaves.get("residual"),
        activation=activation,
    )
    grads = torch.autograd.grad(y, list(leaves.values()), case["dy"])
    return {
        "y": y.detach(),
        "running_mean": running_mean,
        "running_var": running_var,
        **{f"d{name}": grad for name, grad in zip(leaves, grads)},
    }


def _expected(case: dict, K: int, training: bool, activation: str, passed: torch.Tensor) -> dict:
    """The same in float64 on the CPU, through the ReLU mask that the op found (it may differ within rounding of 0)."""
    double = {name: t.detach().double().cpu() for name, t in case.items() if t is not None}
    names = [name for name in ("input", "weight", "bias", "residual") if name in double]
    for name in names:
        double[name].requires_grad_()
    z, mean, var = reference.ensemble_batch_norm(
        double["input"],
        double["running_mean"],
        double["running_var"],
        double["weight"],
        double["bias"],
        double.get("residual"),
        training,
        1e-5,
        K,
        "none",
    )
    gate = passed.double().cpu() if activation == "relu" else torch.ones_like(z)
    grads = torch.autograd.grad(z, [double[name] for name in names], double["dy"] * gate)
    n = z.numel() // mean.numel()
    running_mean, running_var = double["running_mean"], double["running_var"]
    if training:
        running_mean = running_mean.lerp(mean, 0.1)
        running_var = running_var.lerp(var * n / (n - 1), 0.1)
    return {
        "y": reference.activate(z, activation).detach(),
        "running_mean": running_mean.detach(),
        "running_var": running_var.detach(),
        **{f"d{name}": grad for name, grad in zip(names, grads)},
    }


def _check(case: dict, K: int, training: bool, activation: str) -> None:
    actual = _run(case, K, training, activation)
    expected = _expected(case, K, training, activation, actual["y"] > 0)
    dtype = case["input"].dtype
    n = case["input"].numel() // case["running_mean"].numel()
    assert actual["y"].dtype == dtype and actual["y"].stride() == case["input"].stride()
    for name, value in actual.items():
        error = (value.double().cpu() - expected[name]).abs()
        rounding = ROUNDING[value.dtype] if name in ("y", "dinput", "dresidual") else ROUNDING[torch.float32]
        if name in ("dweight", "dbias"):
            rounding = max(ROUNDING[value.dtype], ROUNDING[torch.float32] * max(1.0, n**0.5))
        scale = expected[name].abs().clamp_min(expected[name].abs().mean().item() + 1e-3)
        assert (error / scale).max().item() < 8 * rounding, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("training", (True, False), ids=("train", "eval"))
def test_values_and_gradients(shape, layout, dtype, training):
    for residual in (False, True):
        for activation in ("none", "relu"):
            _check(_case(shape, dtype, layout, residual), shape[0], training, activation)


@pytest.mark.parametrize("shared_kib", (0, 1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ((2, 29, 5, (7, 7)), (2, 10, 24, (14, 14)), (1, 37, 9, (8, 8))), ids=str)
def test_every_cut_of_the_same_data(shape, layout, shared_kib, monkeypatch):
    """Several groups a block, one, clusters of every size with uneven splits, and streaming."""
    monkeypatch.setenv("LATEPHASE_CUDA_SHARED_KIB", str(shared_kib))
    for dtype in DTYPES:
        _check(_case(shape, dtype, layout, residual=True), shape[0], True, "relu")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", LARGE_SHAPES, ids=str)
def test_groups_beside_the_edges_of_the_tiers(shape, layout, dtype):
    _check(_case(shape, dtype, layout, residual=True), shape[0], True, "relu")
    _check(_case(shape, dtype, layout), shape[0], True, "none")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shared", (False, True), ids=("per member", "shared"))
def test_parameters_in_either_type_and_shape(dtype, shared):
    for parameter_dtype in {dtype, torch.float32}:
        for layout in LAYOUTS:
            _check(_case((3, 4, 10, (6, 6)), dtype, layout, True, shared, parameter_dtype), 3, True, "relu")


def _op_arguments(case: dict, K: int, activation: str) -> tuple:
    return case["input"], None, None, case["weight"], case["bias"], case["residual"], True, 1e-5, K, activation


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ((2, 3, 13, (7, 7)), (2, 3, 20, (2, 6)), (2, 5, 11, ())), ids=str)
def test_mask_holds_the_bits_of_the_stored_output(shape, layout, dtype):
    case = _case(shape, dtype, layout, residual=True)
    forward = registry.op(registry.NATIVE, "ensemble_batch_norm")
    y, _, _, _, mask = forward(*_op_arguments(case, shape[0], "relu"))
    assert list(mask.shape) == mask_shape(case["input"], case["residual"], "relu")
    rows = y if layout == "contiguous" and len(shape[3]) else y.movedim(1, -1)
    columns = rows[0, 0].numel() if layout == "contiguous" and len(shape[3]) else shape[2]
    bits = (mask.unsqueeze(-1) >> torch.arange(8, device="cuda", dtype=torch.uint8)) & 1
    bits = bits.flatten(1)
    assert torch.equal(bits[:, :columns].bool(), rows.reshape(-1, columns) > 0)
    assert bits[:, columns:].sum() == 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ((4, 5, 13, (7, 7)), (4, 2, 3, (129, 131)), (4, 16, 64, (16, 16))), ids=str)
def test_a_member_depends_on_itself_alone(shape, layout, _tier):
    """Bit for bit: alone or in the ensemble, permuted, beside NaN and 1e30."""
    K, B, *_ = shape
    for dtype in DTYPES:
        case = _case(shape, dtype, layout, residual=True)
        whole = _run(case, K, True, "relu")

        def rows(t, k):
            return t[k : k + 1] if t.shape[0] == K else t[k * B : (k + 1) * B]

        alone = _run(
            {name: rows(t, 2).clone(memory_format=torch.preserve_format) for name, t in case.items()}, 1, True, "relu"
        )
        order = [2, 0, 3, 1]
        permuted = _run({name: torch.cat([rows(t, k) for k in order]) for name, t in case.items()}, K, True, "relu")
        poisoned = {name: t.clone() for name, t in case.items()}
        rows(poisoned["input"], 0)[0] = float("nan")
        rows(poisoned["input"], 1)[0] = torch.finfo(dtype).max / 4
        beside = _run(poisoned, K, True, "relu")
        for name in whole:
            assert torch.equal(rows(whole[name], 2), alone[name]), name
            assert torch.equal(rows(whole[name], 2), rows(permuted[name], 0)), name
            assert torch.equal(rows(whole[name], 2), rows(beside[name], 2)), name
        assert rows(beside["y"], 0).isnan().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_repeats_are_bit_equal(layout, _tier):
    case = _case((2, 16, 24, (33, 31)), torch.bfloat16, layout, residual=True)
    first = _run(case, 2, True, "relu")
    for _ in range(5):
        again = _run(case, 2, True, "relu")
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_of_data_far_from_zero(layout, _tier):
    """Mean / deviation = 10⁴ in float32."""
    x = _random((2 * 16, 8, 32, 32), torch.float32, layout, shift=1e4)
    mean, var = registry.op(registry.NATIVE, "ensemble_batch_norm_statistics")(x, 2)
    expected_mean, expected_var = reference.statistics(x.double(), 2)
    assert ((mean - expected_mean) / expected_mean).abs().max() < 2e-7
    assert ((var - expected_var) / expected_var).abs().max() < 1e-4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_huge_values_do_not_become_nan(layout, _tier):
    x = _random((2 * 4, 8, 6, 6), torch.float32, layout)
    x[0, 0, 0, 0] = 1e30
    mean, var = registry.op(registry.NATIVE, "ensemble_batch_norm_statistics")(x, 2)
    assert mean.isfinite().all() and not var.isnan().any() and var[0, 0] == float("inf")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_in_dy_stays_in_place_in_eval(layout, _tier):
    case = _case((2, 4, 8, (6, 6)), torch.float32, layout)
    case["dy"][0, 0, 0, 0] = float("nan")
    assert _run(case, 2, False, "none")["dinput"].isnan().sum() == 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("offset", (1, 2, 4))
def test_operands_off_alignment(offset, layout, _tier):
    """Storage that starts between vector boundaries."""
    forward = registry.op(registry.NATIVE, "ensemble_batch_norm")
    backward = registry.op(registry.NATIVE, "ensemble_batch_norm_backward")

    def step(case):
        y, mean, rstd, var, mask = forward(*_op_arguments(case, 2, "relu"))
        saved = (case["dy"], case["input"], mean, rstd, case["weight"], case["bias"], mask)
        return y, mean, var, mask, *backward(*saved, True, 2, "relu", True)

    for dtype in DTYPES:
        case = _case((2, 4, 16, (8, 8)), dtype, layout, residual=True)
        expected = step(case)
        for name in ("input", "residual", "dy"):
            aligned = case[name]
            storage = torch.full((aligned.numel() + offset,), float("nan"), dtype=dtype, device="cuda")
            case[name] = storage.as_strided(aligned.shape, aligned.stride(), offset).copy_(aligned)
            assert all(torch.equal(*pair) for pair in zip(step(case), expected)), name
            case[name] = aligned


@pytest.mark.parametrize("layout", LAYOUTS)
def test_halves_equal_the_whole(layout, _tier):
    case = _case((3, 4, 13, (7, 7)), torch.bfloat16, layout, residual=True)
    dy, input, weight, bias, residual = (case[name] for name in ("dy", "input", "weight", "bias", "residual"))

    def native(name, *arguments):
        return registry.op(registry.NATIVE, f"ensemble_batch_norm{name}")(*arguments)

    y, mean, rstd, var, mask = native("", *_op_arguments(case, 3, "relu"))
    half_mean, half_var = native("_statistics", input, 3)
    half_y, half_mask = native("_apply", input, mean, rstd, weight, bias, residual, 3, "relu")
    assert all(torch.equal(*pair) for pair in ((mean, half_mean), (var, half_var), (y, half_y), (mask, half_mask)))
    saved = (dy, input, mean, rstd, weight, bias, mask)
    dx, dweight, dbias, dresidual = native("_backward", *saved, True, 3, "relu", True)
    sum_dz, sum_dz_xhat = native("_backward_reduce", *saved, 3, "relu")
    count = float(input.numel() // mean.numel())
    half_dx, half_dresidual = native("_backward_apply", *saved, sum_dz, sum_dz_xhat, count, 3, "relu", True)
    pairs = ((dweight, sum_dz_xhat), (dbias, sum_dz), (dx, half_dx), (dresidual, half_dresidual))
    assert all(torch.equal(*pair) for pair in pairs)


def test_empty_batch():
    for layout in LAYOUTS:
        case = _case((2, 0, 5, (4, 4)), torch.float32, layout, residual=True)
        result = _run(case, 2, False, "relu")
        assert result["y"].shape == (0, 5, 4, 4)
        assert result["dweight"].eq(0).all() and result["dbias"].eq(0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cuda_graph(layout, _tier):
    """Captured on a side stream, replayed on new data."""
    shape = (2, 16, 24, (33, 31))
    case = _case(shape, torch.bfloat16, layout, residual=True)
    forward = registry.op(registry.NATIVE, "ensemble_batch_norm")
    backward = registry.op(registry.NATIVE, "ensemble_batch_norm_backward")

    def step():
        y, mean, rstd, _, mask = forward(*_op_arguments(case, 2, "relu"))
        saved = (case["dy"], case["input"], mean, rstd, case["weight"], case["bias"], mask)
        return y, *backward(*saved, True, 2, "relu", True)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    case["input"].copy_(_random(case["input"].shape, torch.bfloat16, seed=11))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(*pair) for pair in zip(captured, step()))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ((3, 8, 12, (7, 7)), (3, 12, 8, (14, 14))), ids=str)
def test_one_launch_each_way(shape, layout):
    """No second pass over memory, and nothing beside the kernel, for groups that fit on chip."""
    case = _case(shape, torch.bfloat16, layout, residual=True)
    forward = registry.op(registry.NATIVE, "ensemble_batch_norm")
    backward = registry.op(registry.NATIVE, "ensemble_batch_norm_backward")
    expected = forward(*_op_arguments(case, shape[0], "relu"))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        y, mean, rstd, _, mask = forward(*_op_arguments(case, shape[0], "relu"))
        backward(
            case["dy"], case["input"], mean, rstd, case["weight"], case["bias"], mask, True, shape[0], "relu", True
        )
        torch.cuda.synchronize()
    launches = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(launches) == 2
    for kernel in ("resident_forward_kernel", "resident_backward_kernel"):
        assert sum(kernel in name for name in launches) == 1
    assert torch.equal(y, expected[0])


def test_runs_on_the_current_stream():
    case = _case((2, 16, 24, (64, 64)), torch.float32, "contiguous")
    expected = _run(case, 2, True, "relu")["y"]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        input = case["input"] * 1
        case["input"] = input
        y = registry.op(registry.NATIVE, "ensemble_batch_norm")(*_op_arguments(case, 2, "relu"))[0]
    stream.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_runs_on_the_tensors_device():
    case = _case((2, 4, 8, (6, 6)), torch.float32, "contiguous")
    expected = _run(case, 2, True, "relu")
    there = {name: None if t is None else t.to("cuda:1") for name, t in case.items()}
    actual = _run(there, 2, True, "relu")
    assert all(torch.equal(expected[name], actual[name].to("cuda:0")) for name in expected)
