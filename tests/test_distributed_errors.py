"""What several ranks cannot do together says so on every rank, and a rank that dies ends the others."""

import os
import signal
import time

import pytest
import torch
import torch.nn.functional as F
from distributed_training import mesh_of, network
from ranks import run_on_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.optim import ZeroRedundancyOptimizer

import latephase_kernels as lp


def message_of(function, *arguments, **options):
    """Return what function raises, on this rank."""
    try:
        function(*arguments, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


def every_error_on_rank():
    rank = torch.distributed.get_rank()
    found = {}
    model = network()
    with torch.no_grad():
        model[3].weight[0, 0, 0, 0] += rank
    found["other values"] = message_of(lp.Distributed, model)
    found["other tensors"] = message_of(lp.Distributed, nn.Linear(2, 2, bias=rank == 0))
    found["batch_norm"] = message_of(lp.Distributed, network(), batch_norm="sync")
    found["names"] = message_of(lp.Distributed, network(), init_device_mesh("cpu", (2,), mesh_dim_names=("rows",)))
    expanded = lp.expand(network(), 2)
    found["expanded"] = message_of(lp.Distributed, expanded)

    model = network()
    distributed = lp.Distributed(model, mesh_of(2, 1), batch_norm="synchronized")
    found["plain rows"] = message_of(distributed.share, torch.zeros(7, 2))
    found["collapse"] = message_of(distributed.collapse)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found["members"] = message_of(distributed.expand, 3)
    found["targets"] = message_of(distributed.expand, 4, targets=("nowhere",))
    found["no target"] = message_of(distributed.expand, 4, targets=("group_norm",))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    distributed.expand(4)  # after errors it still works
    found["stacked rows"] = message_of(distributed.share, torch.zeros(10, 2))
    found["partial collapse"] = message_of(lp.collapse, model)
    found["partial average"] = message_of(model.eval(), torch.zeros(2, 2, 6, 6, dtype=torch.float64))
    model.train()

    x = torch.randn(4, 2, 6, 6, dtype=torch.float64)
    model(x).sum().backward()
    found["rows"] = message_of(distributed.reduce_gradients, rows=4 + rank)
    model[0].weight.grad = None if rank else torch.zeros_like(model[0].weight)
    found["gradients"] = message_of(distributed.reduce_gradients)
    sparse = nn.Embedding(3, 2, sparse=True)
    of_embedding = lp.Distributed(sparse)
    found["sparse"] = message_of(of_embedding.backward, sparse(torch.tensor([1])).sum())
    found["partial predict"] = message_of(lp.predict, model, torch.zeros(2, 2, 6, 6, dtype=torch.float64), members=0)

    with distributed.gathered():
        found["gathered"] = message_of(distributed.reduce_gradients)
        found["gathered collapse"] = message_of(distributed.collapse)

    halves = nn.Linear(2, 2, dtype=torch.bfloat16)
    of_halves = lp.Distributed(halves)
    halves(torch.ones(1, 2, dtype=torch.bfloat16)).sum().backward()
    found["rows of halves"] = message_of(of_halves.reduce_gradients, rows=4 + rank)
    halves.weight.grad = None if rank else halves.weight.grad
    found["gradients of halves"] = message_of(of_halves.reduce_gradients)

    model[3].weight.requires_grad_(False)
    found["frozen"] = message_of(distributed.reduce_gradients)
    distributed.collapse(mode="weights")
    found["collapsed"] = message_of(distributed.reduce_gradients)
    distributed = lp.Distributed(network())
    lp.expand(distributed.model, 2)
    found["expanded by hand"] = message_of(distributed.reduce_gradients)
    distributed = lp.Distributed(network(), mesh_of(2, 1))
    optimizer = ZeroRedundancyOptimizer(distributed.model.parameters(), torch.optim.SGD, lr=0.1)
    found["optimizer"] = message_of(distributed.expand, 2, optimizers=[optimizer])
    return found


def gradients_missing_on_a_member_rank():
    """Four ranks: member rank 1 lacks a base weight's gradient, on both its data ranks alike."""
    model = network()
    distributed = lp.Distributed(model, mesh_of(2, 2))
    distributed.expand(4)
    model(torch.randn(4, 2, 6, 6, dtype=torch.float64)).sum().backward()
    if distributed.member_rank == 1:
        model[0].weight.grad = None
    return message_of(distributed.reduce_gradients)


def stale_wrappers():
    """What DistributedDataParallel says that was made before expand or collapse, with the model anywhere inside."""
    model = network()
    before = nn.parallel.DistributedDataParallel(nn.Sequential(model))
    other = nn.parallel.DistributedDataParallel(network())
    x = torch.randn(4, 2, 6, 6, dtype=torch.float64)
    lp.expand(model, 2, targets="rank1")
    found = [message_of(before, x)]
    with torch.no_grad():
        found.append(message_of(before, x))
    found.append(message_of(other, x))
    after = nn.parallel.DistributedDataParallel(model)
    found.append(message_of(after, x))
    lp.collapse(model)
    return [*found, message_of(after, x)]


def test_wrappers_made_before_say_so():
    for expanded, without_gradients, other, after, collapsed in run_on_ranks(2, stale_wrappers):
        assert "RuntimeError: DistributedDataParallel: expand has replaced parameters of the model in it" in expanded
        assert "make a new one after collapse" in collapsed
        assert {without_gradients, other, after} == {"nothing raised"}


EXPECTED = {
    "other values": "every rank must have the same model, but ranks 0 and 1 have other values: 3.weight",
    "other tensors": "have other tensors: bias",
    "batch_norm": 'batch_norm must be "local" or "synchronized", got \'sync\'',
    "names": 'mesh must have dimensions "member", "data" or both',
    "expanded": "model must be plain, but it is expanded",
    "plain rows": "batch.size(0)=7 is not divisible by 2 data ranks",
    "collapse": "model is not expanded; call Distributed.expand first",
    "members": "ValueError: Distributed.expand: num_members=3 is not divisible by the 2 member ranks",
    "targets": "expand: targets must be",
    "no target": "targets must match modules of the model, but match none",
    "stacked rows": "batch.size(0)=10 is not divisible by 4 members times 1 data ranks",
    "partial collapse": "RuntimeError: collapse: this rank has only members",
    "partial average": "RuntimeError: members: this rank has only members",
    "rows": "every rank must have gradients of the same parameters, from the same number of rows",
    "gradients": "RuntimeError: Distributed: every rank must have gradients of the same parameters",
    "partial predict": "RuntimeError: predict: this rank has only members",
    "rows of halves": "every rank must have gradients of the same parameters, from the same number of rows",
    "gradients of halves": "RuntimeError: Distributed: every rank must have gradients of the same parameters",
    "frozen": "RuntimeError: Distributed.reduce_gradients: the model trains other parameters",
    "collapsed": "make a new Distributed to train a collapsed model",
    "expanded by hand": "expand and collapse by its own methods",
    "optimizer": "optimizers must not be a ZeroRedundancyOptimizer where ranks divide the members",
    "gathered": "RuntimeError: Distributed.reduce_gradients: inside `with distributed.gathered():`",
    "gathered collapse": "RuntimeError: Distributed.collapse: inside `with distributed.gathered():`",
    "sparse": "NotImplementedError: Distributed: gradients must be dense",
}


@pytest.fixture(scope="module")
def errors():
    found = run_on_ranks(2, every_error_on_rank)
    assert not any(isinstance(answer, str) for answer in found), found
    return found


@pytest.mark.parametrize("case", EXPECTED)
def test_every_rank_says_what_does_not_fit(errors, case):
    for answer in errors:
        assert EXPECTED[case] in answer[case]


def test_member_ranks_must_have_gradients_of_the_same_base_weights():
    for answer in run_on_ranks(4, gradients_missing_on_a_member_rank):
        assert "RuntimeError: Distributed: every rank must have gradients of the same parameters" in answer


def test_without_process_group():
    with pytest.raises(RuntimeError, match="there is no process group; call torch.distributed.init_process_group"):
        lp.Distributed(network())


# ---------------------------------------------------------------------------------------------- ranks that end


def until_the_other_rank_ends(how):
    """Train; in step 2 rank 1 is killed or stops answering. Return the seconds until rank 0 is told."""
    model = network()
    distributed = lp.Distributed(model)
    x = torch.randn(4, 2, 6, 6, dtype=torch.float64)
    for step in range(4):
        if step == 2 and torch.distributed.get_rank() == 1:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(4)
            return None
        started = time.perf_counter()
        try:
            distributed.backward(F.cross_entropy(model(x), torch.zeros(4, dtype=torch.long)))
        except RuntimeError:
            return time.perf_counter() - started
    return "nobody told"


@pytest.mark.parametrize("how, limit", [("killed", 30), ("silent", 30)])
def test_a_rank_that_ends_ends_the_others(how, limit):
    timeout = 60 if how == "killed" else 2  # a closed connection is seen at once, silence after the group's timeout
    seconds, other = run_on_ranks(2, until_the_other_rank_ends, how, timeout=timeout)
    assert other is None
    assert isinstance(seconds, float) and seconds < limit, seconds
