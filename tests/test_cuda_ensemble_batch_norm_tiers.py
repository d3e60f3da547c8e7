"""Every tier of the CUDA kernels of ensemble_batch_norm, and what must hold in all of them: needs a GPU."""

from functools import partial

import pytest
import torch
from accuracy import STANDALONE
from cuda_norm_cases import DTYPES, LAYOUTS, ONE_CASE, TIERS, case_of, check, normal, op_arguments, run

from latephase_kernels.ops import registry
from latephase_kernels.reference import ensemble_batch_norm as reference

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("native_backend"),
]

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


@pytest.fixture(params=TIERS)
def _tier(request, monkeypatch):
    for name, value in TIERS[request.param].items():
        monkeypatch.setenv(name, value)


def _launches(call):
    """Return the names of what runs on the device, memory operations included."""
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]


@pytest.fixture(params=ONE_CASE)
def one_case(request, monkeypatch):
    """The name of a tier, the shape of a case that goes there."""
    batch, channels, shared_kib, cluster = ONE_CASE[request.param]
    monkeypatch.setenv("LATEPHASE_CUDA_SHARED_KIB", shared_kib)
    monkeypatch.setenv("LATEPHASE_CUDA_CLUSTER", cluster)
    return request.param, (2, batch, channels, (7, 7))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_case_of_every_tier(one_case, layout, dtype):
    """Small enough for compute-sanitizer."""
    _, shape = one_case
    check(case_of(shape, dtype, layout, residual=True), 2, True, "relu")
    check(case_of(shape, dtype, layout, gain=True), 2, True, "relu")
    for activation in STANDALONE:
        check(case_of(shape, dtype, layout), 2, True, activation)


def test_the_tier_is_the_one_that_is_forced(one_case):
    tier, shape = one_case
    if tier in ("clusters", "packed planes in clusters") and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs thread-block clusters")
    case = case_of(shape, torch.bfloat16, "contiguous", residual=True)
    forward = registry.op(registry.NATIVE, "ensemble_batch_norm")
    launches = _launches(lambda: forward(*op_arguments(case, 2, "relu")))
    kernel = {"virtual clusters": "virtual", "streaming": "statistics"}.get(tier, "resident")
    assert f"{kernel}_" in launches[0], launches


