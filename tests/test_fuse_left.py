"""fuse: what it must leave alone, with the reason that it gives; the values are then the same bits."""

import random
import re

import pytest
import torch
import torch.nn.functional as F
from fuse_blocks import B, Block, K, assert_same, images, pair, reasons
from torch import nn
from torch.utils.checkpoint import checkpoint

FLAG = [True]


def hooked(child):
    class Hooked(Block):
        def __init__(self):
            super().__init__()
            getattr(self, child).register_forward_hook(lambda module, inputs, output: output * 2)

    return Hooked


def global_flag(self, x):
    return F.relu(self.bn1(x)) if FLAG[0] else x


def python_random(self, x):
    return F.relu(self.bn1(x)) if random.random() < 0.5 else x


def torch_random(self, x):
    return F.relu(self.bn1(x)) * torch.rand(1).item()


def counts(self, x):
    self.calls += 1
    return F.relu(self.bn1(x)) * self.calls


def remembers(self, x):
    self.seen.append(x.shape)
    return F.relu(self.bn1(x)) * len(self.seen)


def asks_grad_mode(self, x):
    return F.relu(self.bn1(x)) if torch.is_grad_enabled() else x


def without_grad(self, x):
    with torch.no_grad():
        return F.relu(self.bn1(x))


def checkpoints(self, x):
    return checkpoint(lambda x: F.relu(self.bn1(x)), x, use_reentrant=False)


def by_value(self, x):
    return F.relu(self.bn1(x)) if x.sum() > 0 else x


def by_shape(self, x):
    return F.relu(self.bn1(x)) if x.shape[0] == 4 else x


def by_shape_guarded(self, x):
    try:
        return F.relu(self.bn1(x)) if x.size(0) == 4 else x
    except Exception:
        return x


def by_identity(self, x):
    return F.relu(self.bn1(x)) if x.dtype is torch.float64 else x


def by_type(self, x):
    return F.relu(self.bn1(x)) if type(x) == torch.Tensor else x  # noqa: E721


def by_type_of_a_result(self, x):
    y = self.conv(x)
    return F.relu(self.bn1(y)) if isinstance(y, torch.Tensor) else x


def by_attribute(self, x):
    return F.relu(self.bn1(x)) if hasattr(x, "decompose") else x


def loops(self, x):
    return F.relu(self.bn1(torch.stack([row * 2 for row in x])))


def prints(self, x):
    print("forward")
    return F.relu(self.bn1(x))


def uses_twice(self, x):
    y = self.bn1(x)
    return F.relu(y) + y


def in_place_between(self, x):
    y = self.bn1(x)
    y.mul_(-1)
    return F.relu(y)


def scales(self, x):
    return F.relu(self.bn1(x) * 2)


def adds_itself(self, x):
    y = self.bn1(x)
    return F.relu(y + y)


def adds_with_alpha(self, x):
    return F.relu(torch.add(self.bn1(x), x, alpha=2))


def adds_into_residual(self, x):
    y = x * 1
    y += self.bn1(x)
    return F.relu(y) + y


def residual_changes_input(self, x):
    y = self.conv(x)
    z = self.bn1(y)
    return self.relu(z + self.rectify(y))


def input_is_an_alias(self, x):
    y = self.conv(x)
    z = self.bn1(self.same(y))
    return self.relu(z + self.rectify(y))


def called_again(self, x):
    y = self.bn1(self.conv(x))
    z = self.conv(self.bn1(x))
    return self.relu(y + z)


def other_activation(self, x):
    return F.leaky_relu(self.bn1(x)) + F.relu6(self.bn2(x))


def reads_a_class(self, x):
    return F.relu(self.bn1(x)) if Settings.fast else x


def closure(calls):
    def forward(self, x):
        calls.append(1)
        return F.relu(self.bn1(x)) * (1 + len(calls) % 1)

    return forward


def matches(self, x):
    match x:
        case torch.Tensor():
            return F.relu(self.bn1(x))
    return x


def registers(self, x):
    self.register_buffer("last", x)
    return F.relu(self.bn1(x))


def reads_its_dict(self, x):
    return F.relu(self.bn1(x)) * self.__dict__["rate"]


def skips_the_call(self, x):
    return F.relu(self.bn1.forward(x))


