"""The Triton kernels of ensemble_batch_norm and member_gain on a GPU, against float64 on the CPU: needs a GPU.

Few cases, for each kernel is compiled first; the interpreter runs many more without a GPU. The Triton kernels of
rank1_linear and rank1_lstm are tested beside the native ones.
"""

import pytest
import torch
from cuda_graphs import check_replay
from cuda_norm_cases import LAYOUTS, case_of, check, normal, op_arguments, run
from test_cuda_member_gain import case_of as gain_case_of
from test_cuda_member_gain import check as gain_check
from test_cuda_member_gain import run as gain_run

from latephase_kernels import backend
from latephase_kernels.ops import registry

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DTYPES = (torch.float32, torch.bfloat16)
NORM_SHAPES = ((3, 5, 7, ()), (2, 5, 1, (7, 7)), (3, 4, 13, (7, 7)), (2, 6, 72, (14, 14)), (2, 2, 3, (129, 131)))
GAIN_SHAPES = ((3, (12, 13, 7, 7), 1), (2, (12, 72, 14, 14), 1), (2, (4, 3, 129, 131), 1), (2, (6, 197, 96), 2))


@pytest.fixture(autouse=True)
def _triton():
    pytest.importorskip("triton")
    backend.set_backend("triton")
    yield
    backend.set_backend("auto")


@pytest.fixture(params=["on chip", "streaming"])
def _tier(request, monkeypatch):
    from latephase_kernels.triton_kernels import ensemble_batch_norm_resident as resident

    if request.param == "streaming":
        monkeypatch.setattr(resident, "RESIDENT_TILE", 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
def test_norm_values_and_gradients(shape, layout, dtype):
    """By bits of the ReLU and by recomputing it, in training and not."""
    check(case_of(shape, dtype, layout, residual=True), shape[0], True, "relu")
    check(case_of(shape, dtype, layout, residual=True), shape[0], False, "relu")
    check(case_of(shape, dtype, layout, shared=True), shape[0], True, "relu")


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float16), ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_norm_in_both_tiers(layout, dtype, _tier):
    for residual in (False, True):
        check(case_of((2, 6, 24, (14, 14)), dtype, layout, residual), 2, True, "relu")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_norm_of_a_member_depends_on_itself_alone(layout, _tier):
    """Bit for bit: alone, and beside NaN."""
    K, B = 3, 6
    case = case_of((K, B, 24, (14, 14)), torch.bfloat16, layout, residual=True)
    case["input"][:B] = float("nan")
    whole = run(case, K, True, "relu")

    def last(t):
        return None if t is None else (t[-1:] if len(t) == K else t[-B:]).clone(memory_format=torch.preserve_format)

    alone = run({name: last(t) for name, t in case.items()}, 1, True, "relu")
    assert all(torch.equal(last(whole[name]), alone[name]) for name in whole)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_norm_in_a_cuda_graph(layout, _tier):
    case = case_of((2, 6, 24, (14, 14)), torch.bfloat16, layout, residual=True)
    forward = registry.op(registry.TRITON, "ensemble_batch_norm")
    backward = registry.op(registry.TRITON, "ensemble_batch_norm_backward")

    def step():
        y, mean, rstd, _, mask = forward(*op_arguments(case, 2, "relu"))
        saved = (case["dy"], case["input"], mean, rstd, case["weight"], case["bias"], mask)
        return y, *backward(*saved, True, 2, "relu", True)

    change = normal(case["input"].shape, torch.bfloat16, seed=11)
    check_replay(step, lambda: case["input"].copy_(change))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("K, shape, channel_dim", GAIN_SHAPES, ids=str)
def test_gain_values_and_gradients(K, shape, channel_dim, layout, dtype):
    for bias in ("none", "per member"):
        gain_check(gain_case_of(K, shape, channel_dim, dtype, layout, bias), channel_dim, "relu")


def test_gain_repeats_are_bit_equal():
    case = gain_case_of(2, (32, 24, 33, 31), 1, torch.bfloat16, "contiguous")
    first, again = gain_run(case, 1, "relu"), gain_run(case, 1, "relu")
    assert all(torch.equal(first[name], again[name]) for name in first)
