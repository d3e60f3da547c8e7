"""Several ranks train what one process trains: gloo processes on the CPU, float64."""

import warnings

import pytest
import torch
from distributed_training import K, mesh_of, network, train_alone, train_on_ranks
from ranks import run_on_ranks
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

import latephase_kernels as lp

CLOSE = dict(rtol=1e-9, atol=1e-11)


def assert_states_close(found, expected, members):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        own = value
        if name.startswith("momentum") and found[name].shape != value.shape:  # never gathered: this rank's members
            own = value[members.start : members.stop]
        torch.testing.assert_close(found[name], own, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    "member_ranks, data_ranks, batch_norm, targets, scale, chunk",
    [
        (1, 2, "synchronized", ("batch_norm", "head"), "sum", None),
        (2, 1, "synchronized", ("batch_norm", "head"), "mean", None),
        (2, 2, "synchronized", ("batch_norm",), "mean", 1),
        (4, 1, "synchronized", ("head",), "sum", None),
        (2, 2, "local", ("head",), "sum", 1),
        (1, 4, "local", ("batch_norm", "head"), "mean", 3),
    ],
)
def test_ranks_train_what_one_process_trains(member_ranks, data_ranks, batch_norm, targets, scale, chunk):
    ranks = member_ranks * data_ranks
    shares = (ranks, data_ranks) if batch_norm == "local" else (1, 1)
    expected, expected_plain = train_alone(targets, scale, shares)
    answers = run_on_ranks(ranks, train_on_ranks, member_ranks, data_ranks, batch_norm, targets, scale, chunk)
    for answer in answers:
        assert not isinstance(answer, str), answer
        members, state, plain = answer
        assert len(members) == K // member_ranks
        assert_states_close(state, expected, members)
        assert_states_close(plain, expected_plain, members)
        assert all(torch.equal(plain[name], answers[0][2][name]) for name in plain)  # the same bits on every rank


def expanded_with_noise():
    """What was warned of, a noisy member and numbers drawn afterwards, twice from the same seed."""
    answers = []
    for _ in range(2):
        distributed = lp.Distributed(network())
        torch.manual_seed(3)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            distributed.expand(2, noise_std=0.1)
        weight = distributed.model[1].weight.detach()
        answers.append(([str(warning.message) for warning in warned], weight, torch.rand(3), torch.initial_seed()))
    return answers


def test_noise_comes_from_the_default_generator():
    (first, second), (other, _) = run_on_ranks(2, expanded_with_noise)
    for answer in (first, second, other):
        assert answer[0] == [] and answer[3] == 3
        assert torch.equal(answer[1], first[1]) and torch.equal(answer[2], first[2])


def steps_with_an_overflow():
    """Three steps of which one overflows in a late-phase gradient of rank 1; return the base weights and the scale."""
    torch.manual_seed(0)
    model = network()
    distributed = lp.Distributed(model, mesh_of(2, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    distributed.expand(2, optimizers=[optimizer])
    scaler = ShardedGradScaler("cpu", init_scale=4.0)
    for step in range(3):
        optimizer.zero_grad()
        distributed.backward(scaler.scale(model(torch.ones(2, 2, 6, 6, dtype=torch.float64)).sum()))
        if step == 1 and distributed.rank == 1:
            model[1].weight.grad.fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update()
    return model[0].weight.detach(), scaler.get_scale()


def test_a_sharded_grad_scaler_leaves_a_step_out_on_every_rank():
    (first, scale), (second, other_scale) = run_on_ranks(2, steps_with_an_overflow)
    assert torch.equal(first, second) and scale == other_scale == 2.0
