"""What bench_step.py compares: one training step of a network, written in each of the ways there are.

Shapes: K members, B images a member; the stacked batch is [K·B, 3, size, size], member-major.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import latephase_kernels as lp
from latephase_kernels.models import WideResNet


def torchvision_model(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import torchvision

        return getattr(torchvision.models, name)(num_classes=100)

    return make


# name: (constructor, image size)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "WRN-16-4": (lambda: WideResNet(16, 4, 100), 32),
    "WRN-28-10": (lambda: WideResNet(28, 10, 100), 32),
    "ResNet-18": (torchvision_model("resnet18"), 64),
    "ResNet-50": (torchvision_model("resnet50"), 224),
    "DenseNet-161": (torchvision_model("densenet161"), 224),
}
PLAIN, COMPILED, IN_TURN = "plain", "plain, compiled", "members in turn"
SLICES, VMAP = "slices + cat", "vmap"
OURS, FUSED, OURS_COMPILED, GRAPHED = "ours", "ours, fused", "ours, compiled", "ours, CUDA graph"
NO_NORM = "floor: no norm, no ReLU"
CONTENDERS = (PLAIN, COMPILED, IN_TURN, SLICES, VMAP, OURS, FUSED, OURS_COMPILED, GRAPHED, NO_NORM)


@dataclass(frozen=True)
class Setting:
    """What all contenders of one table have in common."""

    network: str
    num_members: int  # K
    rows: int  # B
    device: torch.device
    dtype: torch.dtype
    channels_last: bool
    make: Callable[[], nn.Module] | None = None  # None: the network of that name
    size: int | None = None

    def model(self) -> nn.Module:
        """The plain network, always with the same weights."""
        torch.manual_seed(0)
        model = (self.make or NETWORKS[self.network][0])()
        return model.to(self.device, memory_format=self._memory_format())

    def batch(self) -> tuple[Tensor, Tensor]:
        """Images [K·B, 3, size, size] and labels [K·B]."""
        torch.manual_seed(1)
        size, images = self.size or NETWORKS[self.network][1], self.num_members * self.rows
        x = torch.randn(images, 3, size, size, device=self.device).contiguous(memory_format=self._memory_format())
        return x, torch.randint(0, 10, (images,), device=self.device)

    def _memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)


def sgd(parameters) -> torch.optim.Optimizer:
    """The same rule for everybody; so small a rate that no contender's weights run away."""
    return torch.optim.SGD(parameters, lr=1e-6, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True)


# ---------------------------------------------------------------------------------------------- one model, one batch


