"""The Triton kernels of rank1_linear, in Triton's interpreter, against float64: the tests of the op, and its plans.

Runs in a pytest process of its own: TRITON_INTERPRET is read when the kernels are imported.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest

pytest.importorskip("triton")

import torch
from test_rank1_linear import SHAPES, compare, make_inputs, run

import latephase_kernels as lp
from latephase_kernels.ops import registry
from latephase_kernels.triton_kernels import rank1_linear as kernels
from latephase_kernels.triton_kernels.tiles import unit

pytestmark = pytest.mark.usefixtures("triton_backend", "poison_unwritten_memory")

rank1_linear = lp.functional.rank1_linear
NAMES = ("x", "weight", "s", "r", "bias")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape, bias", list(zip(SHAPES, ["none", "shared", "per member"] * 3)), ids=str)
def test_values_and_gradients(shape, bias, dtype):
    compare(make_inputs(*shape, bias=bias, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_parameters_in_float32(dtype):
    for bias in ("shared", "per member"):
        compare(make_inputs((12, 3), 3, 33, 18, bias=bias, dtype=dtype, parameters=torch.float32))


def test_several_splits_and_groups(monkeypatch):
    """One member cut into splits, and programs that go through several items."""
    monkeypatch.setattr(kernels, "ROWS_PER_SPLIT", 32)
    monkeypatch.setattr(kernels, "PROGRAMS", 2)
    plan = kernels.gradient_plan(torch.float32, "ieee", 67, 8, 12)
    assert plan.splits == 2 and plan.in_tiles == plan.out_tiles == 1
    compare(make_inputs((201,), 3, 8, 12, bias="per member", dtype=torch.float32))


def test_plans_fit_the_sizes():
    for dtype, precision in ((torch.float32, "tf32"), (torch.float32, "ieee"), (torch.bfloat16, "ieee")):
        for rows, columns in ((1, (1, 1)), (32, (500, 2000)), (3152, (384, 1536)), (100000, (785, 511))):
            tile = kernels.product_tile(dtype, precision, rows, *columns)
            plan = kernels.gradient_plan(dtype, precision, rows, *columns)
            assert all(side & (side - 1) == 0 and side >= 16 for side in (*tile[:3], *plan.tile[:3]))
            assert (plan.splits - 1) * plan.rows_per_split < rows <= plan.splits * plan.rows_per_split


def test_only_the_gradients_that_are_needed():
    inputs = make_inputs((6, 2), 3, 5, 4, bias="per member")
    everything = run(rank1_linear, inputs)
    for needed in range(1, 32):
        needs = [bool(needed >> i & 1) for i in range(5)]
        leaves = [inputs[name].detach().clone().requires_grad_(need) for name, need in zip(NAMES, needs)]
        rank1_linear(*leaves).backward(inputs["dy"])
        for name, leaf, need in zip(NAMES, leaves, needs):
            assert need == (leaf.grad is not None)
            assert not need or torch.equal(leaf.grad, everything[f"d{name}"])


@pytest.mark.parametrize("shape", [((0,), 3), ((6, 0), 3), ((6,), 0)], ids=str)
def test_empty(shape):
    leading, in_features = shape
    inputs = make_inputs(leading, 3, in_features, 4)
    result = run(rank1_linear, inputs)
    expected = {f"d{name}": torch.zeros_like(inputs[name]) for name in NAMES}
    expected["y"] = torch.zeros_like(inputs["dy"])
    if in_features == 0:
        expected |= {"y": inputs["bias"].expand(6, 4), "dbias": inputs["dy"].sum(0)}
    for name, value in result.items():
        torch.testing.assert_close(value, expected[name])


def test_permuted_repeated_lone_and_poisoned_members_are_bit_equal():
    inputs = make_inputs((12, 3), 4, 33, 18, bias="per member", dtype=torch.float32)
    own = ("y", "dx", "ds", "dr", "dbias")

    def members(result, order):
        return {name: result[name].unflatten(0, (len(order), -1)) for name in own}

    def chosen(order):
        return {n: t if n == "weight" else torch.cat([t.chunk(4)[k] for k in order]) for n, t in inputs.items()}

    whole = members(run(rank1_linear, inputs), range(4))
    again = members(run(rank1_linear, inputs), range(4))
    permuted = members(run(rank1_linear, chosen([2, 0, 3, 1])), range(4))
    alone = members(run(rank1_linear, chosen([2])), [2])
    poisoned = {name: tensor.clone() for name, tensor in inputs.items()}
    for name, value in (("x", float("nan")), ("s", 1e30)):
        poisoned[name].unflatten(0, (4, -1))[1] = value
    beside = members(run(rank1_linear, poisoned), range(4))
    for name in own:
        assert torch.equal(whole[name], again[name])
        assert torch.equal(whole[name][2], permuted[name][0]) and torch.equal(whole[name][2], alone[name][0])
        assert torch.equal(whole[name][[0, 2, 3]], beside[name][[0, 2, 3]])
    assert beside["y"][1].isnan().all()


def test_opcheck():
    inputs = make_inputs((4,), 2, 3, 4, bias="per member", dtype=torch.float32)
    arguments = [inputs[name].requires_grad_() for name in NAMES]
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(registry.op(registry.TRITON, "rank1_linear"), arguments, test_utils=utils)
    detached = [t.detach() for t in arguments]
    backward = registry.op(registry.TRITON, "rank1_linear_backward")
    torch.library.opcheck(backward, (inputs["dy"], *detached, None, [True] * 5), test_utils=utils)


def test_units_of_extents():
    assert [unit(extent) for extent in (0, 1, 500, 786, 2000, 384)] == [16, 1, 4, 2, 16, 16]
