"""Late-phase weights of any module: its forward runs once for each member, with that member's weights.

Shapes: K members, B rows a member. Stacked input is [K·B, …], member-major: dim 0 must be the batch.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from .member_module import (
    MemberModule,
    check_mode,
    check_own_forward,
    check_replication,
    check_rows,
    member_mean,
)


class Memberwise(MemberModule):
    """K copies of a module of any class, made by `from_module`.

    Exact wherever dim 0 is the batch and samples do not mix. Whatever its forward takes goes along: of the first
    tensor, and of others with as many rows, every member gets its own. The average has the mean weights; where outputs
    are no linear function of these (an activation behind them, say), it is not the average of the members' outputs.
    """

    def extra_repr(self) -> str:
        return f"{self.plain_type.__name__}, num_members={self.num_members}"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the plain module does: of stacked arguments, stacked; of others, by the average weights.

        Raises:
            TypeError: no argument has a batch.
            ValueError: the rows are not the same number for each member.
            NotImplementedError: a nested tensor, stacked.
        """
        members = self.active_members()
        if isinstance(members, str):
            return self._as_plain(self.averaged()).forward(*args, **kwargs)
        leaves, structure = tree_flatten((args, kwargs))
        batch = next((x for x in leaves if isinstance(x, Tensor) and x.dim() > 0), None)
        if batch is None:
            raise TypeError(
                f"{self.plain_type.__name__}: members need an argument with a batch in dim 0, got none; choose another "
                "target"
            )
        num_members, rows = len(members), batch.size(0)
        check_rows(self.plain_type.__name__, batch, num_members)

        def parts(x: Any) -> Sequence:
            own = isinstance(x, Tensor) and x.dim() > 0 and x.size(0) == rows
            return x.unflatten(0, (num_members, rows // num_members)).unbind(0) if own else [x] * num_members

        columns = [parts(x) for x in leaves]
        weights = {
            name: [None] * num_members if own is None else self._members_of(members, own).unbind(0)
            for name, own in self._parameters.items()
        }
        outputs = []
        for k in range(num_members):
            own_args, own_kwargs = tree_unflatten([column[k] for column in columns], structure)
            plain = self._as_plain({name: of_members[k] for name, of_members in weights.items()})
            outputs.append(plain.forward(*own_args, **own_kwargs))
        return tree_map(lambda *own: torch.cat(own) if isinstance(own[0], Tensor) else own[0], *outputs)

    def averaged(self) -> dict[str, Tensor | None]:
        """Return the plain module's parameters, or None, by name: the mean over members, summed in float64."""
        return {n: None if p is None else member_mean(p) for n, p in self._parameters.items()}

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        num_members: int,
        noise_std: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> "Memberwise":
        """Return num_members copies of a module; flags, hooks, types and devices are the module's.

        Args:
            module: of any class, without submodules and buffers.
            num_members: K.
            noise_std: σ0, φ_k = φ + σ0 · rms(φ) · ε_k for every parameter.
            generator: of ε.

        Raises:
            TypeError, ValueError: num_members or noise_std does not fit.
            NotImplementedError: not all that the module computes with is its own parameters.
        """
        where = "Memberwise.from_module"
        check_replication(where, num_members, noise_std, generator)
        _check_alone(where, module)
        return cls._copies_of(module, num_members, noise_std, generator)

    @torch.no_grad()
    def collapse(self, mode: str = "exact") -> nn.Module:
        """Return the plain module of the mean weights, in both modes.

        Raises:
            ValueError: an unknown mode.
        """
        check_mode(mode)
        return self._collapsed_to(self.averaged())


def _check_alone(where: str, module: nn.Module) -> None:
    """Raise NotImplementedError unless it has parameters alone and calls its class's forward, which keeps them."""
    cls = type(module)
    name = f"{where}: {cls.__module__}.{cls.__qualname__}"
    if not any(parameter is not None for parameter in module._parameters.values()):
        raise NotImplementedError(f"{name} has no parameters of its own to replicate; leave it out")
    if module._modules:
        inside = ", ".join(f'"{child}"' for child in module._modules)
        raise NotImplementedError(f"{name} has modules inside ({inside}); choose these, those that have parameters")
    buffers = [name for name, buffer in module._buffers.items() if buffer is not None]
    if buffers:
        inside = ", ".join(f'"{name}"' for name in buffers)
        raise NotImplementedError(
            f"{name} has buffers ({inside}), which members could not share if forward changes them; keep them in a "
            "module of their own"
        )
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
        raise NotImplementedError(f"{name} with max_norm changes its weight in forward; leave it out")
    own = {key: value for key, value in vars(module).items() if key != "_parameters"}
    holding = next((key for key, value in own.items() if any(isinstance(x, Tensor) for x in tree_leaves(value))), None)
    if holding is not None:
        raise NotImplementedError(
            f'{name} has tensors in its attribute "{holding}", which would go on with the plain weights; choose '
            "another target"
        )
    check_own_forward(where, module)
