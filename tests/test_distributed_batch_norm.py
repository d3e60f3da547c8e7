"""Batch norm with the statistics of two ranks against PyTorch's on all their rows."""

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_close
from ranks import run_on_ranks
from torch import nn
from torch.utils.checkpoint import checkpoint

import latephase_kernels as lp
import latephase_kernels.ops.ensemble_batch_norm_synchronized as synchronized_op
from latephase_kernels.late_phase.rank_statistics import mean_over_ranks
from latephase_kernels.nn import EnsembleSyncBatchNorm, SharedSyncBatchNorm
from latephase_kernels.ops.ensemble_batch_norm_synchronized import StatisticsGroup
from latephase_kernels.reference import precision

RANKS, K, B, C = 2, 2, 4, 67  # members; rows a member over all ranks; channels
CASES = [  # backend, dtype, channels_last, residual and ReLU or "gain" and ReLU, weight shared by the members
    ("native", torch.float64, False, True, False),
    ("native", torch.float32, True, True, True),
    ("native", torch.bfloat16, False, False, False),
    ("reference", torch.float64, True, True, True),
    ("many ranks", torch.float32, False, True, False),
    ("native", torch.float32, False, "gain", False),
    ("native", torch.bfloat16, True, "gain", True),
    ("reference", torch.float64, False, "gain", False),
]


def make_inputs(dtype, channels_last, residual, shared):
    """x, residual, dy [K·B, C, 3, 3]; weight, bias, gain [K, C] or [C]; the mean is far from 0 and differs by rank."""
    generator = torch.Generator().manual_seed(0)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def image():
        x = torch.randn(K * B, C, 3, 3, generator=generator, dtype=torch.float64)
        return x.to(dtype).contiguous(memory_format=memory_format)

    rows = torch.arange(B, dtype=torch.float64).repeat(K).view(-1, 1, 1, 1)
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias, gain = (
        torch.randn((C,) if shared else (K, C), generator=generator, dtype=parameter) for _ in range(3)
    )
    inputs = {"x": (image() + 10 + rows).to(dtype), "dy": image(), "weight": weight, "bias": bias}
    return {**inputs, **({"gain": gain} if residual == "gain" else {"residual": image()} if residual else {})}


def own_rows(tensor):
    return tensor.unflatten(0, (K, RANKS, -1))[:, torch.distributed.get_rank()].flatten(0, 1)


