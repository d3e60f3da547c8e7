"""What a step is made of: accumulated minibatches, captured passes, learning rates in steps."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from test_trainer import K, assert_same, data, recipe, run

import latephase_kernels as lp
from latephase_kernels.train import trainer as trainer_module
from latephase_kernels.train.cuda_graph import WARMUP_STEPS, GraphedPasses
from latephase_kernels.train.recipe import Late, Optimizer, Schedule
from latephase_kernels.train.schedule import learning_rate_factor
from latephase_kernels.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

# ------------------------------------------------------------------------------------------ accumulation


@pytest.mark.parametrize("scale", ["sum", "mean"])
@pytest.mark.parametrize("chunk", [None, 2])
def test_accumulated_minibatches(scale, chunk):
    """Two turns of three members, written out with one member and minibatch at a time."""
    late = Late(start=2 / 6, members=K, base_grad_scale=scale, weight_decay=1e-3, member_chunk=chunk, fuse=False)
    trainer = Trainer(recipe(late=late, accumulate=2, epochs=4), data())
    assert (trainer.t0, trainer.total) == (2, 20)  # 24, less what fills no cycle of 6 after T0
    assert trainer.step() == 2
    trainer._expand_once()
    parameters = dict(trainer.model.named_parameters())
    batches = trainer.batches
    expected = {name: torch.zeros_like(p) for name, p in parameters.items()}
    totals = [0.0] * K
    for turn in range(2):
        for k in range(K):
            images, labels = batches.stack(2 + turn * K + k, 1)
            with lp.members(trainer.model, range(k, k + 1)):
                loss = F.cross_entropy(trainer.model(images), labels)
            for (name, _), gradient in zip(parameters.items(), torch.autograd.grad(loss, list(parameters.values()))):
                expected[name] += gradient / 2
            totals[k] += loss.item()
    trainer.read_loss()
    found = {}
    trainer.optimizer.register_step_pre_hook(  # behind the one that applies γ
        lambda *_: found.update({name: p.grad.clone() for name, p in parameters.items()})
    )
    assert trainer.step() == 2 * K and trainer.minibatch == 8
    members = {id(p) for group in trainer.optimizer.param_groups if group.get("of members") for p in group["params"]}
    for name, parameter in parameters.items():
        gamma = 1 / K if scale == "mean" and id(parameter) not in members else 1.0
        torch.testing.assert_close(found[name], gamma * expected[name], rtol=1e-4, atol=1e-6)
    mean, of_members, _ = trainer.read_loss()
    assert mean == pytest.approx(sum(totals) / 6, rel=1e-4)
    assert of_members == pytest.approx([total / 2 for total in totals], rel=1e-4)


def test_plain_minibatches_are_accumulated_too():
    given = recipe(late=Late(start=None), accumulate=4)
    trainer = Trainer(given, data())
    assert trainer.total == 16 and [trainer.step() for _ in range(4)] == [4, 4, 4, 4]
    assert trainer.minibatch == trainer.total


# ------------------------------------------------------------------------------------------ graphs


def capture_on_cpu(function):
    """In a graph's place: what is launched is launched again, into the same memory, gradients overwritten."""
    parameters = capture_on_cpu.parameters
    model_state = {name: tensor.clone() for name, tensor in capture_on_cpu.model.state_dict().items()}
    result = function()
    gradients = [parameter.grad for parameter in parameters()]
    for name, tensor in capture_on_cpu.model.state_dict().items():  # capturing runs nothing
        tensor.copy_(model_state[name])
    with torch.no_grad():
        result.fill_(float("nan"))
        for gradient in gradients:
            gradient.fill_(float("nan"))
    capture_on_cpu.captured += 1

    def replay():
        for parameter in parameters():
            parameter.grad = None
        result.copy_(function())
        for parameter, gradient in zip(parameters(), gradients):
            gradient.copy_(parameter.grad)
            parameter.grad = gradient
        capture_on_cpu.replayed += 1

    return replay, result


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"accumulate": 2},
        {"skip_nonfinite": True},
        {"late": Late(start=None)},
        {"late": Late(start=8 / 6, members=1)},  # another phase, the same shapes
        {"optimizer": Optimizer("adamw", 0.01)},
    ],
)
def test_captured_passes_train_as_others_do(changes):
    """Static inputs are refilled, gradients found where they are, and a phase has a graph of its own."""
    plain = run(Trainer(recipe(epochs=6, **changes), data()))
    graphed = Trainer(recipe(epochs=6, **changes), data())
    graphed._graphed = GraphedPasses(capture_on_cpu)
    capture_on_cpu.model, capture_on_cpu.parameters = graphed.model, graphed.model.parameters
    capture_on_cpu.captured = capture_on_cpu.replayed = 0
    steps = 0
    while graphed.minibatch < graphed.total:
        graphed.step()
        steps += 1
    assert_same(plain, graphed)
    phases = 2 if graphed.expanded else 1
    assert capture_on_cpu.captured == phases
    assert capture_on_cpu.replayed == steps - phases * WARMUP_STEPS


