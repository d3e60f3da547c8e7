"""expand and collapse amid what a script has made before: optimizers, schedulers, references, hooks, copies."""

import contextlib
import copy
import dataclasses
import pickle
import sys
import threading
import warnings
from collections import OrderedDict, UserDict
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import latephase_kernels as lp

K = 3


class Net(nn.Module):
    """Calls its layers by way of a list, a tuple and a dict too."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)
        self.steps = [self.conv, (self.norm, "relu"), {"head": self.head}]

    def forward(self, x):
        conv, (norm, activation), last = self.steps
        return last["head"](getattr(norm(conv(x)), activation)().mean((2, 3)))


def images(rows=2 * K):
    return torch.randn(rows, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def expanded(**options):
    return lp.expand(Net(), K, targets=("batch_norm", "head"), **options)


# ---------------------------------------------------------------------------------------------- schedulers


SCHEDULERS = {
    "StepLR": lambda optimizer: lr_scheduler.StepLR(optimizer, 6),
    "CosineAnnealingLR": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 20),
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 1.0, 20),
    "CyclicLR": lambda optimizer: lr_scheduler.CyclicLR(optimizer, 0.1, 1.0, step_size_up=4),
    "SequentialLR": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, total_iters=3), lr_scheduler.CosineAnnealingLR(optimizer, 20)],
        [7],
    ),
    "ChainedScheduler": lambda optimizer: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(optimizer, 0.9), lr_scheduler.LinearLR(optimizer, total_iters=8)]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_go_on(name):
    """Every group has, step by step, the learning rate that the plain model's has."""
    rates = []
    for expands in (False, True):
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        scheduler = SCHEDULERS[name](optimizer)
        for step in range(14):
            if expands and step == 5:
                lp.expand(model, K, optimizers=optimizer, schedulers=scheduler)
                assert len(optimizer.param_groups) == 2
            optimizer.step(), scheduler.step()
            rates.append({group["lr"] for group in optimizer.param_groups})
    assert rates[:14] == rates[14:] and all(len(different) == 1 for different in rates)


@pytest.mark.parametrize("name", ("CosineLRScheduler", "PlateauLRScheduler"))
def test_timms_schedulers_go_on_in_their_warmup(name):
    scheduler_of = getattr(pytest.importorskip("timm.scheduler"), name)
    options = {"t_initial": 20} if name == "CosineLRScheduler" else {"patience_t": 0, "decay_rate": 0.5}
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = scheduler_of(optimizer, warmup_t=7, warmup_lr_init=0.01, **options)
    for epoch in range(12):
        if epoch == 3:
            lp.expand(model, K, optimizers=optimizer, schedulers=scheduler)
        scheduler.step(epoch, metric=1.0)
        assert len({group["lr"] for group in optimizer.param_groups}) == 1
    assert optimizer.param_groups[1]["lr"] not in (0.1, 0.01)


def test_two_optimizers_with_schedulers():
    model = Net()
    optimizers = [torch.optim.SGD(part.parameters(), lr=lr) for part, lr in ((model.norm, 0.1), (model.head, 1.0))]
    schedulers = [lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step) for optimizer in optimizers]
    lp.expand(model, K, targets=("batch_norm", "head"), optimizers=optimizers, schedulers=schedulers)
    for optimizer, scheduler in zip(optimizers, schedulers):
        optimizer.step(), scheduler.step()
    assert [scheduler.get_last_lr() for scheduler in schedulers] == [[0.05, 0.05], [0.5, 0.5]]


def test_plateaus():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, min_lr=[0.05])
    scheduler.step(1.0)
    lp.expand(model, K, optimizers=optimizer, schedulers=[scheduler], member_options={"lr": 0.3})
    for _ in range(3):
        scheduler.step(1.0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.05]


def test_a_learning_rate_of_the_members_own():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step(), scheduler.step()
    lp.expand(model, K, optimizers=optimizer, schedulers=scheduler, member_options={"lr": 0.1})
    assert [(g["lr"], g["initial_lr"]) for g in optimizer.param_groups] == [(0.25, 0.5), (0.1, 0.1)]
    assert scheduler.get_last_lr() == [0.25, 0.1]
    optimizer.step(), scheduler.step()
    assert scheduler.get_last_lr() == [0.125, 0.025]


