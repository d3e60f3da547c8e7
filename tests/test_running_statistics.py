"""Running statistics in the kernel that normalizes: they move as by torch's own operations afterwards.

Shapes: K members, B rows a member, C channels.
"""

import copy

import pytest
import torch
import torch.nn.functional as F

import latephase_kernels as lp
from latephase_kernels.ops import ensemble_batch_norm as op
from latephase_kernels.ops import registry

K, B, C = 3, 4, 7
CASES = [
    (dtype, layout)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    for layout in (torch.contiguous_format, torch.channels_last)
]


def make(dtype=torch.float32, layout=torch.contiguous_format, statistics=None):
    """Return (input, running mean, running variance, batches seen, weight, bias)."""
    torch.manual_seed(0)
    statistics = statistics or op.reference.accumulation_dtype(dtype)
    return (
        torch.randn(K * B, C, 5, 3).to(dtype).contiguous(memory_format=layout),
        torch.randn(K, C).to(statistics),
        torch.rand(K, C).to(statistics) + 0.5,
        torch.tensor([0, 5, 2**40]),
        *(torch.randn(K, C, dtype=op.reference.accumulation_dtype(dtype), requires_grad=True) for _ in range(2)),
    )


def separately(input, mean, var, batches, weight, bias, momentum):
    """Normalize, then move the statistics by torch's own operations."""
    y, batch_mean, batch_var = op.normalize(input, None, None, weight, bias, None, True, 1e-5, K, "relu")
    n = input.numel() // batch_mean.numel()
    mean.lerp_(batch_mean.to(mean.dtype), momentum)
    var.lerp_((batch_var * (n / (n - 1))).to(var.dtype), momentum)
    batches.add_(1)
    return y


def together(input, mean, var, batches, weight, bias, momentum):
    return op.normalize_and_update(input, mean, var, batches, weight, bias, None, momentum, 1e-5, K, "relu")


@pytest.mark.parametrize("momentum", [0.1, 0.75, 0.0, 1.0, -0.2, 1])
@pytest.mark.parametrize("dtype, layout", CASES, ids=str)
def test_as_the_separate_update(dtype, layout, momentum):
    first, second = make(dtype, layout), make(dtype, layout)
    assert torch.equal(together(*first, momentum), separately(*second, momentum))
    assert torch.equal(first[3], second[3])
    eps = torch.finfo(first[1].dtype).eps
    for found, right in zip(first[1:3], second[1:3], strict=True):
        torch.testing.assert_close(found, right, rtol=eps, atol=eps)
    if momentum == 1:
        n = B * 15
        _, mean, var = op.normalize(first[0], None, None, None, None, None, True, 1e-5, K, "none")
        assert torch.equal(first[1], mean) and torch.equal(first[2], var * (n / (n - 1)))


def test_one_call_of_one_op(monkeypatch):
    """No lerp_, mul or add_ beside the kernel."""
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    layer = lp.nn.EnsembleBatchNorm2d(C, K)
    input = torch.randn(K * B, C, 5, 3)
    if lp.backend_for(input) != "native":
        pytest.skip("the kernels are not built")
    with Watch():
        layer(input)
    assert seen == ["latephase_kernels::ensemble_batch_norm_update"]
    assert torch.equal(layer.num_batches_tracked, torch.ones(K, dtype=torch.long))


def test_a_loop_over_the_members_moves_the_same_statistics():
    layer = lp.nn.EnsembleBatchNorm2d(C, K, dtype=torch.float64)
    members = [torch.nn.BatchNorm2d(C, dtype=torch.float64) for _ in range(K)]
    for seed in range(5):
        torch.manual_seed(seed)
        input = torch.randn(K * B, C, 5, 3, dtype=torch.float64)
        layer(input)
        for member, rows in zip(members, input.chunk(K)):
            member(rows)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        right = torch.stack([getattr(member, name) for member in members])
        torch.testing.assert_close(getattr(layer, name), right, rtol=1e-12, atol=1e-13)


def test_a_saved_statistic_that_has_moved_is_noticed():
    """The change of a buffer shows in its version, as that of torch's own operations does."""
    arguments = make()
    result = (torch.ones(K, C, requires_grad=True) * arguments[1]).sum()
    together(*arguments, 0.1)
    assert [t._version for t in arguments[1:4]] == [1, 1, 1]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward()


@pytest.mark.parametrize(
    "dtype, statistics", [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)], ids=str
)
def test_statistics_of_another_type(dtype, statistics):
    arguments = make(dtype, statistics=statistics)
    before = [t.clone() for t in arguments[1:3]]
    together(*arguments, 0.25)
    _, mean, var = op.normalize(arguments[0], None, None, None, None, None, True, 1e-5, K, "none")
    n = B * 15
    tolerance = 4 * torch.finfo(statistics).eps + 1e-6
    right = (before[0].float().lerp(mean, 0.25), before[1].float().lerp(var * n / (n - 1), 0.25))
    for found, value in zip(arguments[1:3], right, strict=True):
        assert found.dtype == statistics
        torch.testing.assert_close(found.float(), value, rtol=tolerance, atol=tolerance)


def test_statistics_that_are_not_contiguous():
    arguments, other = list(make()), list(make())
    arguments[1] = torch.randn(C, K).t().copy_(other[1])
    together(*arguments, 0.1)
    separately(*other, 0.1)
    assert torch.equal(arguments[1], other[1]) and torch.equal(arguments[2], other[2])