@pytest.mark.parametrize("cluster", (16, 2, 1))
@pytest.mark.parametrize("shared_kib", (0, 1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", ((2, 29, 5, (7, 7)), (1, 29, 16, (7, 7)), (2, 10, 24, (14, 14)), (1, 37, 9, (8, 8))), ids=str
)
def test_every_cut_of_the_same_data(shape, layout, shared_kib, cluster, monkeypatch):
    """Several groups a block, one, clusters and virtual clusters of many sizes with uneven splits, and streaming."""
    monkeypatch.setenv("LATEPHASE_CUDA_SHARED_KIB", str(shared_kib))
    monkeypatch.setenv("LATEPHASE_CUDA_CLUSTER", str(cluster))
    for dtype in DTYPES:
        check(case_of(shape, dtype, layout, residual=True), shape[0], True, "relu")


@pytest.mark.parametrize("multiprocessors", (12, 20))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_virtual_clusters_go_through_several_groups(layout, multiprocessors, monkeypatch):
    """On few multiprocessors: a cluster fetches its next group while it writes one."""
    margin = torch.cuda.get_device_properties(0).multi_processor_count - multiprocessors
    monkeypatch.setenv("LATEPHASE_CUDA_SM_MARGIN", str(margin))
    monkeypatch.setenv("LATEPHASE_CUDA_SHARED_KIB", {"contiguous": "3", "channels_last": "64"}[layout])
    monkeypatch.setenv("LATEPHASE_CUDA_CLUSTER", "1")
    for dtype in DTYPES:
        case = case_of((2, 13, 72, (14, 14)), dtype, layout, residual=True)
        check(case, 2, True, "relu")
        launches = " ".join(_launches(partial(run, case, 2, True, "relu")))
        assert "virtual_forward_" in launches and "virtual_backward_" in launches


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", LARGE_SHAPES, ids=str)
def test_groups_beside_the_edges_of_the_tiers(shape, layout, dtype):
    check(case_of(shape, dtype, layout, residual=True), shape[0], True, "relu")
    check(case_of(shape, dtype, layout), shape[0], True, "none")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", ((4, 5, 13, (7, 7)), (4, 5, 16, (7, 7)), (4, 2, 3, (129, 131)), (4, 16, 64, (16, 16))), ids=str
)
def test_a_member_depends_on_itself_alone(shape, layout, _tier):
    """Bit for bit: alone or in the ensemble, permuted, beside NaN and 1e30."""
    K, B, *_ = shape
    order = [2, 0, 3, 1]

    def rows(t, k):
        return t[k : k + 1] if t.shape[0] == K else t[k * B : (k + 1) * B]

    def changed(case, change):
        return {name: None if t is None else change(t) for name, t in case.items()}

    for dtype in DTYPES:
        case = case_of(shape, dtype, layout, residual=True)
        whole = run(case, K, True, "relu")
        alone = run(changed(case, lambda t: rows(t, 2).clone(memory_format=torch.preserve_format)), 1, True, "relu")
        permuted = run(changed(case, lambda t: torch.cat([rows(t, k) for k in order])), K, True, "relu")
        poisoned = changed(case, torch.clone)
        rows(poisoned["input"], 0)[0] = float("nan")
        rows(poisoned["input"], 1)[0] = torch.finfo(dtype).max / 4
        beside = run(poisoned, K, True, "relu")
        for name in whole:
            assert torch.equal(rows(whole[name], 2), alone[name]), name
            assert torch.equal(rows(whole[name], 2), rows(permuted[name], 0)), name
            assert torch.equal(rows(whole[name], 2), rows(beside[name], 2)), name
        assert rows(beside["y"], 0).isnan().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_repeats_are_bit_equal(layout, _tier):
    case = case_of((2, 16, 24, (33, 31)), torch.bfloat16, layout, residual=True)
    first = run(case, 2, True, "relu")
    for _ in range(5):
        again = run(case, 2, True, "relu")
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_of_data_far_from_zero(layout, _tier):
    """Mean / deviation = 10⁴ in float32."""
    x = normal((2 * 16, 8, 32, 32), torch.float32, layout, shift=1e4)
    mean, var = registry.op(registry.NATIVE, "ensemble_batch_norm_statistics")(x, 2)
    expected_mean, expected_var = reference.statistics(x.double(), 2)
    assert ((mean - expected_mean) / expected_mean).abs().max() < 2e-7
    assert ((var - expected_var) / expected_var).abs().max() < 1e-4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_huge_values_do_not_become_nan(layout, _tier):
    x = normal((2 * 4, 8, 6, 6), torch.float32, layout)
    x[0, 0, 0, 0] = 1e30
    mean, var = registry.op(registry.NATIVE, "ensemble_batch_norm_statistics")(x, 2)
    assert mean.isfinite().all() and not var.isnan().any() and var[0, 0] == float("inf")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spatial", ((8, 8), (7, 7)), ids=str)
