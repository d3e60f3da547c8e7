"""A device without float64, as Apple's mps: members train, predict and collapse on it as they do on the CPU.

Run by test_backend.py, in a process of its own: the device stays registered. Its tensors are those of the CPU behind a
class that refuses float64, and other tensors than its own beside them.
"""

import copy
import functools
import sys
from unittest import mock

import test_trainer
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

import latephase_kernels as lp
from latephase_kernels.train.deep_ensemble import DeepEnsemble
from latephase_kernels.train.image_task import ImageEvaluation
from latephase_kernels.train.ranks import Ranks
from latephase_kernels.train.recipe import Optimizer
from latephase_kernels.train.text_task import bits_per_character
from latephase_kernels.train.trainer import Trainer

WIDE = (torch.float64, torch.complex128)
K, ROWS = 3, 4


class Module(_DummyBackendModule):
    put_back = 0  # states of the random number generator

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]

    def get_rng_state(self, device):
        return torch.get_rng_state()

    def set_rng_state(self, state, device):
        self.put_back += 1


class Foreign(torch.Tensor):
    __slots__ = ("of_cpu",)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, of_cpu, requires_grad=False):
        if of_cpu.dtype in WIDE:
            raise TypeError("this device has no float64")
        options = {"strides": of_cpu.stride(), "dtype": of_cpu.dtype, "device": DEVICE, "requires_grad": requires_grad}
        return torch.Tensor._make_wrapper_subclass(cls, of_cpu.shape, **options)

    def __init__(self, of_cpu, requires_grad=False):
        self.of_cpu = of_cpu

    def __deepcopy__(self, memo):
        new = Foreign(self.of_cpu.clone(), self.requires_grad)
        if isinstance(self, nn.Parameter):
            new = nn.Parameter(new, self.requires_grad)
        vars(new).update(vars(self))
        return memo.setdefault(id(self), new)

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return run(operator, *args, **kwargs or {})


def run(operator, *args, **kwargs):
    """Run an operator that makes a tensor of this device, or has one."""
    leaves, name = tree_leaves((args, kwargs)), operator.overloadpacket.__name__
    if kwargs.get("device") is not None:
        here = torch.device(kwargs["device"]).type == DEVICE.type
    else:
        here = isinstance(args[0], Foreign) if name == "copy_" else any(isinstance(x, Foreign) for x in leaves)
    own_args, own_kwargs = tree_map(lambda x: x.of_cpu if isinstance(x, Foreign) else x, (args, kwargs))
    if not here:
        return operator(*own_args, **own_kwargs)
    others = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, Foreign) and x.dim()]
    if others and name not in ("copy_", "_to_copy"):
        raise RuntimeError(f"{name}: tensors of two devices")
    if any(isinstance(x, torch.dtype) and x in WIDE for x in leaves):
        raise TypeError(f"{name}: this device has no float64")
    if "device" in own_kwargs:
        own_kwargs["device"] = "cpu"
    answer = tree_map(lambda x: Foreign(x) if isinstance(x, Tensor) else x, operator(*own_args, **own_kwargs))
    return return_and_correct_aliasing(operator, args, kwargs, answer)


_setup_privateuseone_for_python_backend("singles", backend_module=Module())
DEVICE = torch.device("singles", 0)
all_operators, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
all_operators.fallback(run, "PrivateUse1")
for operator in (torch.ops.aten.arange.default, torch.ops.aten.randperm.generator):  # a fallback sees them resize
    aten.impl(operator.name(), functools.partial(run, operator), "PrivateUse1")


class Network(nn.Module):
    def __init__(self, norm=nn.BatchNorm2d, mixing=0.0):
        super().__init__()
        self.conv, self.norm, self.relu, self.head = nn.Conv2d(3, 6, 3), norm(6), nn.ReLU(), nn.Linear(6, 5)
        self.mixing = mixing

    def forward(self, x):
        x = self.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.head(x + self.mixing * x.flip(0))


class Bigrams(nn.Embedding):
    """A language model: the logits of the next symbol."""

    def forward(self, symbols, state):
        return super().forward(symbols), state


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(5, 4, batch_first=True)

    def forward(self, x):
        return self.lstm(x.flatten(1, 2))[0].mean(1)


def trained(plain, device, targets, images, labels):
    """Return a member-trained model and the answers of its members; on the CPU by the reference, too."""
    model = copy.deepcopy(plain).to(device)
    images, labels = images.to(device), labels.to(device)
    generator = torch.Generator().manual_seed(0)
    lp.fuse(lp.expand(model, K, targets=targets, noise_std=0.1, generator=generator))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        lp.member_loss(F.cross_entropy, model(images), labels, num_members=K).backward()
        lp.clip_grad_norm_(model, 1.0)
        optimizer.step()
    lp.update_bn([images], model)
    return model, lp.predict(model, images, members="all")