def test_a_range_of_the_members_moves_theirs_alone():
    model = lp.expand(torch.nn.Sequential(torch.nn.BatchNorm2d(C)), K)
    before = model[0].running_mean.clone()
    with lp.members(model, range(1, 3)):
        model(torch.randn(2 * B, C, 5, 3) + 3)
    assert torch.equal(model[0].running_mean[0], before[0])
    assert (model[0].running_mean[1:] != before[1:]).all()
    assert model[0].num_batches_tracked.tolist() == [0, 1, 1]


def test_a_wrong_argument_changes_nothing():
    layer = lp.nn.EnsembleBatchNorm2d(C, K)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    for wrong in (torch.randn(K * B + 1, C, 5, 3), torch.randn(K * B, C + 1, 5, 3), torch.randn(K, C, 1, 1)):
        with pytest.raises(ValueError):
            layer(wrong)
    assert all(torch.equal(state[name], value) for name, value in layer.state_dict().items())


def test_the_op_refuses_statistics_of_another_shape():
    input, mean, var, batches, weight, bias = make()
    update = registry.op(registry.NATIVE, "ensemble_batch_norm_update")
    if lp.backend_for(input) != "native":
        pytest.skip("the kernels are not built")
    for wrong in ((mean[:2], var, batches), (mean, var.double(), batches), (mean, var, batches.int())):
        with pytest.raises(RuntimeError, match="must be contiguous"):
            update(input, *wrong, weight, bias, None, 0.1, 1e-5, K, "none")


def test_opcheck():
    input, *running, weight, bias = make()
    if lp.backend_for(input) != "native":
        pytest.skip("the kernels are not built")
    arguments = (input, *running, weight.detach(), bias.detach(), None, 0.1, 1e-5, K, "relu")
    torch.library.opcheck(
        registry.op(registry.NATIVE, "ensemble_batch_norm_update"),
        arguments,
        test_utils=("test_schema", "test_faketensor"),
    )


def test_compiled_and_checkpointed_as_eager():
    layer = lp.nn.EnsembleBatchNorm2d(C, K)
    input = torch.randn(K * B, C, 5, 3, requires_grad=True)
    plain = [torch.nn.BatchNorm2d(C) for _ in range(K)]
    torch.compile(layer, fullgraph=True, backend="aot_eager")(input)
    y = torch.utils.checkpoint.checkpoint(layer, input, use_reentrant=False)
    y.sum().backward()  # computes the layer again: its statistics move again, as those of nn.BatchNorm2d do
    for module, rows in zip(plain, input.detach().chunk(K)):
        for _ in range(3):
            module(rows)
    assert layer.num_batches_tracked.tolist() == [3] * K
    torch.testing.assert_close(layer.running_var, torch.stack([m.running_var for m in plain]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "targets, momentum, dtype",
    [("batch_norm", None, torch.float32), ("batch_norm", 0.1, torch.bfloat16), ((), 0.1, torch.float32)],
    ids=["cumulative", "low precision", "shared"],
)
def test_checkpointed_last_moves_twice_whatever_computes_it(targets, momentum, dtype):
    plain = torch.nn.Sequential(torch.nn.BatchNorm2d(C, momentum=momentum, dtype=dtype))
    copies = [copy.deepcopy(plain) for _ in range(K)]
    model = lp.expand(plain, K, targets=targets)
    input = torch.randn(K * B, C, 5, 3, dtype=dtype, requires_grad=True)
    torch.utils.checkpoint.checkpoint(model, input, use_reentrant=False).sum().backward()
    if targets:  # as each member's own, else as one that K turns move and move again
        for module, rows in zip(copies, input.detach().chunk(K)):
            module(rows)
            module(rows)
        expected = [torch.stack(tensors) for tensors in zip(*(module.buffers() for module in copies))]
    else:
        for rows in input.detach().chunk(K) * 2:
            copies[0](rows)
        expected = list(copies[0].buffers())
    torch.testing.assert_close(list(model.buffers()), expected)


@pytest.mark.parametrize("way", ["reference", "gain", "gain by reference"])
def test_checkpointed_last_moves_as_one_op_does_where_there_is_none(way):
    plain = torch.nn.Sequential(torch.nn.Conv2d(C, C, 1), torch.nn.BatchNorm2d(C))
    model = lp.expand(plain, K, targets=("rank1", "batch_norm"), noise_std=0.3)
    other = copy.deepcopy(model)
    input = torch.randn(K * B, C, 5, 3)
    torch.utils.checkpoint.checkpoint(model, input, use_reentrant=False).sum().backward()
    if way != "reference":
        lp.fuse(other)
        assert [fusion.pattern for fusion in lp.fusions(other)] == ["gain → BN"]
    lp.set_backend("native" if way == "gain" else "reference")
    try:
        torch.utils.checkpoint.checkpoint(other, input, use_reentrant=False).sum().backward()
    finally:
        lp.set_backend("auto")
    torch.testing.assert_close(list(other.buffers()), list(model.buffers()))
    assert (model[1].num_batches_tracked == 2).all()


def test_nothing_moves_for_no_rows_but_the_count():
    layer = lp.nn.EnsembleBatchNorm2d(C, K)
    layer(torch.empty(0, C, 5, 3))
    assert layer.num_batches_tracked.tolist() == [1] * K
    assert torch.equal(layer.running_mean, torch.zeros(K, C)) and torch.equal(layer.running_var, torch.ones(K, C))


def test_cumulative_average():
    layer = lp.nn.EnsembleBatchNorm2d(C, 1, momentum=None)
    plain = torch.nn.BatchNorm2d(C, momentum=None)
    for seed in range(4):
        torch.manual_seed(seed)
        input = torch.randn(B, C, 5, 3)
        layer(input)
        plain(input)
    torch.testing.assert_close(layer.running_var[0], plain.running_var)
    assert F.mse_loss(layer.running_mean[0], plain.running_mean) < 1e-12
