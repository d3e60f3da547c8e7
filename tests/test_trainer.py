"""The training loop: equal to a plain loop, resumable at every step, skipping whole steps; on tiny images."""

import copy
import dataclasses
import io

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import latephase_kernels as lp
from latephase_kernels.data import ImageSet
from latephase_kernels.train import evaluation
from latephase_kernels.train.evaluation import answers_of, dropout_logits_of, metrics_of, metrics_of_answers
from latephase_kernels.train.ranks import Ranks
from latephase_kernels.train.recipe import Data, Late, Model, Optimizer, Recipe, Schedule, Swa, check, recipe_names
from latephase_kernels.train.trainer import Trainer

K, B = 3, 4


pytestmark = pytest.mark.usefixtures("one_thread")


def data(seed=0):
    """26 images: 6 minibatches of 4 an epoch."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (26, 1, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.randint(3, (26,), generator=generator)
    return ImageSet(images, labels, ("a", "b", "c"), (0.5,), (0.3,))


def recipe(**changes):
    """Three epochs of 6 minibatches; T0 after 8, so that cycles of 3 cross the epochs' ends; one is left over."""
    given = {
        "data": Data(name="none", crop_padding=1, flip=True, cutout=2),
        "model": Model("small_resnet", {"widths": (4, 4)}),
        "batch_size": B,
        "epochs": 3,
        "optimizer": Optimizer(lr=0.1),
        "schedule": Schedule(1.0, 2.5, 0.01),
        "late": Late(start=8 / 6, members=K, weight_decay=1e-3, lr=0.05),
    }
    return check(Recipe(**{**given, **changes}))


def run(trainer):
    while trainer.minibatch < trainer.total:
        trainer.step()
    return trainer


def states_of(trainer):
    """Every tensor that training has left."""
    state = trainer.state_dict()
    leaves, _ = torch.utils._pytree.tree_flatten({k: v for k, v in state.items() if k != "random"})
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def assert_same(first, second):
    a, b = states_of(first), states_of(second)
    assert len(a) == len(b) > 20
    assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert first.state_dict()["late"] == second.state_dict()["late"]


