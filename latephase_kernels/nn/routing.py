"""Routing: which members the modules of an expanded model run as.

Shapes: K members. Members first … last−1 run on a stacked batch; "average" runs an ordinary batch on their average.
"""

import copy
import dataclasses
import threading
from typing import TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)  # what changes a model in place returns one of its type
_lock = threading.Lock()  # of every routing's blocks, and their choice


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """A with block of lp.members."""

    choice: str | range
    thread: int


class Routing:
    """What all modules of one expanded model share: its root, an explicit choice of members, γ_θ for clipping.

    A plain object, so the root model does not become a submodule of its own layers. Where ranks divide the members
    among them, num_members is the number here, of members first_member … of total_members.
    """

    def __init__(self, model: nn.Module, num_members: int):
        self.model: nn.Module | None = model  # None in a copy of a part: there each layer's own flag decides
        self.num_members = self.total_members = num_members
        self.first_member = 0
        self.override: str | range | None = None
        self.blocks: list[Block] = []  # of lp.members, the innermost last; its choice is the override
        self.turn = threading.RLock()  # of the thread that predicts
        self.base_grad_scale = 1.0

    def __deepcopy__(self, memo: dict) -> "Routing":
        """Return that of a copied model, which is in the memo, or of a part copied alone; no choice is copied."""
        new = memo[id(self)] = copy.copy(self)
        new.model = memo.get(id(self.model))
        return new

    def __getstate__(self) -> dict:
        # An optimizer's hook scales by γ_θ, and no copy of the model or the optimizer has it.
        return {**vars(self), "override": None, "blocks": [], "turn": None, "base_grad_scale": 1.0}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self.turn = threading.RLock()

    def enter(self, choice: str | range) -> "Block":
        """Begin a block in which all modules run as `choice`; leave() ends it.

        Raises:
            RuntimeError: another thread is in one.
        """
        block = Block(choice, threading.get_ident())
        with _lock:
            alone = all(other.thread == block.thread for other in self.blocks)
            if alone:
                self.blocks.append(block)
                self.override = choice
        if not alone:
            raise RuntimeError(
                "members: another thread runs this model as members of its choice (by members, predict or update_bn), "
                "and a model has one choice at a time; give each thread a copy (copy.deepcopy), or a lock"
            )
        return block

    def leave(self, block: "Block") -> None:
        """End a block, the innermost or not."""
        with _lock:
            self.blocks = [other for other in self.blocks if other is not block]
            self.override = self.blocks[-1].choice if self.blocks else None

    def resolve(self, training: bool) -> str | range:
        """Return "average" or the range of members: the explicit choice, else by the root model's training flag.

        `training` is the asking layer's flag.
        """
        chosen = self.override
        if chosen is None:
            training = training if self.model is None else self.model.training
            chosen = range(self.num_members) if training else "average"
        if chosen == "average":
            self.check_whole("members")
        return chosen

    def check_whole(self, where: str) -> None:
        """Raise RuntimeError if other ranks have members of this model."""
        if self.num_members != self.total_members:
            last = self.first_member + self.num_members - 1
            raise RuntimeError(
                f"{where}: this rank has only members {self.first_member} … {last} of {self.total_members}; average "
                "them inside `with distributed.gathered():`, where distributed is what divides the model"
            )

    def choice(self, which: str | int | range) -> str | range:
        """Return what `which` means here: "average" or a range of members.

        Args:
            which: "stacked" (all members), "average", one member, or a range of members.

        Raises:
            TypeError: none of these types.
            ValueError: an unknown name, a member that does not exist, an empty range or one with gaps.
        """
        num_members = self.num_members
        if isinstance(which, str):
            if which == "average":
                return which
            if which == "stacked":
                return range(num_members)
            raise ValueError(f'members: which must be "stacked", "average", an int or a range, got {which!r}')
        if isinstance(which, bool) or not isinstance(which, (int, range)):
            raise TypeError(f"members: which must be a str, an int or a range, got {type(which).__name__}")
        chosen = range(which, which + 1) if isinstance(which, int) else which
        if chosen.step != 1 or not 0 <= chosen.start < chosen.stop <= num_members:
            raise ValueError(f"members: which must be within range({num_members}), got {which}; member 0 is the first")
        return chosen


class Routed(nn.Module):
    """A module of an expanded model, or one standing alone (routing None): that one always runs stacked."""

    num_members: int
    routing: Routing | None = None

    def active_members(self) -> str | range:
        """Return "average" or the range of members to run as."""
        return range(self.num_members) if self.routing is None else self.routing.resolve(self.training)

    def _replicate_for_data_parallel(self) -> nn.Module:
        """Called by nn.DataParallel for every device; torch.nn has the name.

        Raises:
            NotImplementedError: several members run, whose rows it would cut into as many parts as there are devices.
        """
        members = self.active_members()
        if members != "average" and len(members) > 1:
            raise NotImplementedError(
                "nn.DataParallel cuts the stacked batch into parts for its devices, each with rows of other members; "
                "use one process for each device (DistributedDataParallel, lp.Distributed), or let one device be seen"
            )
        return super()._replicate_for_data_parallel()


def is_expanded(model: nn.Module) -> bool:
    """Return whether a model has members."""
    return any(isinstance(module, Routed) and module.routing is not None for module in model.modules())


def routings_of(where: str, model: nn.Module) -> list[Routing]:
    """Return the routings that model's modules follow, each once.

    Raises:
        RuntimeError: there is none; the message begins with `where`.
    """
    routed = [module for module in model.modules() if isinstance(module, Routed)]
    found = {id(m.routing): m.routing for m in routed if m.routing is not None}
    if not found and routed:
        raise RuntimeError(
            f"{where}: model is not expanded: its {type(routed[0]).__name__} was put in by hand and always runs "
            "stacked; call the model itself with stacked batches, or collapse it, and let expand put the members in"
        )
    if not found:
        raise RuntimeError(f"{where}: model is not expanded; call expand first")
    return list(found.values())
