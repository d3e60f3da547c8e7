"""fuse: blocks of every kind that it fuses, calls that no trace covers, and blocks that are changed afterwards."""

from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from fuse_blocks import (
    ADD_RELU,
    RELU,
    B,
    Block,
    Changing,
    K,
    OneOrMany,
    Rich,
    assert_same,
    fused_patterns,
    images,
    pair,
    reasons,
)
from torch import nn

import latephase_kernels as lp

Answer = namedtuple("Answer", "y x")


def identity_between(self, x):
    return self.relu(self.same(self.same(self.bn1(x)) + x))


def both_are_batch_norms(self, x):
    return torch.relu(torch.add(self.bn1(self.conv(x)), self.bn2(self.down(x))))


def residual_first(self, x):
    return (x + self.bn1(x)).relu_() + (self.bn2(self.conv(x)).add_(x)).relu()


def called_twice(self, x):
    return F.relu(self.bn1(F.relu(self.bn1(x)) * 2))


def dropout(self, x):
    return F.dropout(F.relu(self.bn1(x)), self.rate, self.training)


def childs_attribute(self, x):
    return F.dropout(F.relu(self.bn1(x)), self.drop.p, self.drop.training)


def tensors_of_all_kinds(self, x):
    return F.relu(self.bn1(x * self.doubled)) * self.plain + self.down.weight.sum() + self.bn2.running_mean.sum()


def absent_and_none(self, x):
    y = F.relu(self.bn1(x))
    if self.gamma is not None:
        y = y * self.gamma
    return y * getattr(self, "factor", 1)


def numbers_in_place(self, x):
    n = m = x.shape[-1]
    n += 1
    return F.relu(self.bn1(x)) * n + m


def changes_its_input(self, x):
    y = F.relu(self.bn1(x * 2))
    x += 1
    return y + x


def in_a_list(self, x):
    for norm in self.norms:
        x = F.relu(norm(x))
    return x


def broadcast(self, x):
    mean = x.mean((2, 3), keepdim=True)
    return F.relu(self.bn1(x) + mean) + F.relu(self.bn2(x) + 0.5)


def other_type(self, x):
    return F.relu(self.bn1(x.float()) + x)


def structures(self, x):
    return Answer({"relu": F.relu(self.bn1(x))}, [x * 2, (x,)])


def with_options(self, x, mask=None, *rest, scale=1.0, **others):
    y = F.relu(self.bn1(x)) * scale
    return y if mask is None else y * mask


def needs_a_mask(self, x, mask):
    y = F.relu(self.bn1(x))
    return y * mask if mask is not None else y


FUSED = {
    name: (type(name, (Rich,), {"forward": function}), patterns)
    for name, function, patterns in [
        ("identity_between", identity_between, {ADD_RELU: 1}),
        ("both_are_batch_norms", both_are_batch_norms, {ADD_RELU: 1}),
        ("residual_first", residual_first, {ADD_RELU: 2}),
        ("called_twice", called_twice, {RELU: 2}),
        ("dropout", dropout, {RELU: 1}),
        ("childs_attribute", childs_attribute, {RELU: 1}),
        ("tensors_of_all_kinds", tensors_of_all_kinds, {RELU: 1}),
        ("absent_and_none", absent_and_none, {RELU: 1}),
        ("numbers_in_place", numbers_in_place, {RELU: 1}),
        ("changes_its_input", changes_its_input, {RELU: 1}),
        ("in_a_list", in_a_list, {RELU: 2}),
        ("broadcast", broadcast, {ADD_RELU: 2}),
        ("structures", structures, {RELU: 1}),
        ("one_or_many", OneOrMany.forward, {RELU: 1}),
        ("with_options", with_options, {RELU: 1}),
    ]
}


@pytest.mark.parametrize("name", FUSED)
def test_fused_with_the_same_values(name):
    cls, patterns = FUSED[name]
    plain, fused = pair(nn.Sequential(nn.Conv2d(3, 4, 1), cls()))
    assert fused_patterns(fused) == patterns
    for training, rows in ((True, K * B), (False, 3), (True, K * B)):
        plain.train(training), fused.train(training)
        assert_same(plain, fused, [images(rows)])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")