@pytest.mark.parametrize("chunk", [None, 2])
def test_the_loop_is_the_methods_loop(chunk):
    """Written out with the public functions, no trainer."""
    late = Late(start=8 / 6, members=K, weight_decay=1e-3, lr=0.05, member_chunk=chunk, fuse=False)
    trainer = Trainer(recipe(late=late), data())
    model, batches = copy.deepcopy(trainer.model), trainer.batches
    optimizer = torch.optim.SGD(
        [{"params": list(model.parameters())}], lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    factor = lambda epoch: 1 + min(max(epoch - 1.0, 0.0) / 1.5, 1.0) * (0.01 / 0.1 - 1)  # noqa: E731
    first, total, of_members = 0, 0.0, torch.zeros(K)
    while first < 17:  # 8 plain ones and three cycles of 3; the eighteenth fills no cycle
        if first == 8:
            options = {"lr": 0.05, "weight_decay": 1e-3}
            lp.expand(model, K, targets=("batch_norm", "head"), optimizers=optimizer, member_options=options)
        count = 1 if first < 8 else K
        for group, lr in zip(optimizer.param_groups, (0.1, 0.05)):
            group["lr"] = lr * factor(first / 6)
        images, labels = batches.stack(first, count)
        optimizer.zero_grad()
        losses = F.cross_entropy(model(images), labels, reduction="none").view(count, -1).mean(1)
        losses.sum().backward()
        optimizer.step()
        total += losses.sum().item()
        of_members += losses.detach() if first >= 8 else 0.0
        first += count
    run(trainer)
    assert trainer.minibatch == 17 and trainer.total == 17
    for (name, value), expected in zip(trainer.model.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6, msg=name)
    mean, members, _ = trainer.read_loss()
    assert mean == pytest.approx(total / 17, rel=1e-5) and members == pytest.approx((of_members / 3).tolist(), rel=1e-5)
    assert trainer.read_loss() == (None, [], 0)


@pytest.mark.parametrize("swa", [None, 2.0])
def test_resuming_is_exact_at_every_step(swa):
    """Dropout draws from the global generator; SWA, momentum, the schedule and the sampler's position all matter."""
    options = {"depth": 10, "width": 1, "dropout": 0.2}
    given = recipe(swa=Swa(swa), model=Model("wide_resnet", options), late=Late(start=8 / 6, members=K))
    truth = Trainer(given, data())
    saved = []
    while truth.minibatch < truth.total:
        buffer = io.BytesIO()
        torch.save(truth.state_dict(), buffer)
        saved.append(buffer)
        truth.step()
    assert len(saved) == 8 + 3
    for buffer in saved[::2] + saved[-1:]:  # before T0, at it, between cycles, during SWA
        buffer.seek(0)
        torch.manual_seed(99), torch.randn(5)
        resumed = Trainer(given, data())
        resumed.load_state_dict(torch.load(buffer, weights_only=True))
        assert_same(run(resumed), truth)
        if swa is not None:
            a, b = resumed.final_model().state_dict(), truth.final_model().state_dict()
            assert all(torch.equal(a[name], b[name]) for name in b)
    other = run(Trainer(dataclasses.replace(given, seed=1), data()))
    assert not torch.equal(states_of(other)[0], states_of(truth)[0])


def test_averaging_may_begin_with_the_late_phase():
    """The epoch that ends at T0 trained the plain model, whose weights have no average with the members'."""
    trainer = run(Trainer(recipe(late=Late(start=2, members=K), swa=Swa(2)), data()))
    assert int(trainer.averaged.n_averaged) == 1 and trainer.minibatch == 18


def test_averaging_over_epochs():
    trainer = Trainer(recipe(swa=Swa(1.0), late=Late(start=None), epochs=4), data())
    history = []
    while trainer.minibatch < trainer.total:
        trainer.step()
        if trainer.minibatch % 6 == 0:
            history.append([p.detach().clone() for p in trainer.model.parameters()])
    for index, parameter in enumerate(trainer.final_model().parameters()):
        torch.testing.assert_close(parameter, sum(weights[index] for weights in history) / 4)
    model = trainer.final_model()
    first = torch.cat([trainer.batches.stack(24 + number, 1)[0] for number in range(6)])
    stem = model.conv(first)
    torch.testing.assert_close(model.norm.running_mean, stem.mean((0, 2, 3)))


@pytest.mark.parametrize("optimizer", [Optimizer(lr=0.1), Optimizer("adamw", lr=0.01)])
@pytest.mark.parametrize("bad_steps", [(0,), (5, 9)])
def test_a_step_that_is_not_finite_is_left_out_as_a_whole(optimizer, bad_steps, monkeypatch):
    """Steps number bad_steps get a NaN; the run equals one that never made them, statistics and momentum included."""
    given = recipe(optimizer=optimizer, skip_nonfinite=True)

    def poisoned(trainer, leave_out):
        stack, done = trainer.batches.stack, iter(range(100))
        number = -1
        while trainer.minibatch < trainer.total:
            number = next(done)
            if number in bad_steps and leave_out:
                trainer._expand_once() if trainer.minibatch >= trainer.t0 else None
                trainer.minibatch += trainer.num_members
                continue

            def with_nan(first, count, bad=number in bad_steps):
                images, labels = stack(first, count)
                if bad:
                    images[0, 0, 0, 0] = float("nan")
                return images, labels

            monkeypatch.setattr(trainer.batches, "stack", with_nan)
            trainer.step()
        return trainer

    with_bad, without = poisoned(Trainer(given, data()), False), poisoned(Trainer(given, data()), True)
    for (name, value), expected in zip(with_bad.model.state_dict().items(), without.model.state_dict().values()):
        assert torch.equal(value, expected), name
    for a, b in zip(with_bad.optimizer.state.values(), without.optimizer.state.values(), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in b)
    assert with_bad.read_loss()[2] == len(bad_steps)


def test_a_loss_that_is_not_finite_stops_the_run():
    trainer = Trainer(recipe(), data())
    trainer.step(), trainer.step()
    with torch.no_grad():
        trainer.model.conv.weight.fill_(float("inf"))
    trainer.step(), trainer.step()
    with pytest.raises(
        FloatingPointError, match=r"loss of minibatch 2 \(epoch 0.33\) is not finite; lower optimizer.lr"
    ):
        trainer.state_dict()
    with pytest.raises(FloatingPointError, match="loss of minibatch 2"):
        trainer.read_loss()


class NoWaiting(TorchDispatchMode):
    """Fails on what makes the host wait for the device: reading a value, and shapes that depend on values."""

    waiting = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "bincount")

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        assert operator.overloadpacket.__name__ not in self.waiting, f"{operator} waits for the device"
        return operator(*args, **kwargs or {})


