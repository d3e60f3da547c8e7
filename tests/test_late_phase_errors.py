"""What expand and collapse refuse, by name, before they change anything."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FSDPModule

from latephase_kernels import late_phase as lp


class NormAndActivation(nn.BatchNorm2d):
    def forward(self, x):
        return F.relu(super().forward(x))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(5, 3)
        self.fc = nn.Linear(3, 5, bias=False)
        self.fc.weight = self.words.weight


class Temperature(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * self.scale


def net(*modules):
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), *modules)


class Holder(nn.Module):
    """Stands for a model inside a wrapper, which expand knows by the wrapper's name."""

    def __init__(self):
        super().__init__()
        self.inside = nn.DataParallel(net())


def foreign(class_name, module_name, **attributes):
    """A module of a library that need not be installed: expand knows it by its names."""
    module = type(class_name, (nn.Module,), {"__module__": module_name})()
    vars(module).update(attributes)
    return module


def real(home, class_name, *arguments, **attributes):
    module = getattr(pytest.importorskip(home), class_name)(*arguments)
    vars(module).update(attributes)
    return module


MIXING = {  # module that mixes samples → what is said of it
    "stochastic depth": (lambda: real("torchvision.ops", "StochasticDepth", 0.1, "batch"), 'use mode="row"'),
    "drop block": (lambda: real("timm.layers", "DropBlock2d", 0.1, batchwise=True), "use batchwise=False"),
    "evo norm": (lambda: real("timm.layers", "EvoNorm2dB0", 4), "by the statistics of the whole batch; use nn.Batch"),
    "in-place": (lambda: foreign("InplaceAbn", "timm.layers.inplace_abn"), "statistics of the whole batch"),
    "in-place sync": (lambda: foreign("InPlaceABNSync", "inplace_abn.abn"), "statistics of the whole batch"),
    "counting embedding": (lambda: nn.Embedding(9, 4, scale_grad_by_freq=True), "use scale_grad_by_freq=False"),
    "volo": (lambda: foreign("VOLO", "timm.models.volo", mix_token=True), "set its mix_token to False"),
}


def sharded():
    """As torch's fully_shard leaves it: of a class made of FSDPModule and its own."""
    model = net()
    model.__class__ = type("FSDPNet", (FSDPModule, type(model)), {})
    return model


