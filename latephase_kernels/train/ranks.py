"""What a run's processes do together: one alone, or those that torchrun has started, one for each device.

Legend: R ranks; M member ranks, D = R/M data ranks; see late_phase/distributed.py.
"""

import contextlib
import datetime
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import late_phase as lp
from ..data.sampling import derived_seed
from ..late_phase.sharded_state import load_model_state, load_optimizer_state, model_state, optimizer_state
from .recipe import Parallel

Answer = TypeVar("Answer")
LOOK_EVERY = 1.0  # seconds between two looks at signals and clocks, about


class Ranks:
    """One process alone: nothing to agree on. `SeveralRanks` has the same methods; all ranks call them together."""

    rank, num_ranks, member_ranks = 0, 1, 1
    data_rank, data_ranks = 0, 1

    def __init__(self, device: torch.device):
        self.device = device

    def take(self, model: nn.Module) -> None:
        """Begin to train a plain model."""

    def expand(self, model: nn.Module, num_members: int, **options: Any) -> None:
        """Expand it; see lp.expand."""
        lp.expand(model, num_members, **options)

    def own(self, count: int) -> range:
        """Return which of a step's minibatches, one a member, are this rank's members'."""
        return range(count)

    def reduce_gradients(self) -> None:
        """Sum the gradients over ranks."""

    def total(self, tensor: Tensor, reduction: str = "sum") -> Tensor:
        """Return the sum, or the least ("min"), over ranks."""
        return tensor

    def share(self, count: int) -> range:
        """Return which of an evaluation's batches are this rank's: every R-th, which may be none."""
        return range(count)

    def rows_of_all(self, rows: Tensor, total: int, batch_size: int) -> Tensor:
        """Return the rows of all batches, in order: [·, total, classes].

        Args:
            rows: of this rank's share of the batches, [·, N, classes]; where it has none, any.
            total: rows of all batches.
            batch_size: rows of a batch; the last may be short.
        """
        return rows

    def gathered(self, model: nn.Module) -> contextlib.AbstractContextManager[nn.Module]:
        """Inside the with block the model, or its copy, has all members."""
        return contextlib.nullcontext(model)

    def agree(self, signal: int | None, save: bool) -> tuple[int | None, bool]:
        """Return the signal that ends the run now, on whichever rank it came, and whether to save now."""
        return signal, save

    def any_signal(self, signal: int | None) -> int | None:
        """Return a signal that came on any rank, now; None if there is none."""
        return signal

    def first_does(self, function: Callable[[], Answer]) -> Answer | None:
        """Return what function returns; of several ranks only the first calls it, and the others get None.

        Raises:
            RankError: on the others, if it raised on the first.
        """
        return function()

    def seed(self, *parts: int | str) -> None:
        """Seed the global generator, for dropout: each rank its own."""
        torch.manual_seed(derived_seed("ranks", self.rank, *parts))

    # ------------------------------------------------------------------------------------------ state

    def own_statistics(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the running statistics that are this rank's own, by name."""
        return {}

    def load_own_statistics(self, model: nn.Module, statistics: dict[str, Tensor]) -> None:
        """Load what own_statistics returned."""

    def model_state(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the state dict, members sharded, statistics averaged."""
        return model.state_dict()

    def load_model_state(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        """Load a state dict with all members."""
        model.load_state_dict(state)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Return the state dict, members sharded."""
        return optimizer.state_dict()

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Load a state dict with all members."""
        optimizer.load_state_dict(state)


class RankError(RuntimeError):
    """The first rank failed at what it alone does."""


class SeveralRanks(Ranks):
    """The ranks of the default process group.

    Args:
        parallel: of the recipe.
        device: this rank's.

    Raises:
        ValueError: R is not divisible by M.
    """

    def __init__(self, parallel: Parallel, device: torch.device):
        super().__init__(device)
        self.rank, self.num_ranks = dist.get_rank(), dist.get_world_size()
        self.member_ranks = parallel.member_ranks
        if self.num_ranks % self.member_ranks:
            raise ValueError(
                f"train: parallel.member_ranks={self.member_ranks} must divide the {self.num_ranks} processes that "
                "torchrun started"
            )
        self.data_ranks = self.num_ranks // self.member_ranks
        self.data_rank = self.rank % self.data_ranks
        self.batch_norm = parallel.batch_norm
        self._mesh = dist.init_device_mesh(
            device.type, (self.member_ranks, self.data_ranks), mesh_dim_names=("member", "data")
        )
        self._steps_until_look = self._steps_taken = 1
        self._looked_at = time.monotonic()

    def take(self, model: nn.Module) -> None:
        self.distributed = lp.Distributed(model, self._mesh, batch_norm=self.batch_norm)

    def expand(self, model: nn.Module, num_members: int, **options: Any) -> None:
        self.distributed.expand(num_members, **options)

    def own(self, count: int) -> range:
        return range(count) if self.distributed.members is None else self.distributed.members

    def reduce_gradients(self) -> None:
        self.distributed.reduce_gradients()

    def total(self, tensor: Tensor, reduction: str = "sum") -> Tensor:
        tensor = tensor.clone()
        dist.all_reduce(tensor, dist.ReduceOp.SUM if reduction == "sum" else dist.ReduceOp.MIN)
        return tensor

    def share(self, count: int) -> range:
        return range(self.rank, count, self.num_ranks)

    def rows_of_all(self, rows: Tensor, total: int, batch_size: int) -> Tensor:
        batches = torch.arange(total, device=rows.device).split(batch_size)
        places = [torch.cat([batches[0][:0], *batches[rank :: self.num_ranks]]) for rank in range(self.num_ranks)]
        count = len(places[self.rank])
        own = rows.new_zeros(*rows.shape[:-2], len(places[0]), rows.size(-1))  # none has more than the first
        own[..., :count, :] = rows[..., :count, :]
        parts = [torch.empty_like(own) for _ in places]
        dist.all_gather(parts, own)
        whole = rows.new_empty(*rows.shape[:-2], total, rows.size(-1))
        for place, part in zip(places, parts):
            whole[..., place, :] = part[..., : len(place), :]
        return whole

    def gathered(self, model: nn.Module) -> contextlib.AbstractContextManager[nn.Module]:
        return self.distributed.gathered(model)

    def agree(self, signal: int | None, save: bool) -> tuple[int | None, bool]:
        """As in one process; the ranks look together after as many steps as take about a second."""
        self._steps_until_look -= 1
        if self._steps_until_look > 0:
            return None, False
        now, taken = time.monotonic(), self._steps_taken
        steps = max(1, min(round(taken * LOOK_EVERY / max(now - self._looked_at, 1e-3)), 2 * taken))
        first = self.rank == 0
        look = torch.tensor([signal or 0, int(save and first), steps if first else 0])
        dist.all_reduce(look, dist.ReduceOp.MAX)
        received, save_now, self._steps_until_look = look.tolist()
        self._steps_taken, self._looked_at = self._steps_until_look, now
        return received or None, bool(save_now)

    def any_signal(self, signal: int | None) -> int | None:
        look = torch.tensor(signal or 0)
        dist.all_reduce(look, dist.ReduceOp.MAX)
        return int(look) or None

    def first_does(self, function: Callable[[], Answer]) -> Answer | None:
        answer, message = None, [None]
        failure: Exception | None = None
        if self.rank == 0:
            try:
                answer = function()
            except Exception as error:
                failure, message = error, [str(error) or type(error).__name__]  # type: ignore[list-item]
        dist.broadcast_object_list(message)
        if failure is not None:
            raise failure
        if message[0] is not None:
            raise RankError(f"rank 0 failed: {message[0]}")
        return answer

    # ------------------------------------------------------------------------------------------ state

    @property
    def layout(self) -> str:
        """The name of this rank's own part of a checkpoint: another layout of ranks does not find it."""
        return f"rank-{self.rank}-of-{self.member_ranks}x{self.data_ranks}"

    def own_statistics(self, model: nn.Module) -> dict[str, Tensor]:
        return {name: tensor for name, tensor, _ in self.distributed.own_statistics(model)}

    @torch.no_grad()
    def load_own_statistics(self, model: nn.Module, statistics: dict[str, Tensor]) -> None:
        for name, tensor in self.own_statistics(model).items():
            tensor.copy_(statistics[name])

    def model_state(self, model: nn.Module) -> dict[str, Tensor]:
        return model_state(self.distributed, model)

    def load_model_state(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        load_model_state(self.distributed, model, state)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return optimizer_state(self.distributed, optimizer)

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        load_optimizer_state(self.distributed, optimizer, state)


def _several_ranks() -> bool:
    """Whether torchrun has started more processes than this one."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def usable_device(where: str, name: str | None) -> str:
    """Return the device that was asked for; by default "cuda" where there is one, else "cpu".

    Of several ranks on GPUs each has that of its local rank.

    Raises:
        ValueError: there is none of this name here.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if _several_ranks() and name.partition(":")[0] == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        torch.empty(0, device=name).cpu()  # which meta refuses
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{where}: --device must be a device that works here, got {name}: {reason}") from None
    return name


@contextlib.contextmanager
def start_ranks(parallel: Parallel, device: str | None) -> Iterator[Ranks]:
    """Join the processes that torchrun has started, for the with block; without torchrun there is this one alone.

    Args:
        parallel: of the recipe.
        device: "cuda", "cpu", …; None: the GPU if there is one. Of several ranks each takes the GPU of its local rank.

    Raises:
        ValueError: there is no such device, or parallel does not fit the number of processes.
    """
    name = usable_device("train", device)
    if not _several_ranks():
        if parallel.member_ranks > 1:
            raise ValueError(
                f"train: parallel.member_ranks={parallel.member_ranks} needs as many processes; start them with "
                f"torchrun --nproc_per_node={parallel.member_ranks} -m latephase_kernels train …"
            )
        yield Ranks(torch.device(name))
        return
    on_gpu = torch.device(name).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(name)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=datetime.timedelta(seconds=parallel.timeout_seconds)
    )
    try:
        yield SeveralRanks(parallel, torch.device(name))
    finally:
        dist.destroy_process_group()
