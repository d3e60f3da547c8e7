"""A run's state, written by some ranks through torch.distributed.checkpoint and read by others."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from distributed_training import K, batches, make_optimizer, mesh_of, network
from ranks import run_on_ranks

import latephase_kernels as lp

STEPS = 2


def begin(member_ranks, data_ranks):
    model = network()
    optimizer = make_optimizer(model)
    distributed = lp.Distributed(model, mesh_of(member_ranks, data_ranks), batch_norm="synchronized")
    distributed.expand(K, optimizers=[optimizer], noise_std=0.1, generator=torch.Generator().manual_seed(0))
    return distributed, optimizer


def train(distributed, optimizer, first):
    for images, labels in list(batches(first + STEPS, K))[first:]:
        optimizer.zero_grad()
        output, target = distributed.model(distributed.share(images)), distributed.share(labels)
        distributed.backward(lp.member_loss(F.cross_entropy, output, target, num_members=len(distributed.members)))
        optimizer.step()


def with_momentum(optimizer):
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def train_save_and_load(member_ranks, data_ranks, folder, saved, save_to):
    """Go on from checkpoint `saved`, if any, train, save; return every tensor of the state, gathered."""
    distributed, optimizer = begin(member_ranks, data_ranks)
    if saved is not None:
        with_momentum(optimizer)
        state = distributed.state_dict(optimizer)
        dcp.load(state, checkpoint_id=f"{folder}/{saved}")
        distributed.load_state_dict(state, optimizer)
    train(distributed, optimizer, 0 if saved is None else STEPS)
    state = distributed.state_dict(optimizer)
    if save_to is not None:
        dcp.save(state, checkpoint_id=f"{folder}/{save_to}")

    return whole_state(state)


def whole_state(state):
    """Every tensor, with all members."""
    momenta = {
        f"momentum {place}": values["momentum_buffer"] for place, values in state["optimizers"][0]["state"].items()
    }
    return {
        name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()
        for name, tensor in (state["model"] | momenta).items()
    }


@pytest.mark.parametrize("ranks", [(2, 2), (2, 1), (1, 1)])
def test_another_number_of_ranks_goes_on(ranks, saved_by_four):
    folder, expected = saved_by_four
    answers = run_on_ranks(ranks[0] * ranks[1], train_save_and_load, *ranks, str(folder), "four", None)
    for answer in answers:
        assert not isinstance(answer, str), answer
        assert answer.keys() == expected.keys()
        for name, value in expected.items():
            if ranks == (2, 2):  # the same ranks: the same bits
                assert torch.equal(answer[name], value), name
            torch.testing.assert_close(answer[name], value, rtol=1e-11, atol=1e-13)


def train_through(member_ranks, data_ranks):
    distributed, optimizer = begin(member_ranks, data_ranks)
    train(distributed, optimizer, 0)
    train(distributed, optimizer, STEPS)
    return whole_state(distributed.state_dict(optimizer))


@pytest.fixture(scope="module")
def saved_by_four(tmp_path_factory):
    """A checkpoint of 2 × 2 ranks, and what they have at the end when nothing is saved."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for answer in run_on_ranks(4, train_save_and_load, 2, 2, str(folder), None, "four"):
        assert not isinstance(answer, str), answer
    through = run_on_ranks(4, train_through, 2, 2)
    assert not isinstance(through[0], str), through[0]
    return folder, through[0]