def differentiate(function, inputs):
    """Return y, running statistics and every gradient of y = function(x, residual, weight, bias, gain, mean, var)."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items() if name != "dy"}
    statistics = [torch.full((K, C), value, dtype=inputs["weight"].dtype) for value in (0.0, 1.0)]
    y = function(leaves["x"], leaves.get("residual"), leaves["weight"], leaves["bias"], leaves.get("gain"), *statistics)
    y.backward(inputs["dy"])
    grads = {f"d{name}": leaf.grad for name, leaf in leaves.items()}
    return {"y": y.detach(), "mean": statistics[0], "var": statistics[1], **grads}


def on_rank():
    group = StatisticsGroup()

    def synchronized(x, residual, weight, bias, gain, mean, var):
        activation = "hardswish" if residual is None and gain is None else "relu"
        weight, bias = (torch.stack([t, t], -1)[..., 0] for t in (weight, bias))  # with strides
        return lp.functional.ensemble_batch_norm(
            x, mean, var, weight, bias, True, num_members=K, residual=residual, activation=activation,
            output_gain=gain, group=group,
        )  # fmt: skip

    answers = []  # of a process of this test alone
    for backend, *case in CASES:
        synchronized_op.MOST_GATHERED = 1 if backend == "many ranks" else 16
        lp.set_backend("native" if backend == "many ranks" else backend)
        inputs = make_inputs(*case)
        answers.append(
            differentiate(
                synchronized, {n: t if n in ("weight", "bias", "gain") else own_rows(t) for n, t in inputs.items()}
            )
        )
    return answers


def of_all_rows(x, residual, weight, bias, gain, mean, var):
    parts = x.chunk(K)
    weights, biases = (p.expand(K, C) for p in (weight, bias))
    y = torch.cat([F.batch_norm(parts[k], mean[k], var[k], weights[k], biases[k], True) for k in range(K)])
    if gain is not None:
        y = F.relu(y).unflatten(0, (K, -1)) * gain.to(y.dtype).expand(K, C)[:, None, :, None, None]
        return y.flatten(0, 1)
    return F.hardswish(y) if residual is None else F.relu(y + residual)


@pytest.fixture(scope="module")
def answers():
    found = run_on_ranks(RANKS, on_rank)
    assert not any(isinstance(answer, str) for answer in found), found
    return found


@pytest.mark.parametrize("case", range(len(CASES)))
def test_statistics_of_all_ranks(answers, case):
    inputs = make_inputs(*CASES[case][1:])
    plain = differentiate(of_all_rows, inputs)
    truth = differentiate(of_all_rows, {name: tensor.double() for name, tensor in inputs.items()})
    first, second = (answer[case] for answer in answers)
    result = {}
    for name in truth:
        if name in ("dweight", "dbias", "dgain"):  # of own rows: the ranks' are added where all gradients are
            result[name] = first[name] + second[name]
        elif name in ("mean", "var"):
            assert torch.equal(first[name], second[name])
            result[name] = first[name]
        else:
            parts = [rank[name].unflatten(0, (K, -1)) for rank in (first, second)]
            result[name] = torch.stack(parts, 1).flatten(0, 2)
    assert_close(result, plain, truth)


# ---------------------------------------------------------------------------------------------- nn.SyncBatchNorm


def sync_layers_on_rank():
    """Both classes, and one that a checkpoint runs twice."""
    generator = torch.Generator().manual_seed(0)
    x = own_rows(torch.randn(K * B, C, 3, generator=generator, dtype=torch.float64))
    plain = nn.SyncBatchNorm(C).double()
    layers = [EnsembleSyncBatchNorm.from_module(plain, K), SharedSyncBatchNorm.from_module(plain, K)]
    twice = EnsembleSyncBatchNorm.from_module(nn.SyncBatchNorm(C).double(), K)
    checkpoint(twice, x.clone().requires_grad_(), use_reentrant=False).sum().backward()
    outputs = [layer(x).detach() for layer in layers]
    return [*outputs, layers[0].running_var, plain.running_var, twice.running_var]


def test_sync_layers():
    answers = run_on_ranks(RANKS, sync_layers_on_rank)
    assert not any(isinstance(answer, str) for answer in answers), answers
    x = torch.randn(K * B, C, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = [nn.BatchNorm1d(C).double() for _ in range(K)]
    expected = torch.cat([layer(part) for layer, part in zip(plain, x.chunk(K))])
    one_after_another = nn.BatchNorm1d(C).double()
    for part in x.chunk(K):
        one_after_another(part)
    for place in range(2):
        found = torch.stack([answer[place].unflatten(0, (K, -1)) for answer in answers], 1).flatten(0, 2)
        torch.testing.assert_close(found, expected.detach())
    for answer in answers:
        torch.testing.assert_close(answer[2], torch.stack([layer.running_var for layer in plain]))
        torch.testing.assert_close(answer[3], one_after_another.running_var)
    for layer, part in zip(plain, x.chunk(K)):
        layer(part)
    for answer in answers:
        torch.testing.assert_close(answer[4], torch.stack([layer.running_var for layer in plain]))


def uneven_on_rank():
    rows = 2 + torch.distributed.get_rank()
    lp.functional.ensemble_batch_norm(
        torch.randn(rows, C), None, None, training=True, num_members=1, group=StatisticsGroup()
    )


def test_uneven_rows_are_refused_on_every_rank():
    for answer in run_on_ranks(RANKS, uneven_on_rank):
        assert "ValueError: ensemble_batch_norm: every rank must hold the same number of rows" in answer
        assert "got [2.0, 3.0] values a channel" in answer


@pytest.mark.parametrize("devices, dtype", [(("cpu",), torch.float64), ((), torch.float32)])
def test_the_mean_over_ranks_is_of_what_the_device_has(monkeypatch, devices, dtype):
    messages = []
    monkeypatch.setattr(precision, "_WITH_FLOAT64", devices)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flat, group: messages.append(flat.add_(1)))
    (mean,) = mean_over_ranks([torch.ones(3, dtype=torch.bfloat16)], None)
    assert messages[0].dtype == dtype and mean.dtype == torch.bfloat16 and mean.eq(1).all()