REFUSED = {
    **{
        name: (lambda make=make: net(make()), {}, NotImplementedError, f"expand: 2 .*{message}")
        for name, (make, message) in MIXING.items()
    },
    "split": (
        lambda: net(real("timm.layers", "SplitBatchNorm2d", 4)),
        {},
        NotImplementedError,
        "2: .*SplitBatchNorm2d overrides forward",
    ),
    "lazy buffers": (lambda: net(nn.LazyBatchNorm2d(affine=False)), {}, NotImplementedError, "2 .* not initialized"),
    "data parallel": (lambda: nn.DataParallel(net()), {}, TypeError, "got DataParallel; give model.module"),
    "inner wrapper": (Holder, {}, TypeError, r"got DataParallel \(inside\)"),
    "sharded": (sharded, {}, TypeError, "got FSDPNet; give the model before fully_shard"),
    "compiled": (lambda: torch.compile(net()), {}, TypeError, "got OptimizedModule; give model._orig_mod"),
    "no module": (lambda: [1], {}, TypeError, "model must be an nn.Module, got list"),
    "subclass": (lambda: net(NormAndActivation(4)), {}, NotImplementedError, "2: .*NormAndActivation overrides"),
    "untargeted subclass": (
        lambda: net(NormAndActivation(4), nn.Flatten(), nn.Linear(4, 2)),
        {"targets": "head"},
        NotImplementedError,
        "expand: 2: .*NormAndActivation overrides forward",
    ),
    "lazy": (lambda: net(nn.LazyBatchNorm2d()), {}, NotImplementedError, r"2 \(.*LazyBatchNorm2d\) is not initialized"),
    "root": (lambda: nn.BatchNorm2d(4), {}, ValueError, "wrap it in nn.Sequential"),
    "expanded": (lambda: lp.expand(net(), 2), {}, RuntimeError, "already expanded"),
    "a class": (net, {"targets": nn.LayerNorm}, TypeError, r"choose modules by .* isinstance\(module, LayerNorm\)"),
    "a module": (net, {"targets": ("head", nn.Linear(2, 2))}, TypeError, r"isinstance\(module, Linear\)"),
    "no targets": (net, {"targets": None}, TypeError, "targets must be names or callables, got NoneType"),
    "unknown target": (net, {"targets": ("layers",)}, ValueError, "targets must be .* got 'layers'"),
    "not convertible": (
        lambda: net(nn.ReLU()),
        {"targets": lambda name, m: isinstance(m, nn.ReLU)},
        NotImplementedError,
        "ReLU has no parameters of its own to replicate",
    ),
    "tied": (Tied, {"targets": "head"}, ValueError, "fc.weight is tied to words.weight"),
    "attention": (
        lambda: nn.Sequential(nn.MultiheadAttention(4, 2)),
        {"targets": "head"},
        NotImplementedError,
        "0.out_proj cannot be replicated: the module it is in reads its weight",
    ),
    "members": (net, {"num_members": 0}, ValueError, "num_members must be at least 1"),
    "noise": (net, {"noise_std": float("inf")}, ValueError, "noise_std must be finite"),
    "state": (net, {"member_state": "keep"}, ValueError, 'member_state must be "fresh" or "copy"'),
    "no optimizer": (net, {"optimizers": [1]}, TypeError, "optimizers must be torch optimizers, got int"),
    "no optimizers": (net, {"optimizers": 3}, TypeError, "optimizers must be torch optimizers, got int; give one or"),
    "no schedulers": (net, {"schedulers": 3}, TypeError, "schedulers must be learning rate schedulers, got int"),
    "generator": (net, {"generator": 3, "noise_std": 0.1}, TypeError, "generator must be a torch.Generator .* got int"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_and_left_as_it_was(case):
    make, options, error, message = REFUSED[case]
    model = make()
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    with pytest.raises(error, match=message):
        lp.expand(model, **{"num_members": 2, **options})
    assert modules == (list(model.modules()) if isinstance(model, nn.Module) else [])


class RowState(torch.optim.SGD):
    """Keeps a state for each row of a matrix."""

    def step(self, closure=None):
        super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["rows"] = torch.zeros(len(parameter), 1)


class LAMB(torch.optim.SGD):
    """Stands for the optimizers of that name, which scale a tensor's step by its norm."""


class MyLAMB(LAMB):
    """One more of the kind."""


def cautious(parameters):
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    optimizer.param_groups[0]["caution"] = True
    return optimizer


@pytest.mark.parametrize(
    "make, options, error, message",
    [
        (lambda p: torch.optim.LBFGS(p), {}, NotImplementedError, "LBFGS mixes the elements of a tensor"),
        (lambda p: torch.optim.Adafactor(p), {}, NotImplementedError, "Adafactor mixes .* optimizer of their own"),
        (lambda p: LAMB(p), {}, NotImplementedError, "LAMB mixes"),
        (lambda p: MyLAMB(p), {}, NotImplementedError, "MyLAMB mixes"),
        (cautious, {}, NotImplementedError, "SGD with caution=True mixes .*; give member_options={.caution.: False}"),
        (lambda p: torch.optim.SGD(net().parameters()), {}, ValueError, "none of the SGD's 4 is one; make it from"),
        (lambda p: torch.optim.SGD(p, lr=1), {"member_options": {"beta": 1}}, ValueError, "member_options has 'beta'"),
        (lambda p: RowState(p), {"member_state": "copy"}, ValueError, "cannot broadcast the state 'rows'"),
    ],
)
def test_optimizers_that_do_not_fit(make, options, error, message):
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    optimizer = make(model.parameters())
    model(torch.randn(2, 4)).sum().backward()
    if not isinstance(optimizer, torch.optim.LBFGS):
        optimizer.step()
    before = copy.copy(optimizer.param_groups)
    with pytest.raises(error, match=message):
        lp.expand(model, 2, targets="head", optimizers=optimizer, **options)
    assert optimizer.param_groups == before and type(model[1]) is nn.Linear


def assert_k_optimizers(optimizer, model, optimizers, members, name):
    """Three steps with random gradients move the model's weights [K, …] as K optimizers move the members'."""
    for _ in range(3):
        for late, *plain in zip(model.parameters(), *(member.parameters() for member in members)):
            late.grad = torch.randn_like(late)
            for parameter, grad in zip(plain, late.grad):
                parameter.grad = grad.clone()
        for each in (optimizer, *optimizers):
            each.step()
    for late, *plain in zip(model.parameters(), *(member.parameters() for member in members)):
        torch.testing.assert_close(late, torch.stack(plain), rtol=1e-6, atol=1e-7, msg=name)


RULES = ("SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "Adadelta", "Adagrad", "ASGD")


@pytest.mark.parametrize("member_state", ("fresh", "copy"))
@pytest.mark.parametrize("rule", RULES)
def test_torch_optimizers_are_k_optimizers(rule, member_state):
    """Two plain steps, then K members with fresh state or the plain one's; one weight has no dimension."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), Temperature())
    optimizer = getattr(torch.optim, rule)(model.parameters(), lr=0.01)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    members = [copy.deepcopy(model) for _ in range(3)]
    optimizers = [getattr(torch.optim, rule)(member.parameters(), lr=0.01) for member in members]
    if member_state == "copy":
        for each in optimizers:
            each.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    targets = ("head", lambda name, module: isinstance(module, Temperature))
    lp.expand(model, 3, targets=targets, optimizers=optimizer, member_state=member_state)
    assert_k_optimizers(optimizer, model, optimizers, members, rule)


def test_timm_optimizers_are_k_optimizers_or_refused():
    """Of every rule of timm's that runs here, a weight and a bias of K members move as those of K optimizers."""
    optim = pytest.importorskip("timm.optim")
    kept, refused = set(), set()
    for name in optim.list_optimizers():
        model = nn.Sequential(nn.Linear(4, 3))
        options = {"opt": name, "lr": 0.01, "weight_decay": 0.1}
        try:
            optimizer = optim.create_optimizer_v2(model.parameters(), **options)
        except (AssertionError, ImportError):  # of other packages, for a GPU
            continue
        members = [copy.deepcopy(model) for _ in range(3)]
        try:
            lp.expand(model, 3, targets="head", optimizers=optimizer)
        except NotImplementedError as error:
            assert "mixes the elements of a tensor" in str(error)
            refused.add(name)
            continue
        if name == "adahessian":  # wants the graph of the gradients
            continue
        optimizers = [optim.create_optimizer_v2(member.parameters(), **options) for member in members]
        assert_k_optimizers(optimizer, model, optimizers, members, name)
        kept.add(name)
    assert {"adamw", "lion", "sgd"} <= kept and {"adamp", "kron", "lamb", "mars", "muon", "cadamw"} <= refused


def test_what_mixes_nothing_is_accepted():
    ops = pytest.importorskip("torchvision.ops")
    frozen = type("DetrFrozenBatchNorm2d", (ops.FrozenBatchNorm2d,), {})(4)
    quiet = [
        foreign("DropBlock2d", "timm.layers.drop", drop_prob=0.1),  # newer timm has no batchwise
        foreign("VOLO", "timm.models.volo", mix_token=False),
        foreign("DropBlock2d", "torchvision.ops.drop_block", drop_prob=0.1),
    ]
    model = net(frozen, ops.StochasticDepth(0.5, "row"), ops.StochasticDepth(0.0, "batch"), *quiet)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lp.expand(model, 2)
    assert model[2] is frozen


def test_unknown_running_statistics_are_a_warning():
    model = net(nn.InstanceNorm2d(4, track_running_stats=True), nn.InstanceNorm2d(4, track_running_stats=True))
    with pytest.warns(UserWarning, match=r"2 \(.*InstanceNorm2d\) and 1 more with running statistics"):
        lp.expand(model, 2)


def test_nothing_to_replace_is_a_warning():
    model = net()
    with pytest.warns(UserWarning, match="targets match no module"):
        assert lp.expand(model, 2, targets="head") is model
    assert type(model[1]) is nn.BatchNorm2d
    with pytest.warns(UserWarning, match="targets match no module"):
        lp.expand(nn.Sequential(nn.Linear(2, 2)), 2, targets=())  # nor is there a batch norm
    with pytest.warns(UserWarning, match="'head' matches no module"):
        lp.expand(model, 2, targets=("batch_norm", "head"))
    assert lp.collapse(model) is model


def test_what_needs_an_expanded_model_says_so():
    model = net()
    for name, call in {
        "collapse": lambda: lp.collapse(model),
        "predict": lambda: lp.predict(model, torch.randn(1, 2, 4, 4)),
        "update_bn": lambda: lp.update_bn([], model),
        "set_base_grad_scale": lambda: lp.set_base_grad_scale(torch.optim.SGD(model.parameters()), model, "mean"),
        "members": lambda: lp.members(model, 0).__enter__(),
        "clip_grad_norm_": lambda: lp.clip_grad_norm_(model, 1.0),
    }.items():
        with pytest.raises(RuntimeError, match=f"{name}: model is not expanded"):
            call()
    lp.expand(model, 2)
    with pytest.raises(ValueError, match="set_base_grad_scale: optimizer holds no base weight of the model"):
        lp.set_base_grad_scale(torch.optim.SGD(net().parameters()), model, "mean")
    searching = torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe")
    with pytest.raises(ValueError, match="set_base_grad_scale: optimizer must have no line search"):
        lp.set_base_grad_scale(searching, model, "mean")
    lp.set_base_grad_scale(searching, model, "sum")
    with pytest.raises(TypeError, match="set_base_grad_scale: optimizer must be a torch optimizer, got int"):
        lp.set_base_grad_scale(3, model, "mean")
    with pytest.raises(ValueError, match="param_groups: no_decay must be at least 0, got -1; None"):
        lp.param_groups(model, lr=0.1, no_decay=-1)
    with pytest.raises(TypeError, match=r"collapse: .* give model.module"):
        lp.collapse(nn.DataParallel(model))
    with pytest.raises(ValueError, match="call its own collapse"):
        lp.collapse(model[1])
    with pytest.raises(ValueError, match="collapse: mode must be"):
        lp.collapse(model, mode="best")


def test_replicated_parameters_that_no_optimizer_takes_are_named():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model[3].weight.requires_grad_(False)
    optimizer = torch.optim.SGD([*model[0].parameters(), *model[2].parameters()], lr=0.1)
    with pytest.warns(
        UserWarning, match="no optimizer trains 1.weight and 2 other replicated parameters, because none"
    ):
        lp.expand(model, 2, optimizers=optimizer)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    base, bias = torch.optim.SGD([*model[0].parameters(), model[1].weight]), torch.optim.SGD([model[1].bias])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lp.expand(copy.deepcopy(model), 2)  # an optimizer is made later
        lp.expand(model, 2, optimizers=[base, bias])
