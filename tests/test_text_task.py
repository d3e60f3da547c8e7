"""Training on text: equal to the loop over members, resumable within a pass, whole steps skipped; on a tiny text."""

import copy
import dataclasses
import io
import math

import pytest
import torch
import torch.nn.functional as F

import latephase_kernels as lp
from latephase_kernels.data import TextBatches, split_text
from latephase_kernels.models import CharLSTM
from latephase_kernels.train.recipe import Data, Late, Model, Optimizer, Recipe, Schedule, Swa, Text, check
from latephase_kernels.train.text_task import _mean_bits, bits_per_character, evaluation_windows
from latephase_kernels.train.trainer import Trainer

K, B, S, H = 3, 2, 5, 4
PASS = 27  # minibatches: 9 stacked steps


def text():
    """310 symbols; 279 of them to train on."""
    generator = torch.Generator().manual_seed(0)
    return split_text(bytes(torch.randint(97, 103, (310,), generator=generator).tolist()))


def recipe(**changes):
    """Two passes of 27 minibatches; T0 within the first, after 12."""
    given = {
        "data": Data("text_file"),
        "text": Text(window=S),
        "model": Model("char_lstm", {"hidden_size": H, "embedding_size": 3}),
        "batch_size": B,
        "epochs": 2,
        "optimizer": Optimizer(lr=0.5, momentum=0.9, nesterov=False, weight_decay=1e-3),
        "schedule": Schedule(1.0, 2.0, 0.1),
        "late": Late(start=12.5 / PASS, members=K, targets=["rank1:lstm"], lr=0.25, noise_std=0.1),
    }
    return check(Recipe(**{**given, **changes}))


def run(trainer):
    while trainer.minibatch < trainer.total:
        trainer.step()
    return trainer


def tensors_of(trainer, but=()):
    state = trainer.state_dict()
    leaves, _ = torch.utils._pytree.tree_flatten({k: v for k, v in state.items() if k not in ("random", *but)})
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def with_gains(model, k):
    """The plain LSTM's weights times member k's gains, differentiable; of a Rank1LSTM."""
    weights = []
    for name in model._flat_weights_names:
        weight = model._parameters[name]
        if name.startswith("weight"):
            s, r = (model._parameters[name.replace("weight", gain)][k] for gain in ("input_gain", "output_gain"))
            weight = weight * r[:, None] * s
        weights.append(weight)
    return weights