def test_a_scripted_child_is_a_child_as_any_other():
    plain = pair(nn.Sequential(Block()))[0]
    plain[0].conv = torch.jit.script(plain[0].conv)
    fused = lp.expand(nn.Sequential(Block()).double(), K)
    fused[0].conv = torch.jit.script(fused[0].conv)
    fused.load_state_dict(plain.state_dict())
    assert fused_patterns(lp.fuse(fused)) == {RELU: 1}  # its output might be anybody's, so the add stays
    assert_same(plain, fused, [images(channels=4)])


def test_residual_of_another_type_is_added_as_it_is_written():
    plain, fused = pair(nn.Sequential(type("OtherType", (Block,), {"forward": other_type})()))
    plain.float(), fused.float()
    assert fused_patterns(fused) == {ADD_RELU: 1}
    assert_same(plain, fused, [images(channels=4)])
    assert fused(images(channels=4)).dtype == torch.float64


def test_calls_that_no_trace_covers_run_the_original():
    x, mask = images(channels=4), images(channels=4, seed=1)
    plain, fused = pair(FUSED["with_options"][0]())
    calls = [lambda m: m(x, mask), lambda m: m(x, scale=3.0), lambda m: m(x=x), lambda m: m(x, mask, 1, other=2)]
    for call in calls:
        assert torch.equal(call(plain), call(fused))
    plain, fused = pair(OneOrMany())
    assert_same(plain, fused, [x])
    assert_same(plain, fused, [x, mask])
    assert torch.equal(plain((x, mask)), fused((x, mask)))
    plain, fused = pair(type("NeedsAMask", (Block,), {"forward": needs_a_mask})())
    assert fused_patterns(fused) == {RELU: 1}
    assert torch.equal(plain(x, None), fused(x, None)) and torch.equal(plain(x, mask), fused(x, mask))
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        fused(x)


# ---------------------------------------------------------------------------------------------- changed afterwards


def append(block):
    block.rest.append(nn.Conv2d(4, 4, 1).double())


CHANGES = {
    "attribute": lambda block: setattr(block, "rate", 0.1),
    "attribute of a child": lambda block: setattr(block.drop, "p", 0.9),
    "flag of a child": lambda block: block.drop.eval(),
    "attribute of the class": lambda block: setattr(Changing, "twice", True),
    "None becomes a parameter": lambda block: setattr(block, "gamma", nn.Parameter(torch.ones(1) * 3)),
    "absent becomes present": lambda block: setattr(block, "factor", 3),
    "child": lambda block: setattr(block, "relu", nn.SiLU()),
    "child by add_module": lambda block: block.add_module("relu", nn.SiLU()),
    "child by its dict": lambda block: block._modules.update(rectify=nn.SiLU()),
    "list": append,
    "hook on a ReLU": lambda block: block.relu.register_forward_hook(lambda module, args, y: y + 1),
    "hook on a batch norm": lambda block: block.bn1.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    "hook on a convolution": lambda block: block.conv.register_forward_hook(lambda module, args, y: y + 1),
    "forward set on a ReLU": lambda block: setattr(block.relu, "forward", lambda x: x),
    "activation": lambda block: setattr(block.bn2, "activation", "relu"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_block_runs_its_original_forward(name):
    x = images(channels=4)
    plain, fused = pair(nn.Sequential(Changing()))
    assert fused_patterns(fused) == {RELU: 1, ADD_RELU: 1}
    try:
        for model in (plain, fused):
            torch.manual_seed(5)
            CHANGES[name](model[0])
        assert_same(plain, fused, [x])
        assert any("its block has changed; call fuse" in why for why in reasons(fused))
        lp.fuse(fused)
        assert not any("changed" in why for why in reasons(fused))
        assert_same(plain, fused, [x])
    finally:
        Changing.twice = False


def test_a_hook_on_the_block_or_everywhere_still_runs():
    model = pair(nn.Sequential(Block()))[1]
    seen = []
    handle = model[0].register_forward_hook(lambda module, args, y: seen.append(module))
    model(images(channels=4))
    assert seen == [model[0]] and sum(fused_patterns(model).values()) == 2
    handle.remove()
    seen.clear()
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(module))
    try:
        model(images(channels=4))
    finally:
        handle.remove()
    assert {type(module) for module in seen} >= {nn.ReLU, nn.Conv2d, type(model[0])}