def test_schedulers_that_are_not_given():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scheduler = lr_scheduler.StepLR(optimizer, 3)
    with pytest.raises(ValueError, match="schedulers must be .* of the optimizers given, got StepLR of another one"):
        lp.expand(model, K, schedulers=scheduler)
    assert type(model.norm) is nn.BatchNorm2d
    with pytest.warns(UserWarning, match="SGD has a learning rate scheduler, which does not know .*; give it as sched"):
        lp.expand(model, K, optimizers=optimizer)


# ---------------------------------------------------------------------------------------------- optimizers


class Wrapper(torch.optim.Optimizer):
    """As Accelerate's: an optimizer by its class, that only hands on."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    state = property(lambda self: self.optimizer.state)
    param_groups = property(lambda self: self.optimizer.param_groups)

    def add_param_group(self, group):
        self.optimizer.add_param_group(group)

    def step(self):
        self.optimizer.step()


class WrappedScheduler:
    def __init__(self, scheduler):
        self.scheduler = scheduler


def lookahead(optimizer):
    return pytest.importorskip("timm.optim").Lookahead(optimizer, k=100)


@pytest.mark.parametrize("wrap", [Wrapper, lookahead])
def test_wrapped_optimizers(wrap):
    model = Net()
    wrapped = wrap(torch.optim.SGD(model.parameters(), lr=0.1))
    scheduler = lr_scheduler.StepLR(wrapped, 1, 0.1) if wrap is lookahead else None
    scheduler = scheduler or lr_scheduler.StepLR(wrapped.optimizer, 1, 0.1)
    lp.expand(model, K, targets=("batch_norm", "head"), optimizers=wrapped, schedulers=WrappedScheduler(scheduler))
    lp.set_base_grad_scale(wrapped, model, 0.0)
    base, member = model.conv.weight.detach().clone(), model.head.weight.detach().clone()
    model(images()).square().sum().backward()
    wrapped.step()
    assert torch.equal(model.conv.weight, base) and not torch.equal(model.head.weight, member)
    scheduler.step()
    assert [group["lr"] for group in wrapped.param_groups] == pytest.approx([0.01, 0.01])
    model = Net()
    lamb = type("Lamb", (torch.optim.SGD,), {})(model.parameters(), lr=0.1)
    with pytest.raises(NotImplementedError, match="Lamb mixes the elements"):
        lp.expand(model, K, optimizers=wrap(lamb))


@pytest.mark.parametrize("state", ["fresh", "copy"])
def test_the_state_inside_a_wrapped_optimizer_moves(state):
    model = Net()
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    wrapped = lookahead(inner)
    model(images()).square().sum().backward()
    wrapped.step()
    momentum = inner.state[model.head.weight]["momentum_buffer"].clone()
    lp.expand(model, K, targets=("batch_norm", "head"), optimizers=wrapped, member_state=state)
    assert len(wrapped.state_dict()["state"]) == len(inner.state) == (6 if state == "copy" else 2)
    if state == "copy":
        assert torch.equal(inner.state[model.head.weight]["momentum_buffer"], momentum.expand(K, *momentum.shape))
    wrapped.step()


def test_sharpness_aware_minimization_is_refused():
    class SAM(torch.optim.Optimizer):  # as all implementations do: a wrapper with a norm over all gradients
        def __init__(self, parameters):
            super().__init__(parameters, {"lr": 0.1, "rho": 0.05})
            self.base_optimizer = torch.optim.SGD(self.param_groups, lr=0.1)
            self.param_groups = self.base_optimizer.param_groups

    model = Net()
    with pytest.raises(NotImplementedError, match="SAM mixes the elements"):
        lp.expand(model, K, optimizers=SAM(model.parameters()))


def test_rules_that_mix_are_known_in_every_spelling():
    model = Net()
    for name in ("AdaFactor", "MARS", "Prodigy"):
        rule = type(name, (torch.optim.SGD,), {})(model.parameters(), lr=0.1)
        with pytest.raises(NotImplementedError, match=f"{name} mixes the elements"):
            lp.expand(model, K, optimizers=rule)


def test_data_parallel_does_not_cut_a_stacked_batch():
    model = expanded()
    with pytest.raises(NotImplementedError, match="DataParallel cuts the stacked batch into parts"):
        model.head._replicate_for_data_parallel()  # nn.DataParallel's way to copy a module to another device
    with lp.members(model, 1):
        model.head._replicate_for_data_parallel()
    model.eval().norm._replicate_for_data_parallel()


def test_an_optimizer_that_trains_what_is_gone_warns_once():
    model = Net()
    old = torch.optim.SGD(model.parameters(), lr=0.1)
    lp.expand(model, K)
    model(images()).sum().backward()
    with pytest.warns(
        UserWarning, match=r"SGD.step: of the 6 parameters .* expand has replaced 2 .* \(the first is \[8\]"
    ):
        old.step()
    new = torch.optim.AdamW(lp.param_groups(model, lr=0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        old.step(), new.step()
    lp.collapse(model)
    with pytest.warns(UserWarning, match=r"AdamW.step: .* collapse has replaced 2 .*; make a new optimizer after it"):
        new.step()


def test_optimizers_made_after_expand_warn_if_they_mix_members():
    model = expanded()
    model(images()).sum().backward()
    muon = torch.optim.Muon([model.norm.weight], lr=0.1)
    with pytest.warns(UserWarning, match=r"Muon.step: .* replicated parameters \(the first is \[3, 8\]\).* 3 members"):
        muon.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        muon.step(), torch.optim.LBFGS([model.conv.weight]).step(lambda: 0.0)


def test_live_optimizers_do_not_warn():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lp.expand(model, K, optimizers=optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(images()).sum().backward()
        optimizer.step()


def test_marks_go_over_and_hooks_warn():
    model = Net()
    model.norm.weight.no_decay = True
    model.norm.bias.register_hook(lambda gradient: gradient)
    with pytest.warns(UserWarning, match="the hooks of norm.bias do not go over to the replicated parameter"):
        lp.expand(model, K)
    assert model.norm.weight.no_decay and not hasattr(model.norm.bias, "no_decay")
    lp.collapse(model)
    assert model.norm.weight.no_decay and not hasattr(model.norm.weight, "num_members")
    model.head.weight.register_hook(lambda gradient: gradient)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lp.expand(model, K, targets="rank1")  # the weight itself stays


def test_a_norm_of_two_models():
    """What one model's expand replaced is new to an optimizer of the other's."""
    first, second = Net(), Net()
    second.norm = first.norm
    second.steps[1] = first.steps[1]
    lp.expand(first, K), lp.expand(second, K)
    optimizer = torch.optim.SGD(second.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second(images()).sum().backward()
        optimizer.step()


def test_collapse_replaces_the_weights_of_rank1_layers():
    model = lp.expand(Net(), K, targets="rank1")
    optimizer = torch.optim.SGD([model.conv.weight], lr=0.1)
    lp.collapse(model)
    with pytest.warns(UserWarning, match=r"of the 1 parameters .* collapse has replaced 1"):
        optimizer.step()


# ---------------------------------------------------------------------------------------------- references


def test_modules_in_lists_are_replaced_too():
    model = Net().double()
    plain = copy.deepcopy(model).eval()
    lp.expand(model, K, targets=("batch_norm", "head"))
    assert model.steps[1] == (model.norm, "relu") and model.steps[2]["head"] is model.head
    lp.check_members(model, images())
    model(images().double()).sum().backward()
    assert model.norm.weight.grad.shape == (K, 8) and model.head.weight.grad.shape == (K, 4, 8)
    lp.collapse(model.eval())
    assert [type(m) for m in (model.steps[0], model.steps[1][0], model.steps[2]["head"])] == [
        nn.Conv2d,
        nn.BatchNorm2d,
        nn.Linear,
    ]
    assert torch.equal(model.conv.weight, plain.conv.weight)


def test_copies_of_parts_follow_their_own_flags():
    model = expanded()
    part = copy.deepcopy(model.norm)
    rows = torch.randn(5, 8, 2, 2)
    assert part.eval()(rows).shape == rows.shape  # any batch: the average, although the model is in train mode
    with pytest.raises(ValueError, match="is not divisible by num_members=3"):
        part.train()(rows)
    model.eval()
    assert model.norm(rows).shape == rows.shape


@pytest.mark.parametrize(
    "copied", (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))), ids=("deep", "pickle")
)
def test_a_choice_of_members_is_not_copied(copied):
    model = expanded()
    with lp.members(model, "average"):
        other = copied(model)
        assert model(images(5)).shape == (5, 4)
    with pytest.raises(ValueError, match="is not divisible by num_members=3"):
        other(images(5))


def test_blocks_that_overlap_leave_no_choice():
    model = expanded()
    first, second = lp.members(model, 0), lp.members(model, 1)
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    assert model(images(5)).shape == (5, 4)  # as member 1
    second.__exit__(None, None, None)
    with pytest.raises(ValueError, match="is not divisible by num_members=3"):
        model(images(5))


def test_two_threads_cannot_choose_at_once():
    model, x = expanded().eval(), images(5)
    expected = model(x)
    with ThreadPoolExecutor(1) as thread:
        assert torch.equal(thread.submit(lp.predict, model, x).result(), expected)
        with lp.members(model, 0):
            with pytest.raises(RuntimeError, match="another thread runs this model as members of its choice"):
                thread.submit(lp.predict, model, x, members=1).result()
            with pytest.raises(RuntimeError, match="another thread runs this model"):
                thread.submit(lp.predict, model, x).result()
            assert lp.predict(copy.deepcopy(model), x).shape == expected.shape
        assert torch.equal(lp.predict(model, x), expected)


def test_predictions_of_several_threads():
    """While one predicts, the others wait: none runs as the members of another's choice."""
    model, x = expanded(noise_std=0.5).eval(), images()
    expected = {which: lp.predict(model, x, members=which) for which in ("average", "all", 0, 1)}
    begun, several = threading.Event(), threading.Event()

    def let_others_begin(*_):
        begun.set()
        several.wait(0.02)  # nobody sets it

    handle = model.conv.register_forward_hook(let_others_begin)
    with ThreadPoolExecutor(4) as threads:
        first = threads.submit(lp.predict, model, x)
        begun.wait()
        found = {which: threads.submit(lp.predict, model, x, members=which) for which in ("all", 0, 1)}
        for which, prediction in {"average": first, **found}.items():
            assert torch.equal(prediction.result(), expected[which]), which
    handle.remove()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # each with turns of its own
        assert torch.equal(lp.predict(other, x, members="all"), expected["all"])


