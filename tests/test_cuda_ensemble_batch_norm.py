"""The compiled CUDA kernels of ensemble_batch_norm against the float64 reference on the CPU: needs a GPU."""

import pytest
import torch
from accuracy import STANDALONE
from cuda_norm_cases import DTYPES, LAYOUTS, case_of, check, op_arguments, run

from latephase_kernels.ops import registry
from latephase_kernels.ops.relu_mask import mask_shape

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("native_backend"),
]

# (K, B, C, spatial): sizes that are multiples of nothing, one split and many, few channels and more than a block's.
SHAPES = (
    (3, 5, 7, ()),
    (2, 33, 64, ()),
    (2, 3, 5, (3,)),
    (4, 8, 16, (8, 8)),
    (3, 4, 13, (7, 7)),
    (3, 5, 16, (7, 7)),
    (2, 6, 72, (14, 14)),
    (2, 3, 130, (5, 5)),
    (2, 2, 3, (129, 131)),
    (2, 16, 8, (64, 64)),
    (2, 2, 6, (3, 4, 10)),
    (1, 300, 1, (5, 3)),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("training", (True, False), ids=("train", "eval"))
def test_values_and_gradients(shape, layout, dtype, training):
    for residual in (False, True):
        for activation in ("none", "relu"):
            check(case_of(shape, dtype, layout, residual), shape[0], training, activation)
    check(case_of(shape, dtype, layout), shape[0], training, "silu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", STANDALONE)
def test_activations_far_from_zero(activation, layout, dtype):
    for shape in SHAPES[4:7]:
        case = case_of(shape, dtype, layout)
        case["bias"] = case["bias"] * 4
        check(case, shape[0], True, activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", (True, False), ids=("train", "eval"))
def test_output_gain(layout, dtype, training):
    for shape in SHAPES[:7]:
        for activation in ("none", "relu"):
            check(case_of(shape, dtype, layout, gain=True), shape[0], training, activation)


@pytest.mark.parametrize("plane", (*range(9, 32), 49, 100, 121, 196, 289))
def test_packed_planes_of_every_size(plane):
    """Units of one channel and of two, bytes of the mask that begin anywhere in them."""
    for residual in (False, True):
        check(case_of((2, 7, 16, (plane,)), torch.bfloat16, "contiguous", residual), 2, True, "relu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shared", (False, True), ids=("per member", "shared"))
def test_parameters_in_either_type_and_shape(dtype, shared):
    for parameter_dtype in {dtype, torch.float32}:
        for layout in LAYOUTS:
            check(case_of((3, 4, 10, (6, 6)), dtype, layout, True, shared, parameter_dtype), 3, True, "relu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ((2, 3, 13, (7, 7)), (2, 3, 16, (7, 7)), (2, 3, 20, (2, 6)), (2, 5, 11, ())), ids=str)
def test_mask_holds_the_bits_of_the_stored_output(shape, layout, dtype):
    case = case_of(shape, dtype, layout, residual=True)
    forward = registry.op(registry.NATIVE, "ensemble_batch_norm")
    y, _, _, _, mask = forward(*op_arguments(case, shape[0], "relu"))
    assert list(mask.shape) == mask_shape(case["input"], case["residual"], "relu")
    rows = y if layout == "contiguous" and len(shape[3]) else y.movedim(1, -1)
    columns = rows[0, 0].numel() if layout == "contiguous" and len(shape[3]) else shape[2]
    bits = (mask.unsqueeze(-1) >> torch.arange(8, device="cuda", dtype=torch.uint8)) & 1
    bits = bits.flatten(1)
    assert torch.equal(bits[:, :columns].bool(), rows.reshape(-1, columns) > 0)
    assert bits[:, columns:].sum() == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_in_dy_stays_in_place_in_eval(layout):
    case = case_of((2, 4, 8, (6, 6)), torch.float32, layout)
    case["dy"][0, 0, 0, 0] = float("nan")
    assert run(case, 2, False, "none")["dinput"].isnan().sum() == 1


@pytest.mark.parametrize("training", (True, False), ids=("train", "eval"))
def test_empty_batch(training):
    for layout in LAYOUTS:
        case = case_of((2, 0, 5, (4, 4)), torch.float32, layout, residual=True)
        result = run(case, 2, training, "relu")
        assert result["y"].shape == (0, 5, 4, 4)
        assert result["dweight"].eq(0).all() and result["dbias"].eq(0).all()


def test_runs_on_the_current_stream():
    case = case_of((2, 16, 24, (64, 64)), torch.float32, "contiguous")
    expected = run(case, 2, True, "relu")["y"]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        input = case["input"] * 1
        case["input"] = input
        y = registry.op(registry.NATIVE, "ensemble_batch_norm")(*op_arguments(case, 2, "relu"))[0]
    stream.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_runs_on_the_tensors_device():
    case = case_of((2, 4, 8, (6, 6)), torch.float32, "contiguous")
    expected = run(case, 2, True, "relu")
    there = {name: None if t is None else t.to("cuda:1") for name, t in case.items()}
    actual = run(there, 2, True, "relu")
    assert all(torch.equal(expected[name], actual[name].to("cuda:0")) for name in expected)