def test_a_graph_is_for_one_phase_and_shape():
    graphed = GraphedPasses(capture_on_cpu)
    model = torch.nn.Linear(3, 1)
    capture_on_cpu.model, capture_on_cpu.parameters, capture_on_cpu.captured = model, model.parameters, 0

    for phase, rows in 5 * [(1, 2)] + 5 * [(1, 5)] + 5 * [(2, 5)]:

        def passes(x, power=phase):
            loss = model(x).square().mean() ** power
            loss.backward()
            return loss.detach()

        x = torch.randn(rows, 3)
        loss = graphed(phase, passes, [x], model.parameters)
        found = [parameter.grad.clone() for parameter in model.parameters()]
        expected = model(x).square().mean() ** phase
        torch.testing.assert_close(loss, expected.detach())
        for gradient, other in zip(found, torch.autograd.grad(expected, list(model.parameters()))):
            torch.testing.assert_close(gradient, other)
    assert capture_on_cpu.captured == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("changes", [{}, {"accumulate": 2}, {"skip_nonfinite": True}, {"precision": "bfloat16"}])
def test_graphs_on_a_gpu(changes):
    plain = run(Trainer(recipe(epochs=6, **changes), data(), "cuda"))
    graphed = run(Trainer(recipe(epochs=6, cuda_graph=True, **changes), data(), "cuda"))
    for (name, value), expected in zip(graphed.model.state_dict().items(), plain.model.state_dict().values()):
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-4, msg=name)
    assert graphed.read_loss()[0] == pytest.approx(plain.read_loss()[0], rel=1e-2)


def test_graphs_need_a_gpu():
    with pytest.raises(ValueError, match="cuda_graph must be false on cpu: only a GPU captures graphs"):
        Trainer(recipe(cuda_graph=True), data())


# ------------------------------------------------------------------------------------------ learning rates


@pytest.mark.parametrize(
    "epoch, expected", [(0, 1.0), (9.99, 1.0), (10, 0.1), (15, 0.1), (20, 0.01), (25, 0.0055), (30, 0.001), (40, 0.001)]
)
def test_drops_multiply_the_annealed_rate(epoch, expected):
    schedule = Schedule(20, 30, 0.05, drop_epochs=[10, 20])  # from 0.5, to a tenth
    assert learning_rate_factor(schedule, Optimizer(lr=0.5), epoch) == pytest.approx(expected)


def test_the_first_step_of_an_epoch_has_its_rate():
    """At a drop, and at an annealing of no length."""
    trainer = Trainer(recipe(late=Late(start=None), schedule=Schedule(2, 2, 0.05, drop_epochs=[1])), data())
    rates = []
    trainer.optimizer.register_step_pre_hook(lambda *_: rates.append(trainer.optimizer.param_groups[0]["lr"]))
    run(trainer)
    assert rates == pytest.approx(6 * [0.1] + 6 * [0.01] + 6 * [0.005])


@pytest.mark.parametrize("follow", [True, False])
def test_members_follow_or_keep_their_rate(follow):
    schedule = Schedule(3, 3, 0.1, drop_epochs=[2], members_follow=follow)
    trainer = Trainer(recipe(schedule=schedule), data())
    run(trainer)
    rates = {bool(group.get("of members")): group["lr"] for group in trainer.optimizer.param_groups}
    assert rates[False] == pytest.approx(0.01)
    assert rates[True] == pytest.approx(0.005 if follow else 0.05)


def test_rates_go_on_after_a_checkpoint():
    given = recipe(schedule=Schedule(3, 3, 0.1, drop_epochs=[2], members_follow=False))
    whole, first = Trainer(given, data()), Trainer(given, data())
    run(whole)
    for _ in range(9):
        first.step()
    second = Trainer(given, data())
    second.load_state_dict(first.state_dict())
    assert_same(whole, run(second))


def test_a_text_carries_a_state():
    from latephase_kernels.data import TextSet
    from latephase_kernels.train.recipe import Model

    text = torch.randint(5, (4000,), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    train = TextSet(text, text, text, b"abcde")
    late = Late(start=None)
    given = recipe(model=Model("char_lstm", {"hidden_size": 4}), late=late, data=dataclasses.replace(recipe().data))
    for changes in ({"accumulate": 2}, {"cuda_graph": True}):
        with pytest.raises(ValueError, match="accumulate must be 1 and cuda_graph false for a text"):
            trainer_module.Trainer(dataclasses.replace(given, **changes), train)