def test_threads_that_take_turns_leave_no_choice():
    model = expanded()

    def choose(member):
        for _ in range(8000):
            with contextlib.suppress(RuntimeError), lp.members(model, member):
                assert model.norm.active_members() == range(member, member + 1)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(K) as threads:
            list(threads.map(choose, range(K)))
    finally:
        sys.setswitchinterval(interval)
    assert model.norm.routing.override is None and not model.norm.routing.blocks


def test_heads_whose_weight_is_asked_for_its_type():
    class Cast(Net):
        def forward(self, x):  # self.head.weight stays as it is
            if isinstance(self.head.weight, torch.Tensor) and self.head.weight.is_floating_point():
                x = x.to(self.head.weight.dtype)
            return super().forward(x)

    assert type(lp.expand(Cast(), K, targets="head").head) is lp.nn.MemberLinear


def test_heads_whose_weight_is_read_are_refused():
    class LowRank(nn.Module):
        def __init__(self):
            super().__init__()
            self.base, self.change = nn.Linear(8, 4), nn.Parameter(torch.zeros(4, 8))

        def forward(self, x):
            return nn.functional.linear(x, self.base.weight + self.change, self.base.bias)

    model = nn.Sequential(nn.Flatten(), LowRank())
    with pytest.raises(
        NotImplementedError, match="1.base cannot be replicated: .* reads its weight without calling it"
    ):
        lp.expand(model, K, targets="head")


