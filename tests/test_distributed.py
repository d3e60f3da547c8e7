"""Several ranks train what one process trains: gloo processes on the CPU, float64."""

import pytest
import torch
from distributed_training import K, train_alone, train_on_ranks
from ranks import run_on_ranks

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