@pytest.mark.parametrize(
    "changes", [{}, {"skip_nonfinite": True}, {"late": Late(start=8 / 6, members=K, member_chunk=2)}]
)
def test_a_step_waits_for_nothing(changes, monkeypatch):
    """Before T0, at it (expansion reads values: it is let pass) and after it."""
    trainer = Trainer(recipe(**changes), data())
    trainer.step()  # draws the first epoch
    for _ in range(5):
        with NoWaiting():
            trainer.step()
    while not trainer.expanded:
        trainer.step()
    with NoWaiting():
        trainer.step()
    add = trainer._record.add
    monkeypatch.setattr(trainer._record, "add", lambda losses, *more: (losses.sum().item(), add(losses, *more)))
    with pytest.raises(AssertionError, match="_local_scalar_dense.* waits for the device"), NoWaiting():
        trainer.step()


def test_metrics():
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.randint(4, (50,), generator=torch.Generator().manual_seed(1))
    found = metrics_of(logits.softmax(-1), labels)
    assert found["accuracy"] == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item())
    assert found["nll"] == pytest.approx(F.cross_entropy(logits, labels).item())
    p = logits.softmax(-1)
    assert found["brier"] == pytest.approx(((p - F.one_hot(labels, 4)) ** 2).sum(1).mean().item())
    confidence, predicted = p.max(1)
    gaps = 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if inside.any():
            gaps += abs((predicted == labels)[inside].double().sum() - confidence[inside].sum()).item()
    assert found["ece"] == pytest.approx(100 * gaps / 50, rel=1e-5)


def test_evaluation_of_members():
    trainer = run(Trainer(recipe(), data()))
    images = trainer.batches.images
    found = metrics_of_answers(answers_of(trainer.model, images, batch_size=10), images.labels)
    assert list(found) == ["averaged", "ensemble", "members", "member 0", "member 1", "member 2"]
    assert trainer.model.training
    x = torch.cat([batch for batch, _ in images.batches(7)])
    everyone = torch.stack([lp.predict(trainer.model, x, members=k) for k in range(K)])
    for k in range(K):
        assert found[f"member {k}"]["nll"] == pytest.approx(
            F.cross_entropy(everyone[k], images.labels).item(), rel=1e-5
        )
    ensemble = everyone.softmax(-1).mean(0)
    assert found["ensemble"]["nll"] == pytest.approx(F.nll_loss(ensemble.log(), images.labels).item(), rel=1e-5)
    mean = sum(found[f"member {k}"]["brier"] for k in range(K)) / K
    assert found["members"]["brier"] == pytest.approx(mean)


def test_evaluation_reads_each_image_once(monkeypatch):
    trainer = run(Trainer(recipe(), data()))
    images, given = trainer.batches.images, []
    whole = answers_of(trainer.model, images, batch_size=10)
    expected = metrics_of_answers(whole, images.labels), whole.entropies(), whole.disagreement()
    batches = images.batches
    monkeypatch.setattr(images, "batches", lambda size: (given.append(len(x[1])) or x for x in batches(size)))
    monkeypatch.setattr(evaluation, "IMAGES_AT_ONCE", 7)
    answers = answers_of(trainer.model, images, batch_size=10)
    assert sum(given) == len(images.labels)
    found = metrics_of_answers(answers, images.labels), answers.entropies(), answers.disagreement()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("late", [Late(start=None), Late(start=8 / 6, members=K)])