# ---------------------------------------------------------------------------------------------- sequences, predictions


class Characters(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


def test_time_in_front_is_a_warning():
    with pytest.warns(
        UserWarning, match="lstm has batch_first=False. If time is in dim 0 of what reaches head, the mem"
    ):
        lp.expand(Characters(), K, targets="head")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = lp.expand(Characters(), K, targets=lambda name, _: "rank1" if name == "lstm" else False)
    with pytest.raises(
        NotImplementedError, match='members="all" repeats the samples in dim 0, but lstm has batch_first'
    ):
        lp.predict(model, torch.randn(4, 2, 8), members="all")

    class Transposed(Characters):
        def forward(self, x):
            return super().forward(x.transpose(0, 1))[-1]

    other = lp.expand(Transposed(), K, targets=lambda name, _: "rank1" if name == "lstm" else False, noise_std=0.3)
    x = torch.randn(2, 4, 8)
    torch.testing.assert_close(lp.predict(other, x, members="all")[1], lp.predict(other, x, members=1))
    assert lp.predict(model, torch.randn(4, 2, 8)).shape == (4, 2, 5)


def test_norms_put_in_after_expand():
    model = expanded()
    model.head = nn.Sequential(model.head, nn.BatchNorm1d(4))
    with pytest.warns(UserWarning, match=r"head.1 \(BatchNorm1d\) was put into the model after expand"):
        lp.collapse(model)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(expanded())
    with pytest.raises(RuntimeError, match=r"norm \(SyncBatchNorm\) has the weights of all members, \[3, 8\]"):
        lp.collapse(model)
    assert type(model.head) is not nn.Linear


def test_predictions_of_mappings_that_pytree_does_not_know():
    class Output(OrderedDict):
        pass

    class Rows(list):
        pass

    class Named(Net):
        def forward(self, batch, output=Output):
            logits = super().forward(batch["image"])
            return output([("logits", logits), ("names", batch["names"])] if output is Output else [logits])

    model, x = lp.expand(Named(), K, noise_std=0.5).eval(), images()
    batch = UserDict(image=x, names="unknown")
    together = lp.predict(model, batch, members="all")
    assert type(together) is Output and together["names"] == "unknown"
    for member in range(K):
        torch.testing.assert_close(together["logits"][member], lp.predict(model, batch, members=member)["logits"])
    with pytest.raises(TypeError, match="outputs must be tensors, or tuples, lists or dicts of them, got Rows"):
        lp.predict(model, batch, Rows, members="all")
    with pytest.raises(TypeError, match="predict: a batch must hold a tensor with a batch dimension, got str"):
        lp.predict(model, "image", members="all")


def test_predictions_of_several_arguments():
    class Weighted(Net):
        def forward(self, x, weights, *, scale):
            return super().forward(x) * weights.unsqueeze(1) * scale

    model = lp.expand(Weighted(), K, noise_std=0.3)
    x, weights, scale = images(5), torch.arange(5.0), torch.tensor([2.0, 1.0, 0.0, 1.0])
    together = lp.predict(model, x, weights, members="all", scale=scale)
    for member in range(K):
        alone = lp.predict(model, x, weights, members=member, scale=scale)
        torch.testing.assert_close(together[member], alone)


def test_minibatches_of_several_shapes():
    with pytest.raises(ValueError, match=r"must have one shape, got \[3\] and \[4\]; pad them to one length"):
        next(iter(lp.stack_batches([torch.zeros(2, 4), torch.zeros(2, 3)], 2)))


def test_answers_that_cannot_be_divided_are_refused():
    @dataclasses.dataclass
    class Answer:
        logits: torch.Tensor

    class Wrapped(Net):
        def forward(self, x):
            return Answer(super().forward(x))

    model = lp.expand(Wrapped(), K)
    assert lp.predict(model, images()).logits.shape == (6, 4)
    with pytest.raises(TypeError, match="outputs must be tensors, or tuples, lists or dicts of them, got Answer"):
        lp.predict(model, images(), members="all")