@pytest.mark.parametrize("chunk, clip", [(None, None), (2, None), (None, 0.05)])
def test_the_loop_is_the_methods_loop(chunk, clip):
    """Member after member through torch.lstm with weights multiplied out, in float64, states carried."""
    late = dataclasses.replace(recipe().late, member_chunk=chunk)
    given = recipe(late=late, optimizer=dataclasses.replace(recipe().optimizer, clip_norm=clip))
    trainer = Trainer(given, text())
    assert (trainer.batches.minibatches_per_epoch, trainer.t0, trainer.total) == (PASS, 12, 2 * PASS)
    trainer.model.double()
    model = copy.deepcopy(trainer.model)
    windows = {n: TextBatches(text().train, B, S, num_members=n) for n in (1, K)}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, weight_decay=1e-3)
    states, total, minibatch = None, 0.0, 0
    while minibatch < 2 * PASS:
        members = 1 if minibatch < 12 else K
        if minibatch == 12:
            lp.expand(
                model,
                K,
                targets=lambda name, _: "rank1" if name == "lstm" else False,
                noise_std=0.1,
                generator=torch.Generator().manual_seed(0),
                optimizers=optimizer,
                member_options={"lr": 0.25},
            )
        if minibatch in (0, 12, PASS):
            states = [(torch.zeros(1, B, H, dtype=torch.float64),) * 2] * members
        done = min(max(minibatch / PASS - 1.0, 0.0), 1.0)
        for group, lr in zip(optimizer.param_groups, (0.5, 0.25)):
            group["lr"] = lr * (1 + done * (0.1 / 0.5 - 1))
        inputs, targets = windows[members].window(minibatch // PASS, minibatch % PASS // members)
        optimizer.zero_grad()
        for k in range(members):
            rows = slice(k * B, (k + 1) * B)
            weights = list(model.lstm.parameters()) if members == 1 else with_gains(model.lstm, k)
            embedded = model.embedding(inputs[rows])
            output, h, c = torch.lstm(embedded, states[k], weights, True, 1, 0.0, True, False, True)
            states[k] = (h.detach(), c.detach())
            loss = F.cross_entropy(model.fc(output).flatten(0, 1), targets[rows].flatten())
            loss.backward()
            total += loss.item()
        if clip is not None:
            gains = [p for name, p in model.named_parameters() if "gain" in name]
            base = [p for name, p in model.named_parameters() if "gain" not in name]
            assert torch.nn.utils.clip_grad_norm_(base, clip) > clip
            for k in range(K if gains else 0):
                norm = torch.cat([gain.grad[k] for gain in gains]).norm()
                for gain in gains:
                    gain.grad[k] *= min(1.0, clip / (norm + 1e-6))
        optimizer.step()
        minibatch += members
    run(trainer)
    for (name, value), expected in zip(trainer.model.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-11, msg=name)
    assert trainer.read_loss()[0] == pytest.approx(total / (2 * PASS), rel=1e-9)


@pytest.mark.parametrize("late", [{}, {"member_chunk": 1}, {"start": 0.0, "members": 1}, {"start": None}])
def test_resuming_is_exact_at_every_step(late):
    """Within a pass, where the state is carried; at T0, after it, during SWA; with one set of gains, with none."""
    given = recipe(late=dataclasses.replace(recipe().late, **late), swa=Swa(1.0, per_epoch=3))
    truth, saved = Trainer(given, text()), []
    while truth.minibatch < truth.total:
        buffer = io.BytesIO()
        torch.save(truth.state_dict(), buffer)
        saved.append((truth.minibatch, buffer))
        truth.step()
    carried = 0
    for minibatch, buffer in saved[3::5] + saved[-1:]:
        buffer.seek(0)
        state = torch.load(buffer, weights_only=True)
        carried += state["task"]["recurrent"] is not None
        torch.manual_seed(99), torch.randn(5)
        resumed = Trainer(given, text())
        resumed.load_state_dict(state)
        assert resumed.minibatch == minibatch
        for a, b in zip(tensors_of(run(resumed)), tensors_of(truth), strict=True):
            assert torch.equal(a, b)
        a, b = resumed.final_model().state_dict(), truth.final_model().state_dict()
        assert all(torch.equal(a[name], b[name]) for name in b)
    assert carried >= 3
    assert int(truth.averaged.n_averaged) == 4  # at the epoch's start and after each third of it


def test_without_the_state_a_resumed_run_would_differ():
    """What the test above would miss if the state did not matter."""
    truth, resumed = Trainer(recipe(), text()), Trainer(recipe(), text())
    for _ in range(15):
        truth.step()
    state = copy.deepcopy(truth.state_dict())
    resumed.load_state_dict({**state, "task": {"recurrent": None}})
    truth.step(), resumed.step()
    assert any(not torch.equal(a, b) for a, b in zip(truth.model.parameters(), resumed.model.parameters()))


@pytest.mark.parametrize("bad_step", [0, 8, 14])
def test_a_step_that_is_not_finite_leaves_the_state(bad_step, monkeypatch):
    """Weights, momentum and recurrent state are as before it."""
    trainer = Trainer(recipe(skip_nonfinite=True), text())
    for _ in range(bad_step):
        trainer.step()
    trainer._expand_once() if trainer.minibatch >= trainer.t0 else None
    before = [tensor.clone() for tensor in tensors_of(trainer, but=["late"])]
    cross_entropy = F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda *a, **k: cross_entropy(*a, **k) * float("nan"))
    trainer.step()
    after = tensors_of(trainer, but=["late"])
    if bad_step == 0:  # there was no state: it stays at zero
        assert all((state == 0).all() for state in trainer.task.state_dict()["recurrent"])
        after = after[: len(before)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert trainer.read_loss()[2] == 1


@pytest.mark.parametrize("symbols, streams", [(2, 1), (61, 1), (600, 1), (601, 7), (50, 49), (50, 80)])
def test_evaluation_predicts_every_symbol_once(symbols, streams):
    numbers = torch.arange(symbols)
    inputs, targets = (torch.cat(parts, 1) for parts in zip(*evaluation_windows(numbers, streams)))
    there = targets >= 0
    assert torch.equal(targets[there], numbers[1:]) and torch.equal(inputs[there] + 1, targets[there])
    assert inputs.min() >= 0 and len(inputs) == min(streams, symbols - 1)


def test_bits_per_character():
    """Against the definition, symbol by symbol, on the members' own weights."""
    trainer = run(Trainer(recipe(), text()))
    model, test = trainer.model.double(), text().validation
    found = bits_per_character(model, test)
    assert list(found) == ["averaged", "ensemble", "members", "member 0", "member 1", "member 2"]
    assert model.training

    def probabilities(weights):
        with torch.no_grad():
            zeros = torch.zeros(1, 1, H, dtype=torch.float64)
            embedded = model.embedding(test[None, :-1].long())
            output, _, _ = torch.lstm(embedded, (zeros, zeros), weights, True, 1, 0.0, False, False, True)
            return model.fc(output)[0].softmax(-1)[torch.arange(len(test) - 1), test[1:].long()]

    members = [probabilities(with_gains(model.lstm, k)) for k in range(K)]
    for k, chosen in enumerate(members):
        assert found[f"member {k}"] == pytest.approx(-chosen.log2().mean().item(), rel=1e-9)
    assert found["members"] == pytest.approx(sum(found[f"member {k}"] for k in range(K)) / K)
    assert found["ensemble"] == pytest.approx(-(sum(members) / K).log2().mean().item(), rel=1e-9)
    collapsed = lp.collapse(copy.deepcopy(model))
    assert found["averaged"] == pytest.approx(
        -probabilities(list(collapsed.lstm.parameters())).log2().mean().item(), rel=1e-9
    )
    assert bits_per_character(collapsed, test) == {"averaged": pytest.approx(found["averaged"], rel=1e-9)}
    looks = []
    assert _mean_bits(model, test, 1, "average", lambda: looks.append(0)) == [found["averaged"]] * 2 and looks
    uniform = CharLSTM(6, H)
    torch.nn.init.zeros_(uniform.fc.weight), torch.nn.init.zeros_(uniform.fc.bias)
    assert bits_per_character(uniform, test, 3)["averaged"] == pytest.approx(math.log2(6))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"text": Text(window=0)}, "text.window must be at least 1, got 0"),
        ({"text": Text(evaluation_streams=0)}, "text.evaluation_streams must be at least 1"),
        ({"text": Text(window=500)}, "text.window or late.members do not fit the text: .* at least"),
        ({"batch_size": 100}, "batch_size, text.window or late.members do not fit the text: .* at least"),
        ({"optimizer": Optimizer(clip_norm=0.0)}, "optimizer.clip_norm must be null or more than 0, got 0.0"),
        ({"swa": Swa(1.0, per_epoch=0)}, "swa.per_epoch must be at least 1"),
        ({"model": Model("wide_resnet")}, "model.name must be char_lstm for a text, got 'wide_resnet'"),
        ({"model": Model("char_lstm", {"units": 3})}, "model char_lstm with options .*units"),
        ({"model": Model("char_lstm", {"hidden_size": -3})}, "model char_lstm with options .*hidden_size"),
        ({"late": Late(start=0.0, targets=["rank1:gru"])}, "late.targets .* do not fit char_lstm: .* no module"),
        ({"late": Late(start=0.0, targets=["batch_norm"])}, "late.targets .* do not fit char_lstm: .* no module"),
        ({"late": Late(start=0.0, targets=["rank2"])}, "late.targets .* do not fit char_lstm: .*got 'rank2'"),
    ],
)
def test_recipes_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=f"train: .*{message}"):
        Trainer(recipe(**changes), text())