def another_module_between(self, x):
    return F.relu(self.nothing(self.bn1(x)))


def relu_of_a_subclass(self, x):
    return self.leaky(self.bn1(x))


def own_gradient(self, x):
    return TripleGradient.apply(F.relu(self.bn1(x)))


class TripleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        return grad * 3


class Settings:
    fast = True


# name, forward, what fusions must say.
LEFT = {
    name: (type(name, (Block,), {"forward": function}), reason)
    for name, function, reason in [
        ("global_flag", global_flag, "uses FLAG"),
        ("python_random", python_random, "uses random"),
        ("torch_random", torch_random, "calls rand on other values"),
        ("reads_a_class", reads_a_class, "reads Settings.fast"),
        ("closure", closure([]), "uses calls"),
        ("counts", counts, "changes calls"),
        ("remembers", remembers, "reads the attribute seen, a list"),
        ("registers", registers, "calls register_buffer of module.py"),
        ("reads_its_dict", reads_its_dict, "reads __dict__"),
        ("asks_grad_mode", asks_grad_mode, "calls is_grad_enabled"),
        ("without_grad", without_grad, "of _contextlib.py|grad"),
        ("own_gradient", own_gradient, "calls .*apply|reads TripleGradient.apply"),
        ("decorated", torch.no_grad()(lambda self, x: F.relu(self.bn1(x))), "decorated"),
        ("checkpoints", checkpoints, "calls .* of _compile.py|checkpoint"),
        ("by_value", by_value, "decides by the values"),
        ("by_shape", by_shape, "decides by the values"),
        ("by_shape_guarded", by_shape_guarded, "decides by the values"),
        ("by_identity", by_identity, "compares identities"),
        ("by_type", by_type, "uses type"),
        ("by_type_of_a_result", by_type_of_a_result, "type of a value that it computed"),
        ("by_attribute", by_attribute, "reads .decompose"),
        ("matches", matches, "matches patterns"),
        ("loops", loops, "iterates"),
        ("prints", prints, "uses print"),
        ("uses_twice", uses_twice, "2 operations use the output of bn1"),
        ("in_place_between", in_place_between, "2 operations use the output of bn1"),
        ("another_module_between", another_module_between, r"but nothing \(Dropout\)"),
        ("relu_of_a_subclass", relu_of_a_subclass, r"but leaky \(Leaky\)"),
        ("skips_the_call", skips_the_call, "calls|decides|uses"),
        ("scales", scales, "but mul"),
        ("adds_itself", adds_itself, "added to itself"),
        ("adds_with_alpha", adds_with_alpha, "but add"),
        ("adds_into_residual", adds_into_residual, "in place"),
        ("residual_changes_input", residual_changes_input, "may change its input"),
        ("input_is_an_alias", input_is_an_alias, "may change its input"),
        ("called_again", called_again, "called again"),
        ("other_activation", other_activation, "but leaky_relu"),
    ]
} | {
    "hook on the ReLU": (hooked("relu"), r"relu \(ReLU\) has hooks"),
    "hook on the batch norm": (hooked("bn1"), "it has hooks"),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_alone_with_the_reason(name):
    cls, reason = LEFT[name]
    plain, fused = pair(nn.Sequential(nn.Conv2d(3, 4, 1), cls()))
    assert any(re.search(reason, why) for why in reasons(fused)), reasons(fused)
    for training, rows in ((True, K * B), (False, 3), (True, K * B)):
        for seed in range(2 if "random" in name else 1):
            answers = []
            for model in (plain.train(training), fused.train(training)):
                random.seed(seed), torch.manual_seed(seed)
                answers.append(model(images(rows)))
            assert torch.equal(*answers)
        if training and name != "residual_changes_input" and name != "input_is_an_alias":  # not differentiable
            assert_same(plain, fused, [images(rows)])
    assert plain[1].calls == fused[1].calls and plain[1].seen == fused[1].seen


def test_what_is_refused_does_not_run_while_it_is_traced(capsys):
    calls = []
    for function in (prints, closure(calls)):
        pair(nn.Sequential(nn.Conv2d(3, 4, 1), type("Refused", (Block,), {"forward": function})()))
    assert not calls and not capsys.readouterr().out
