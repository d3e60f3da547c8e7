"""Stacked training equals the paper's loop over members; shapes: K members, B samples each."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from latephase_kernels import late_phase as lp

K, B, STEPS = 4, 3, 50


pytestmark = pytest.mark.usefixtures("one_thread")


class ResidualNet(nn.Module):
    """Two batch norms, a skip connection and a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        y = F.relu(self.bn1(self.stem(x)))
        y = F.relu(y + self.bn2(self.conv(y)))
        return self.fc(y.mean((2, 3)))


def late_names(targets):
    """Prefixes of the replicated tensors."""
    return {"batch_norm": ("bn1.", "bn2."), "head": ("fc.",), "bn2": ("bn2.",)}[targets]


def select(targets):
    return (lambda name, module: name == "bn2") if targets == "bn2" else targets


def optimizer_for(kind, parameters):
    if kind == "sgd":
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-3)
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.05)


def batches(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x = torch.randn(K * B, 2, 5, 4, generator=generator, dtype=torch.float64).to(dtype)
        yield x, torch.randint(3, (K * B,), generator=generator)


def stacked_step(model, optimizer, x, target, chunk=K):
    """One step of an expanded model, its members in chunks; return the sum of their losses."""
    optimizer.zero_grad()
    total = 0.0
    for first in range(0, K, chunk):
        chosen = range(first, min(first + chunk, K))
        rows = slice(chosen.start * B, chosen.stop * B)
        with lp.members(model, chosen):
            loss = lp.member_loss(F.cross_entropy, model(x[rows]), target[rows], num_members=len(chosen))
        loss.backward()
        total += loss.item()
    optimizer.step()
    return total


def assert_members_equal(model, plains, late, tolerance=1e-9):
    state = model.state_dict()
    assert state.keys() == plains[0].state_dict().keys()
    for k, plain in enumerate(plains):
        for name, expected in plain.state_dict().items():
            value = state[name][k] if name.startswith(late) else state[name]
            torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "kind, scale, targets, chunk",
    [
        ("sgd", "sum", "batch_norm", K),
        ("adamw", "mean", "batch_norm", K),
        ("adamw", 0.3, "batch_norm", K),
        ("sgd", "mean", "head", K),  # both batch norms shared
        ("adamw", "sum", "bn2", K),  # one batch norm shared
        ("sgd", "mean", "bn2", 3),  # a chunk of three members and one of one
        ("adamw", "sum", "head", 2),
        ("sgd", "sum", "batch_norm", 1),
    ],
)
def test_stacked_training_equals_the_loop(kind, scale, targets, chunk):
    torch.manual_seed(0)
    plain = ResidualNet().double()
    options = {"targets": select(targets), "noise_std": 0.1}
    model = lp.expand(copy.deepcopy(plain), K, **options, generator=torch.Generator().manual_seed(2))
    trainer = lp.SequentialTrainer(
        plain,
        K,
        optimizer=lambda parameters: optimizer_for(kind, parameters),
        base_grad_scale=scale,
        **options,
        generator=torch.Generator().manual_seed(2),
    )
    late = late_names(targets)
    assert_members_equal(model, trainer.members, late, 0)
    assert not torch.equal(model.state_dict()[late[-1] + "weight"][0], model.state_dict()[late[-1] + "weight"][1])
    optimizer = optimizer_for(kind, model.parameters())
    lp.set_base_grad_scale(optimizer, model, 0.123)  # replaced by the next call
    lp.set_base_grad_scale(optimizer, model, scale)
    for x, target in batches():
        losses = trainer.step(F.cross_entropy, list(zip(x.chunk(K), target.chunk(K))))
        assert stacked_step(model, optimizer, x, target, chunk) == pytest.approx(sum(losses), abs=1e-9, rel=1e-9)
    assert_members_equal(model, trainer.members, late)
    for mode in ("exact", "weights"):
        collapsed = lp.collapse(trainer.expanded().eval(), mode=mode).state_dict()
        for name, value in lp.collapse(copy.deepcopy(model).eval(), mode=mode).state_dict().items():
            torch.testing.assert_close(value, collapsed[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_float32_training_grows_its_rounding_as_the_loop_does(kind):
    """After all steps the distance to float64 training is at most twice the float32 loop's own."""
    torch.manual_seed(0)
    plain = ResidualNet()
    trainers = [
        lp.SequentialTrainer(copy.deepcopy(plain).to(dtype), K, optimizer=lambda p: optimizer_for(kind, p))
        for dtype in (torch.float64, torch.float32)
    ]
    model = lp.expand(copy.deepcopy(plain), K)
    optimizer = optimizer_for(kind, model.parameters())
    for x, target in batches():
        for trainer, dtype in zip(trainers, (torch.float64, torch.float32)):
            trainer.step(F.cross_entropy, list(zip(x.to(dtype).chunk(K), target.chunk(K))))
        stacked_step(model, optimizer, x.float(), target)
    truth, loop, stacked = (
        torch.cat([tensor.double().flatten() for tensor in expanded.state_dict().values()])
        for expanded in (trainers[0].expanded(), trainers[1].expanded(), model)
    )
    assert (stacked - truth).norm() <= 2 * (loop - truth).norm()
    assert 0 < (loop - truth).norm() / truth.norm() < 1e-4  # the trainings did not part


@pytest.mark.parametrize("targets", ["batch_norm", "head"])
def test_members_take_turns_on_minibatches_of_unequal_sizes(targets):
    torch.manual_seed(0)
    plain = ResidualNet().double()
    trainer = lp.SequentialTrainer(
        copy.deepcopy(plain), K, optimizer=lambda p: optimizer_for("sgd", p), targets=targets
    )
    model = lp.expand(plain, K, targets=targets)
    optimizer = optimizer_for("sgd", model.parameters())
    for _ in range(3):
        minibatches = [(torch.randn(n, 2, 5, 4).double(), torch.randint(3, (n,))) for n in (2, 5, 3, 7)]
        losses = trainer.step(F.cross_entropy, minibatches)
        optimizer.zero_grad()
        for k, (x, target) in enumerate(minibatches):
            with lp.members(model, k):
                loss = F.cross_entropy(model(x), target)
                loss.backward()
            assert loss.item() == pytest.approx(losses[k], rel=1e-9)
        optimizer.step()
    assert_members_equal(model, trainer.members, late_names(targets))


def test_frozen_layers_use_each_members_statistics_in_a_stacked_pass():
    torch.manual_seed(0)
    model = lp.expand(ResidualNet().double(), K, targets="batch_norm")
    model(torch.randn(K * B, 2, 5, 4, dtype=torch.float64))  # members' statistics differ from now on
    model.bn1.eval()
    before = model.bn1.running_mean.clone()
    plains = []
    for k in range(K):
        plain = ResidualNet().double()
        plain.load_state_dict({n: v[k] if n.startswith("bn") else v for n, v in model.state_dict().items()})
        plain.bn1.eval()
        plains.append(plain)
    x = torch.randn(K * B, 2, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(model(x), torch.cat([plain(part) for plain, part in zip(plains, x.chunk(K))]))
    assert torch.equal(model.bn1.running_mean, before)
    assert_members_equal(model, plains, ("bn1.", "bn2."))


def test_base_gradients_are_scaled_with_a_closure_too():
    torch.manual_seed(0)
    model = lp.expand(ResidualNet(), K, targets="batch_norm")
    x = torch.randn(K * B, 2, 5, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    lp.set_base_grad_scale(optimizer, model, 0.25)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    closure()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step(closure)
    for name, parameter in model.named_parameters():
        scale = 1.0 if name.startswith("bn") else 0.25
        torch.testing.assert_close(parameter, before[name] - scale * gradients[name])
    for wrong, error in (("max", ValueError), (None, TypeError), (float("nan"), ValueError)):
        with pytest.raises(error, match="set_base_grad_scale: scale must be"):
            lp.set_base_grad_scale(optimizer, model, wrong)


@pytest.mark.filterwarnings("ignore:SGD.step. of the 16 parameters")
def test_one_optimizer_scales_the_base_gradients_of_two_models():
    torch.manual_seed(0)
    models = [lp.expand(ResidualNet(), K, targets="batch_norm") for _ in range(2)]  # an encoder and a decoder, say
    optimizer = torch.optim.SGD([p for model in models for p in model.parameters()], lr=1.0)
    for scales in ((0.25, 0.5), (0.125, 0.5), (0.125, 1.0)):
        for model, scale in zip(models, scales):
            lp.set_base_grad_scale(optimizer, model, scale)
        before = [copy.deepcopy(model.fc.weight) for model in models]
        for model in models:
            model.fc.weight.grad = torch.ones_like(model.fc.weight)
        optimizer.step()
        for model, scale, weight in zip(models, scales, before):
            torch.testing.assert_close(model.fc.weight, weight - scale)
    lp.collapse(models[0])
    lp.set_base_grad_scale(optimizer, lp.expand(models[0], K, targets="batch_norm"), 0.5)  # not on top of 0.125
    weight = models[0].fc.weight.detach().clone()
    models[0].fc.weight.grad = torch.ones_like(weight)
    optimizer.step()
    torch.testing.assert_close(models[0].fc.weight.detach(), weight - 0.5)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("member_state", ["fresh", "copy"])
def test_expand_with_a_live_optimizer_continues_the_loop(kind, member_state):
    """Compare with K plain models that keep (copy) or lose (fresh) the late parameters' state; base keeps its own."""
    torch.manual_seed(0)
    model = ResidualNet().double()
    optimizer = optimizer_for(kind, model.parameters())
    data = list(batches())
    for x, target in data[:5]:
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()
    plain = copy.deepcopy(model)
    plain_optimizer = optimizer_for(kind, plain.parameters())
    plain_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    if member_state == "fresh":
        for name, parameter in plain.named_parameters():
            if name.startswith("bn"):
                del plain_optimizer.state[parameter]
    lp.expand(model, K, optimizers=optimizer, member_state=member_state, member_options={"lr": 0.02})
    assert [len(group["params"]) for group in optimizer.param_groups] == [4, 4]
    assert [group["lr"] for group in optimizer.param_groups] == [0.05 if kind == "sgd" else 0.01, 0.02]
    base = [p for n, p in plain.named_parameters() if not n.startswith("bn")]
    late = [p for n, p in plain.named_parameters() if n.startswith("bn")]
    group = plain_optimizer.param_groups[0]
    group["params"] = base
    plain_optimizer.add_param_group({**group, "params": late, "lr": 0.02})
    # Every member gets the same minibatch, so one plain model is each member's truth.
    lp.set_base_grad_scale(optimizer, model, "mean")
    for x, target in data[5:15]:
        x, target = x[:B], target[:B]
        plain_optimizer.zero_grad()
        F.cross_entropy(plain(x), target).backward()
        plain_optimizer.step()
        optimizer.zero_grad()
        output = model(x.repeat(K, 1, 1, 1))
        lp.member_loss(F.cross_entropy, output, target.repeat(K), num_members=K).backward()
        optimizer.step()
    assert_members_equal(model, [plain] * K, ("bn1.", "bn2."))
    lp.collapse(model, mode="weights")
    assert_members_equal(model, [plain], ())