def check(plain, targets):
    images, labels = torch.randn(K * ROWS, 3, 5, 5), torch.randint(4, (K * ROWS,))
    (on_cpu, expected), (model, logits) = (trained(plain, d, targets, images, labels) for d in ("cpu", DEVICE))
    for found, tensor in zip((logits, *model.state_dict().values()), (expected, *on_cpu.state_dict().values())):
        torch.testing.assert_close(found.cpu(), tensor, rtol=1e-4, atol=1e-5)
    assert lp.backend_for(logits) == "reference"
    put_back = torch.singles.put_back
    lp.check_members(model, images.to(DEVICE))
    assert torch.singles.put_back == put_back + 1
    uncertainty = (lp.predictive_entropy(logits), lp.member_disagreement(logits))
    assert {tensor.device for tensor in (*uncertainty, *model.state_dict().values())} == {DEVICE}
    with torch.no_grad():
        for tensor, own in zip(on_cpu.state_dict().values(), model.state_dict().values()):
            tensor.copy_(own.cpu())  # to the bit, for what follows
    for mode in ("exact", "weights"):
        collapsed = lp.collapse(copy.deepcopy(model), mode=mode).state_dict()
        for key, tensor in lp.collapse(copy.deepcopy(on_cpu), mode=mode).state_dict().items():
            assert collapsed[key].device == DEVICE and torch.equal(collapsed[key].cpu(), tensor), (mode, key)
    if not isinstance(plain, Recurrent):  # PyTorch's own LSTM has no fallback for this device
        average = lp.predict(model, images.to(DEVICE))
        torch.testing.assert_close(average.cpu(), lp.predict(on_cpu, images), rtol=1e-4, atol=1e-5)


class HostGenerator(torch.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")


def host_tensor(data, dtype=None, device="cpu", tensor=torch.tensor):  # which would not ask the device
    return tensor(data, dtype=dtype).to(device)


def check_training():
    given = test_trainer.recipe(skip_nonfinite=True, optimizer=Optimizer(lr=0.1, clip_norm=1.0))
    data = test_trainer.data()
    on_cpu, trainer = Trainer(given, data), Trainer(given, data, DEVICE)
    for _ in range(9):
        on_cpu.step()
    state = copy.deepcopy(on_cpu.state_dict())
    assert not any(isinstance(leaf, Tensor) and leaf.dtype in WIDE for leaf in tree_leaves(state))  # fits any device
    trainer.load_state_dict(state)
    found = []
    for each in (on_cpu, trainer):
        evaluation = ImageEvaluation(given, data, data, Ranks(each.device))
        evaluation.progress(each.model, lambda: None)
        test_trainer.run(each).state_dict()
        loss, metrics = each.read_loss()[0], evaluation.final(each.model)[0]
        ensemble = DeepEnsemble([each.model]).eval()
        found.append((loss, metrics["ensemble"]["nll"], evaluation.logits(ensemble).cpu()))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def check_text():
    text, model = torch.randint(6, (50,)), Bigrams(6, 6)
    expected = bits_per_character(model, text, 3)["averaged"]
    assert abs(bits_per_character(model.to(DEVICE), text.to(DEVICE), 3)["averaged"] - expected) < 1e-5


if __name__ == "__main__":
    lp.set_backend("reference")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    check(Network(), ("batch_norm", "head"))
    check(Network(lambda channels: nn.BatchNorm2d(channels, affine=False)), "batch_norm")
    check(Network(lambda channels: nn.GroupNorm(2, channels)), ("group_norm", "rank1"))
    check(Recurrent(), "rank1")
    check_text()
    metrics = mock.Mock()  # in place of torchmetrics, which takes longer to import than all the rest
    metrics.multiclass_calibration_error.return_value.item.return_value = 0.0
    names = ("torchmetrics", "torchmetrics.functional", "torchmetrics.functional.classification")
    torch.Generator, torch.tensor = HostGenerator, host_tensor
    with mock.patch.dict(sys.modules, dict.fromkeys(names, metrics)):
        check_training()
    mixing = lp.expand(Network(mixing=1e-4).to(DEVICE), K)
    try:
        lp.check_members(mixing, torch.randn(K * ROWS, 3, 5, 5).to(DEVICE))
    except RuntimeError as error:
        assert "answers differently" in str(error)
    else:
        raise AssertionError("float64 on the CPU would have shown it")
