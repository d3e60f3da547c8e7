"""The paper's loop, member after member: what stacked training is equal to, plain and slow.

    for k in 1..K:                                  # all at the same θ
        draw minibatch M_k
        φ_k ← U_φ(φ_k, ∂L(M_k, θ, φ_k)/∂φ_k)
    θ ← U_θ(θ, γ_θ · Σ_k ∂L(M_k, θ, φ_k)/∂θ)        # each at the φ_k before its update

Symbols: K members, θ base weights, φ_k late-phase weights of member k, γ_θ base gradient scale, U an optimizer's rule.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.checks import check_num_members
from .convert import expand
from .gradients import base_grad_factor

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class SequentialTrainer:
    """K plain models that share every tensor but the late-phase ones, trained in turn.

    For comparison with `expand`, and for reading: one stacked step of an expanded model does the same, faster.

    Args:
        model: plain; it becomes member 0.
        num_members: K.
        optimizer: makes U_θ from the base weights, such as lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9).
        member_optimizer: makes U_φ from one member's weights; None for the same rule.
        targets, noise_std, generator: as in expand; the targets' tensors must keep their names ("rank1" adds some).
        base_grad_scale: γ_θ: "sum" (1), "mean" (1/K) or a number.

    Attributes:
        members: the K plain models.

    Raises:
        As expand; also NotImplementedError where a target is no tensor of the plain model.

    Source: von Oswald et al., ICLR 2021, algorithm 1.
    """

    def __init__(
        self,
        model: nn.Module,
        num_members: int,
        *,
        optimizer: MakeOptimizer,
        member_optimizer: MakeOptimizer | None = None,
        targets: str | Callable | Iterable[str | Callable] = ("batch_norm",),
        noise_std: float = 0.0,
        generator: torch.Generator | None = None,
        base_grad_scale: str | float = "sum",
    ):
        check_num_members("SequentialTrainer", num_members)
        self._factor = base_grad_factor("SequentialTrainer", base_grad_scale, num_members)
        self._expanded = expand(
            copy.deepcopy(model), num_members, targets=targets, noise_std=noise_std, generator=generator
        )
        plain, stacked = model.state_dict(), self._expanded.state_dict()
        new = sorted(stacked.keys() - plain.keys())
        if new:
            raise NotImplementedError(
                f"SequentialTrainer: targets must be tensors of the plain model, but {new[0]} is not; choose others"
            )
        late = {name for name, tensor in plain.items() if stacked[name].shape != tensor.shape}
        self.members = [model] + [_sharing_copy(model, late) for _ in range(num_members - 1)]
        with torch.no_grad():
            for k, member in enumerate(self.members):
                for name, tensor in member.state_dict().items():
                    if name in late:
                        tensor.copy_(stacked[name][k])
        self._base = [parameter for name, parameter in model.named_parameters() if name not in late]
        self.optimizer = optimizer(self._base)
        self.member_optimizers = [
            (member_optimizer or optimizer)([p for name, p in member.named_parameters() if name in late])
            for member in self.members
        ]

    def step(self, loss_fn: Callable[[Any, Any], Tensor], minibatches: Sequence[tuple[Any, Any]]) -> list[float]:
        """Train every member on its minibatch, then the base weights on the sum of the members' gradients.

        Args:
            loss_fn: (output [B, …], target [B, …]) -> the mean over the minibatch.
            minibatches: K pairs (input, target), of B samples each. A member is called with its input alone: of a model
                that takes several, give the trainer a module around it whose forward takes them as one.

        Returns:
            The K losses.

        Raises:
            ValueError: there are not K minibatches.
        """
        if len(minibatches) != len(self.members):
            raise ValueError(
                f"SequentialTrainer.step: minibatches must be one for each of the {len(self.members)} members, "
                f"got {len(minibatches)}"
            )
        losses = []
        self.optimizer.zero_grad()
        for member, optimizer, (inputs, target) in zip(self.members, self.member_optimizers, minibatches):
            optimizer.zero_grad()
            loss = loss_fn(member(inputs), target)
            loss.backward()  # the base weights' gradients add up over the members
            optimizer.step()
            losses.append(loss.item())
        for parameter in self._base:
            if parameter.grad is not None:
                parameter.grad *= self._factor
        self.optimizer.step()
        return losses

    @torch.no_grad()
    def expanded(self) -> nn.Module:
        """Return a copy of the members as an expanded model, for predict, update_bn and collapse."""
        model = copy.deepcopy(self._expanded)
        states = [member.state_dict() for member in self.members]
        for name, tensor in model.state_dict().items():
            late = tensor.shape != states[0][name].shape
            tensor.copy_(torch.stack([state[name] for state in states]) if late else states[0][name])
        return model


def _sharing_copy(model: nn.Module, late: set[str]) -> nn.Module:
    """Return a copy of model that holds the same Parameter and buffer objects, but for the late ones."""
    shared = {
        id(tensor): tensor
        for module_name, module in model.named_modules()
        for tensors in (module._parameters, module._buffers)
        for name, tensor in tensors.items()
        if tensor is not None and f"{module_name}.{name}".lstrip(".") not in late
    }
    return copy.deepcopy(model, shared)  # the memo's objects are used as they are