def test_dropout_passes(late):
    """MC-dropout is the mean over passes that drop and else predict as the averaged model; it leaves nothing behind."""
    given = recipe(model=Model("small_resnet", {"widths": (4, 4), "dropout": 0.5}), late=late, dropout_passes=4)
    trainer = run(Trainer(given, data()))
    model, images = trainer.model, trainer.batches.images
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    answers = answers_of(model, images, 10, dropout_passes=4, seed=3)
    assert torch.equal(torch.get_rng_state(), state) and model.training and model.blocks[0].drop.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert answers.dropout.shape == (4, 26, 3)
    assert not any(torch.equal(answers.dropout[k], answers.dropout[k - 1]) for k in range(4))
    again = answers_of(model, images, 10, dropout_passes=4, seed=3).dropout
    assert torch.equal(again, answers.dropout)
    found = metrics_of_answers(answers, images.labels)
    expected = answers.dropout.double().softmax(-1).mean(0)
    assert found["MC-dropout"]["nll"] == pytest.approx(F.nll_loss(expected.log(), images.labels).item())
    for block in model.blocks:
        block.drop.p = 1e-9  # dropout layers run, and drop nothing
    torch.testing.assert_close(dropout_logits_of(model, images, 10, passes=1, seed=0)[0], answers.averaged)
    assert "MC-dropout" not in metrics_of_answers(answers_of(model, images, 10), images.labels)


def test_dropout_passes_need_dropout():
    with pytest.raises(ValueError, match="dropout_passes must be 0 for a network without dropout, got 2; give it"):
        Trainer(recipe(dropout_passes=2), data())


def test_a_graph_needs_one_process():
    ranks = Ranks(torch.device("cpu"))
    ranks.num_ranks = 2
    with pytest.raises(ValueError, match="cuda_graph must be false on several processes, got 2"):
        Trainer(recipe(cuda_graph=True), data(), ranks=ranks)


@pytest.mark.parametrize(
    "changes, option",
    [
        ({"epochs": 0}, "epochs"),
        ({"dropout_passes": -1}, "dropout_passes"),
        ({"late": Late(start=3)}, "late.start"),
        ({"late": Late(start=2), "swa": Swa(1)}, "swa.start"),
        ({"late": Late(start=1, members=0)}, "late.members"),
        ({"late": Late(start=1, members=2, member_chunk=3)}, "late.member_chunk"),
        ({"precision": "float8"}, "precision"),
        ({"schedule": Schedule(2, 1, 0.1)}, "schedule.anneal_end"),
        ({"schedule": Schedule(end_lr=-1)}, "schedule.end_lr"),
        ({"schedule": Schedule(drop_epochs=[-5])}, "schedule.drop_epochs"),
        ({"late": Late(start=1, members=2, noise_std=-1)}, "late.noise_std"),
        ({"late": Late(start=1, members=2, base_grad_scale="foo")}, "late.base_grad_scale"),
        ({"late": Late(start=1, members=2, base_grad_scale=float("inf"))}, "late.base_grad_scale"),
        ({"late": Late(start=1, members=2, member_state="foo")}, "late.member_state"),
        ({"late": Late(start=1, members=2, lr=-1)}, "late.lr"),
        ({"late": Late(start=1, members=2, weight_decay=-1)}, "late.weight_decay"),
        ({"optimizer": Optimizer(weight_decay=-1)}, "optimizer.weight_decay"),
        ({"optimizer": Optimizer(momentum=0)}, "optimizer.nesterov"),
        ({"data": Data("digits", crop_padding=-1)}, "data.crop_padding"),
        ({"data": Data("digits", num_train=0)}, "data.num_train"),
        ({"label_smoothing": 2}, "label_smoothing"),
        ({"checkpoint_minutes": -1}, "checkpoint_minutes"),
        ({"seed": 2**64}, "seed"),
    ],
)
def test_recipes_that_do_not_fit(changes, option):
    with pytest.raises(ValueError, match=f"train: {option} must be "):
        recipe(**changes)


def test_there_are_recipes():
    assert {"cifar10", "cifar100", "cifar10_swa", "cifar100_wide_swa", "digits"} <= set(recipe_names())