@pytest.mark.parametrize("offset", (1, 2, 4))
def test_operands_off_alignment(offset, spatial, layout, _tier):
    """Storage that starts between vector boundaries."""
    forward = registry.op(registry.NATIVE, "ensemble_batch_norm")
    backward = registry.op(registry.NATIVE, "ensemble_batch_norm_backward")

    def step(case):
        y, mean, rstd, var, mask = forward(*op_arguments(case, 2, "relu"))
        saved = (case["dy"], case["input"], mean, rstd, case["weight"], case["bias"], mask)
        return y, mean, var, mask, *backward(*saved, True, 2, "relu", True)

    for dtype in DTYPES:
        case = case_of((2, 4, 16, spatial), dtype, layout, residual=True)
        expected = step(case)
        for name in ("input", "residual", "dy"):
            aligned = case[name]
            storage = torch.full((aligned.numel() + offset,), float("nan"), dtype=dtype, device="cuda")
            case[name] = storage.as_strided(aligned.shape, aligned.stride(), offset).copy_(aligned)
            assert all(torch.equal(*pair) for pair in zip(step(case), expected)), name
            case[name] = aligned


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", (13, 16))  # planes that are not packed, and that are
def test_halves_equal_the_whole(channels, layout, _tier):
    case = case_of((3, 4, channels, (7, 7)), torch.bfloat16, layout, residual=True)
    dy, input, weight, bias, residual = (case[name] for name in ("dy", "input", "weight", "bias", "residual"))

    def native(name, *arguments):
        return registry.op(registry.NATIVE, f"ensemble_batch_norm{name}")(*arguments)

    y, mean, rstd, var, mask = native("", *op_arguments(case, 3, "relu"))
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


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cuda_graph(layout, _tier):
    """Captured on a side stream, replayed on new data."""
    shape = (2, 16, 24, (33, 31))
    case = case_of(shape, torch.bfloat16, layout, residual=True)
    forward = registry.op(registry.NATIVE, "ensemble_batch_norm")
    backward = registry.op(registry.NATIVE, "ensemble_batch_norm_backward")

    def step():
        y, mean, rstd, _, mask = forward(*op_arguments(case, 2, "relu"))
        saved = (case["dy"], case["input"], mean, rstd, case["weight"], case["bias"], mask)
        return y, *backward(*saved, True, 2, "relu", True)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (11, 12):
        case["input"].copy_(normal(case["input"].shape, torch.bfloat16, seed=seed))
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(*pair) for pair in zip(captured, step()))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tier, kind", (("as they fit", "resident"), ("virtual clusters", "virtual")))
def test_one_launch_each_way(layout, tier, kind, monkeypatch):
    """No second pass, no memset, no launch for the running statistics beside the kernel, where groups fit on chip."""
    if tier == "as they fit" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs thread-block clusters")
    for name, value in TIERS[tier].items():
        monkeypatch.setenv(name, value)
    case = case_of((3, 33, 12, (14, 14)), torch.bfloat16, layout, residual=True)
    batches = torch.zeros(3, dtype=torch.long, device="cuda")
    update = registry.op(registry.NATIVE, "ensemble_batch_norm_update")
    backward = registry.op(registry.NATIVE, "ensemble_batch_norm_backward")

    def step():
        statistics = (case["running_mean"], case["running_var"], batches)
        affine = (case["weight"], case["bias"], case["residual"])
        _, mean, rstd, mask = update(case["input"], *statistics, *affine, 0.1, 1e-5, 3, "relu")
        saved = (case["dy"], case["input"], mean, rstd, case["weight"], case["bias"], mask)
        backward(*saved, True, 3, "relu", True)

    launches = _launches(step)
    assert len(launches) == 2
    for way in ("forward", "backward"):
        assert sum(f"{kind}_{way}_kernel" in name for name in launches) == 1
    assert batches.tolist() == [2] * 3


def _check_streams(shape, layout, priorities, holders=0):
    """Launches that overlap share nothing: each stream finds what it would find alone, again and again.

    Beside them each of `holders` streams holds a multiprocessor, now and then, by a kernel that only waits.
    """
    K = shape[0]
    cases = [case_of(shape, torch.bfloat16, layout, residual=True) for _ in priorities]
    cases[1]["input"] = cases[1]["input"] * 3 + 1
    expected = [run(case, K, True, "relu") for case in cases]
    streams = [torch.cuda.Stream(priority=priority) for priority in priorities]
    found = []
    held = [torch.cuda.Stream() for _ in range(holders)]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    for _ in range(20):
        for stream in held:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(100_000)  # clock cycles
        for stream, case in zip(streams, cases):
            with torch.cuda.stream(stream):
                found.append(run(case, K, True, "relu"))
    torch.cuda.synchronize()
    for i, result in enumerate(found):
        assert all(torch.equal(result[name], expected[i % 2][name]) for name in result)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_streams_at_once(layout, _tier):
    _check_streams((2, 16, 24, (33, 31)), layout, (0, 0))


@pytest.mark.parametrize("holders", [0, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_virtual_clusters_that_do_not_fit_at_once(layout, holders, monkeypatch):
    """Each takes most of the device, and one may overtake the other: neither waits for a block that never comes.

    Nor where others hold multiprocessors when they are launched, so that room comes free piece by piece.
    """
    monkeypatch.setenv("LATEPHASE_CUDA_CLUSTER", "1")
    _check_streams((2, 40, 24, (64, 64)), layout, (0, -1), holders)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_graph_and_its_stream_at_once(layout, _tier):
    """A captured launch replayed beside others of the stream that it was captured on."""
    case = case_of((2, 16, 24, (33, 31)), torch.bfloat16, layout, residual=True)
    forward = registry.op(registry.NATIVE, "ensemble_batch_norm")
    expected = forward(*op_arguments(case, 2, "relu"))[0]
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        captured = forward(*op_arguments(case, 2, "relu"))[0]
    found = []
    for _ in range(20):
        graph.replay()  # on the current stream
        with torch.cuda.stream(stream):
            found.append(forward(*op_arguments(case, 2, "relu"))[0])
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected) for y in (captured, *found))