class Step:
    """A training step of one model on the whole batch; subclasses say which model and how."""

    is_ensemble = False  # whether it computes what members in turn do

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.x, self.target = setting.batch()
        self.model = self.make_model(setting.model())
        self.optimizer = sgd(self.model.parameters())
        self.run = self.model

    def make_model(self, plain: nn.Module) -> nn.Module:
        return plain

    def loss(self) -> Tensor:
        with self.setting.autocast():
            return F.cross_entropy(self.run(self.x), self.target)

    def backward(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        return loss

    def __call__(self) -> None:
        self.backward()
        self.optimizer.step()

    def release(self) -> None:
        """Free the gradients, as the next step will."""
        self.optimizer.zero_grad(set_to_none=True)

    def gradients(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and every parameter's gradient by name, [K, …] where members have their own."""
        loss = self.backward().detach()
        return loss, {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}


class Plain(Step):
    pass


class Compiled(Step):
    def __init__(self, setting):
        super().__init__(setting)
        self.run = torch.compile(self.model, dynamic=False)


class NoNorm(Step):
    """The plain network without batch norm and ReLU: no implementation of these can make the step faster."""

    def make_model(self, plain):
        for module in list(plain.modules()):
            for name, child in module.named_children():
                if isinstance(child, (nn.BatchNorm2d, nn.ReLU)):
                    setattr(module, name, nn.Identity())
        return plain

    def loss(self):
        relu, F.relu = F.relu, lambda input, inplace=False: input
        try:
            return super().loss()
        finally:
            F.relu = relu


# ---------------------------------------------------------------------------------------------- ensembles


class Stacked(Step):
    """All members in one pass of an expanded network."""

    is_ensemble = True

    def make_model(self, plain):
        return lp.expand(plain, self.setting.num_members, noise_std=0.1, generator=torch.Generator().manual_seed(2))

    def loss(self):
        with self.setting.autocast():
            output = self.run(self.x)
            return lp.member_loss(F.cross_entropy, output, self.target, num_members=self.setting.num_members)


class Fused(Stacked):
    def make_model(self, plain):
        return lp.fuse(super().make_model(plain))


class OursCompiled(Compiled, Fused):
    pass


class Graphed(Fused):
    """The whole step, optimizer too, captured once and replayed."""

    def __init__(self, setting):
        super().__init__(setting)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                super().__call__()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.captured_loss = self.backward()
            self.optimizer.step()

    def __call__(self):
        self.graph.replay()

    def gradients(self):
        self.graph.replay()
        named = self.model.named_parameters()
        return self.captured_loss.detach().clone(), {n: p.grad.clone() for n, p in named if p.grad is not None}


class _NaiveBatchNorm(nn.Module):
    """Batch norm of every member's own, as one would write it in PyTorch."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias, self.eps, self.momentum = ours.weight, ours.bias, ours.eps, ours.momentum
        for name in ("running_mean", "running_var"):
            self.register_buffer(name, getattr(ours, name))


class _SlicesBatchNorm(_NaiveBatchNorm):
    def forward(self, x: Tensor) -> Tensor:
        members = zip(x.chunk(len(self.weight)), self.running_mean, self.running_var, self.weight, self.bias)
        return torch.cat([F.batch_norm(*own, True, self.momentum, self.eps) for own in members])


class _VmapBatchNorm(_NaiveBatchNorm):
    def forward(self, x: Tensor) -> Tensor:
        def normalize(x, mean, var, weight, bias):
            return F.batch_norm(x, mean, var, weight, bias, True, self.momentum, self.eps)

        rows = x.unflatten(0, (len(self.weight), -1))
        stacked = (self.running_mean, self.running_var, self.weight, self.bias)
        return torch.vmap(normalize)(rows, *stacked).flatten(0, 1)


class _Naive(Stacked):
    norm: type[_NaiveBatchNorm]

    def make_model(self, plain):
        model = super().make_model(plain)
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, lp.nn.EnsembleBatchNorm2d):
                    setattr(module, name, self.norm(child))
        return model


class Slices(_Naive):
    norm = _SlicesBatchNorm


class Vmap(_Naive):
    norm = _VmapBatchNorm


class InTurn(Step):
    """The authors' way: members one after the other, each an ordinary step of its own; then the shared weights."""

    is_ensemble = True

    def __init__(self, setting):
        self.setting = setting
        self.x, self.target = setting.batch()
        options = {"noise_std": 0.1, "generator": torch.Generator().manual_seed(2)}
        self.trainer = lp.SequentialTrainer(setting.model(), setting.num_members, optimizer=sgd, **options)

    def backward(self):
        self.trainer.optimizer.zero_grad(set_to_none=True)
        return sum(self._member(k, step=False) for k in range(self.setting.num_members))

    def _member(self, k: int, *, step: bool) -> Tensor:
        rows = slice(k * self.setting.rows, (k + 1) * self.setting.rows)
        own = self.trainer.member_optimizers[k]
        own.zero_grad(set_to_none=True)
        with self.setting.autocast():
            loss = F.cross_entropy(self.trainer.members[k](self.x[rows]), self.target[rows])
        loss.backward()
        if step:
            own.step()
        return loss.detach()

    def __call__(self):
        self.trainer.optimizer.zero_grad(set_to_none=True)
        for k in range(self.setting.num_members):
            self._member(k, step=True)
        self.trainer.optimizer.step()

    def release(self):
        for optimizer in (self.trainer.optimizer, *self.trainer.member_optimizers):
            optimizer.zero_grad(set_to_none=True)

    def gradients(self):
        loss = self.backward()
        members = [dict(member.named_parameters()) for member in self.trainer.members]
        found = {}
        for name, parameter in members[0].items():
            shared = len(members) == 1 or parameter is members[1][name]
            late = self.setting.num_members > 1 and not shared
            found[name] = torch.stack([own[name].grad for own in members]) if late else parameter.grad.clone()
        return loss, found


STEPS: dict[str, type[Step]] = {
    PLAIN: Plain, COMPILED: Compiled, IN_TURN: InTurn, SLICES: Slices, VMAP: Vmap, OURS: Stacked, FUSED: Fused,
    OURS_COMPILED: OursCompiled, GRAPHED: Graphed, NO_NORM: NoNorm,
}  # fmt: skip


def largest_difference(found: tuple, truth: tuple) -> float:
    """The largest relative distance of a gradient, or of the loss, from what it should be.

    A tensor's own norm counts, but at least a thousandth of the largest gradient's: what should be 0 is rounding.
    """
    (loss, gradients), (true_loss, true_gradients) = found, truth
    floor = 1e-3 * max(g.double().norm() for g in true_gradients.values())
    worst = abs(loss.double() - true_loss.double()) / true_loss.double().abs()
    if gradients.keys() != true_gradients.keys():
        return float("inf")
    for name, true in true_gradients.items():
        if gradients[name].numel() != true.numel():  # of K = 1, [1, …] and […] are the same
            return float("inf")
        own = gradients[name].reshape(true.shape)
        worst = max(worst, (own.double() - true.double()).norm() / max(true.double().norm(), floor))
    return float(worst)
