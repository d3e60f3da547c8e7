"""Late-phase training by several ranks: each has a share of every minibatch, some of the members, or both.

Shapes: K members, B rows a minibatch over all ranks; M member ranks times D data ranks, R = M·D in all. Rank (m, d)
holds members m·K/M … (m+1)·K/M − 1, and of each the rows d·B/D … (d+1)·B/D − 1. Before expansion it has B/R rows.

    ∂/∂θ   Σ over all R ranks / D      base weights: the mean over data ranks, the sum over member ranks
    ∂/∂φ   Σ over D data ranks / D     late-phase weights: never sent to another member rank
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_map

from ..nn.member_module import check_mode
from ..nn.routing import Routed, is_expanded
from ..ops.checks import check_num_members
from ..ops.ensemble_batch_norm_synchronized import StatisticsGroup
from .convert import collapse, expand
from .gradient_reduction import BUCKET_BYTES, GradientReduction
from .member_shards import gather_members, keep_members, member_tensors, set_members
from .optimizers import listed_optimizers, member_parameters
from .rank_agreement import check_same_on_ranks
from .rank_statistics import mean_over_ranks, own_statistics, plain_again, replace_plain, set_statistics_group
from .sharded_state import load_model_state, load_optimizer_state, model_state, optimizer_state
from .targets import check_not_wrapped

BATCH_NORMS = ("local", "synchronized")
_DIMENSIONS = ("member", "data")


class Distributed:
    """One model trained by the ranks of a device mesh, as one process would train it on the whole batch.

        mesh = init_device_mesh("cuda", (M, D), mesh_dim_names=("member", "data"))
        distributed = lp.Distributed(model, mesh)
        loss_fn(model(distributed.share(images)), distributed.share(labels)).backward()     # before T0: B/R rows
        distributed.reduce_gradients()
        optimizer.step()
        ...
        distributed.expand(K, optimizers=[optimizer])                                       # at T0
        output, target = model(distributed.share(images)), distributed.share(labels)        # K/M members, B/D rows
        distributed.backward(lp.member_loss(loss_fn, output, target, num_members=K // M))   # sums while it runs
        optimizer.step()
        ...
        distributed.collapse()

    The model itself is not wrapped: between the calls it is an ordinary (expanded) model of this rank's members. Only
    parameters' gradients are summed; the ranks' optimizers take the same steps (with float16's loss scaling by a
    ShardedGradScaler alone: a member's gradient may overflow on one rank). Late-phase weights, their statistics
    and optimizer state leave a member rank at `gathered` and `collapse` alone.

    Args:
        model: plain and the same on every rank: same seed, or same checkpoint.
        mesh: of all ranks of the default process group, with dimensions "member", "data" or both, in this order;
            None: all ranks are data ranks.
        batch_norm: "local" (a rank normalizes by its own rows, as in DistributedDataParallel; running statistics are
            the mean over ranks) or "synchronized" (by all rows of the minibatch: the same optimization on any number of
            ranks). With D = 1 the two are the same after expansion. nn.SyncBatchNorm is synchronized in both.
        bucket_bytes: of a message of gradients.

    Attributes:
        member_ranks, data_ranks, num_ranks: M, D, R.
        member_rank, data_rank, rank: m, d, and this rank's number m·D + d.
        members: range of this rank's members; None before expansion.
        total_members: K; 1 before expansion.

    Raises:
        RuntimeError: there is no process group.
        ValueError: mesh or batch_norm does not fit, or the ranks hold different models.
        TypeError: model is wrapped (DistributedDataParallel, compiled).
        NotImplementedError: a batch norm that cannot be synchronized.

    Cost:
        A step sends base gradients once a stacked step, which is once for K minibatches; see docs/distributed.md.
    """

    def __init__(
        self,
        model: nn.Module,
        mesh: DeviceMesh | None = None,
        *,
        batch_norm: str = "local",
        bucket_bytes: int = BUCKET_BYTES,
    ):
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                "Distributed: there is no process group; call torch.distributed.init_process_group first"
            )
        check_not_wrapped("Distributed", model)
        if any(isinstance(module, Routed) for module in model.modules()):
            raise ValueError("Distributed: model must be plain, but it is expanded; call Distributed.expand afterwards")
        if batch_norm not in BATCH_NORMS:
            raise ValueError(f'Distributed: batch_norm must be "local" or "synchronized", got {batch_norm!r}')
        self.model, self.batch_norm, self.bucket_bytes = model, batch_norm, bucket_bytes
        self._set_mesh(mesh)
        self.members: range | None = None
        self.total_members = 1
        self._reduction: GradientReduction | None = None
        self._gathered = False  # inside such a block of the model that is trained
        check_same_on_ranks("Distributed", model.state_dict().items(), self._all)
        self._prepare_plain()

    @property
    def _synchronized(self) -> bool:
        return self.batch_norm == "synchronized"

    def _set_mesh(self, mesh: DeviceMesh | None) -> None:
        self.mesh = mesh
        self.rank, self.num_ranks = dist.get_rank(), dist.get_world_size()
        names = ("data",) if mesh is None else mesh.mesh_dim_names or ()
        if not names or names != tuple(name for name in _DIMENSIONS if name in names):
            raise ValueError(
                f'Distributed: mesh must have dimensions "member", "data" or both, in this order, got {names}; '
                'use init_device_mesh(device, (M, D), mesh_dim_names=("member", "data"))'
            )
        if mesh is not None and mesh.mesh.flatten().tolist() != list(range(self.num_ranks)):
            raise ValueError(
                f"Distributed: mesh must be of all {self.num_ranks} ranks in their order, got {mesh.mesh.tolist()}"
            )
        self._all = self._data_group = self._member_group = dist.group.WORLD  # each is used where it has several ranks
        if "member" in names and mesh is not None:
            self.member_ranks, self._member_group = mesh.size(names.index("member")), mesh.get_group("member")
        else:
            self.member_ranks = 1
        self.data_ranks = self.num_ranks // self.member_ranks
        if "data" in names and mesh is not None:
            self._data_group = mesh.get_group("data")
        self.member_rank, self.data_rank = divmod(self.rank, self.data_ranks)

    # ------------------------------------------------------------------------------------------ members

    def expand(
        self,
        num_members: int,
        *,
        optimizers: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] = (),
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> nn.Module:
        """Expand the model, on all ranks together, and keep this rank's K/M members; see lp.expand.

        Args:
            num_members: K, of all ranks.
            optimizers: live ones; they keep the state of this rank's members.
            generator: of the noise, in the same state on every rank: the members are then those of one process. None:
                one is seeded from rank 0's default generator.
            options: of lp.expand.

        Returns:
            model.

        Raises:
            As lp.expand, and ValueError: K is not divisible by M, the ranks' members would differ, or an optimizer
                divides its state over ranks while they divide the members.
        """
        check_num_members("Distributed.expand", num_members)
        self._check_not_gathered("expand")
        if num_members % self.member_ranks:
            raise ValueError(
                f"Distributed.expand: num_members={num_members} is not divisible by the {self.member_ranks} member "
                "ranks; each must have as many members as the others"
            )
        optimizers = listed_optimizers(optimizers)
        if self.member_ranks > 1 and any(type(o).__name__ == "ZeroRedundancyOptimizer" for o in optimizers):
            raise ValueError(
                "Distributed.expand: optimizers must not be a ZeroRedundancyOptimizer where ranks divide the members: "
                "it would give every rank one rank's members; use an ordinary optimizer, which holds this rank's alone"
            )
        if generator is None:
            # Every rank draws; rank 0's holds.
            seed = [int(torch.randint(2**62, ())) if options.get("noise_std") else 0]
            dist.broadcast_object_list(seed, group=self._all)
            generator = torch.Generator().manual_seed(seed[0])
        own, means = self.own_statistics(), self.mean_statistics()
        before = [(tensor, tensor.clone()) for _, tensor, _ in own]
        for name, tensor, _ in own:
            tensor.copy_(means[name])
        plain_again(self.model)
        self._reduction.remove()  # its hooks are none that expand should warn of
        try:
            expand(self.model, num_members, optimizers=optimizers, generator=generator, **options)
        except BaseException:
            for tensor, value in before:
                tensor.copy_(value)
            self._prepare_plain()
            raise
        if not is_expanded(self.model):
            self._prepare_plain()
            raise ValueError("Distributed.expand: targets must match modules of the model, but match none")
        check_same_on_ranks("Distributed.expand", self.model.state_dict().items(), self._all)
        share = num_members // self.member_ranks
        self.members = range(self.member_rank * share, (self.member_rank + 1) * share)
        self.total_members = num_members
        keep_members(self.model, optimizers, self.members)
        group = StatisticsGroup(self._data_group, alone=self.data_ranks == 1)
        set_statistics_group(self.model, group, self._synchronized)
        self._watch_gradients()
        return self.model

    def _prepare_plain(self) -> None:
        """Before expansion every rank is a data rank."""
        if self._synchronized:
            replace_plain(self.model)
            set_statistics_group(self.model, StatisticsGroup(self._all), True)
        self._watch_gradients()

    def _watch_gradients(self) -> None:
        """Sum the gradients of the parameters there are now."""
        if self._reduction is not None:
            self._reduction.remove()
        parameters = self._watched = self._trained()
        if self.members is None or self.member_ranks == 1:
            groups, divisor = [(self._all, parameters)], self.num_ranks
        else:
            replicated = set(member_parameters(self.model))
            groups, divisor = [(self._all, [p for p in parameters if p not in replicated])], self.data_ranks
            if self.data_ranks > 1:
                groups.append((self._data_group, [p for p in parameters if p in replicated]))
        self._reduction = GradientReduction(groups, divisor, self.bucket_bytes)

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def _check_not_gathered(self, where: str) -> None:
        """Raise RuntimeError where what is done to the model would be undone."""
        if self._gathered:
            raise RuntimeError(
                f"Distributed.{where}: inside `with distributed.gathered():` the model is to be evaluated, and "
                "the end puts this rank's members back; train and collapse outside of it"
            )

    def _check_watched(self, where: str) -> None:
        """Raise RuntimeError where gradients would stay a rank's own."""
        self._check_not_gathered(where)
        if [*map(id, self._trained())] != [*map(id, self._watched)]:
            raise RuntimeError(
                f"Distributed.{where}: the model trains other parameters than those whose gradients are summed; "
                "freeze, unfreeze and replace before Distributed(model), expand and collapse by its own methods, and "
                "make a new Distributed to train a collapsed model"
            )

    # ------------------------------------------------------------------------------------------ steps

    def share(self, batch: Any) -> Any:
        """Return this rank's rows of a whole batch, which every rank has.

        Args:
            batch: tensors [B, …] before expansion, stacked [K·B, …] after it, or tuples, lists and dicts of them.

        Returns:
            The same with tensors [B/R, …], or [K/M·B/D, …]; views where the memory allows.

        Raises:
            ValueError: the rows cannot be divided into equal shares.
        """
        return tree_map(lambda x: self._share(x) if isinstance(x, Tensor) and x.dim() else x, batch)

    def _share(self, x: Tensor) -> Tensor:
        rank, ranks = (self.rank, self.num_ranks) if self.members is None else (self.data_rank, self.data_ranks)
        if x.size(0) % (self.total_members * ranks):
            members = f"{self.total_members} members times " if self.members is not None else ""
            raise ValueError(
                f"Distributed.share: batch.size(0)={x.size(0)} is not divisible by {members}{ranks} data ranks; "
                "give each the same number of rows"
            )
        rows = x.size(0) // (self.total_members * ranks)
        own = x.unflatten(0, (self.total_members, ranks, rows))[:, rank]  # [K, B/D, …]
        return own.flatten(0, 1) if self.members is None else own[self.members.start : self.members.stop].flatten(0, 1)

    def backward(self, loss: Tensor, *, rows: int = 0) -> None:
        """Compute the gradients of a rank's loss and sum them over ranks, each message as soon as it is ready.

        The loss is lp.member_loss of this rank's members and rows (before expansion the mean over its rows). Where
        several backward passes make one step, only the last is called so.

        Args:
            loss: of this rank.
            rows: of this rank's batch, to be compared with the other ranks'; 0: they are not compared.

        Raises:
            RuntimeError: another rank is gone or does not answer, or has gradients of other parameters, or other rows;
                or the model trains other parameters than at Distributed(model) or expand; or inside `gathered`.
            NotImplementedError: a gradient is sparse.
        """
        self._check_watched("backward")
        self._reduction.listen(rows)
        try:
            loss.backward()
        except BaseException:
            self._reduction.forget()
            raise
        self._reduction.finish(rows)

    def reduce_gradients(self, *, rows: int = 0) -> None:
        """Sum the gradients that are there over ranks: after loss.backward(), before the optimizer's step.

        Args, Raises:
            As backward.
        """
        self._check_watched("reduce_gradients")
        self._reduction.finish(rows)

    # ------------------------------------------------------------------------------------------ all members

    def own_statistics(self, model: nn.Module | None = None) -> list[tuple[str, Tensor, bool]]:
        """Return (name, tensor, has members) of the running statistics that differ between ranks; None: the model."""
        member_ranks = 1 if self.members is None else self.member_ranks
        return list(own_statistics(self.model if model is None else model, self._synchronized, member_ranks))

    def mean_statistics(self, model: nn.Module | None = None) -> dict[str, Tensor]:
        """Return the means over ranks of what own_statistics returns, by name; every rank calls this."""
        own = self.own_statistics(model)
        over_all = [(name, tensor) for name, tensor, replicated in own if not replicated]
        over_data = [(name, tensor) for name, tensor, replicated in own if replicated]
        means = dict(zip((n for n, _ in over_all), mean_over_ranks([t for _, t in over_all], self._all)))
        if self.data_ranks > 1:
            means |= zip((n for n, _ in over_data), mean_over_ranks([t for _, t in over_data], self._data_group))
        return means

    @contextlib.contextmanager
    def gathered(self, model: nn.Module | None = None) -> Iterator[nn.Module]:
        """Inside the with block the model has all K members and common statistics, on every rank: to be evaluated.

        All ranks enter and leave together, between two steps. What the block changes in late-phase weights and
        statistics is undone at its end.

        Args:
            model: None for the model that is trained; or a copy, such as an average of its weights over time.
        """
        model = self.model if model is None else model
        changed = [tensor for _, tensor, _ in self.own_statistics(model)]
        changed += [] if self.members is None else member_tensors(model)
        before = [(tensor, tensor.data) for tensor in changed]
        outer, self._gathered = self._gathered, self._gathered or model is self.model
        try:
            self._gather(model)
            yield model
        finally:
            self._gathered = outer
            for tensor, data in before:
                tensor.data = data
            if self.members is not None:
                set_members(model, self.members.start, len(self.members), self.total_members)

    def _gather(self, model: nn.Module) -> None:
        means = self.mean_statistics(model)
        for name, tensor, _ in self.own_statistics(model):
            if name in means:
                tensor.data = means[name]
        if self.members is not None and self.member_ranks > 1:
            gather_members(model, self._member_group)

    def collapse(self, *, mode: str = "exact") -> nn.Module:
        """Average all members of all ranks into the plain model, in place; see lp.collapse. Training is over then.

        Returns:
            model, the same on every rank.

        Raises:
            As lp.collapse, and RuntimeError: inside `gathered`.
        """
        check_mode(mode)
        self._check_not_gathered("collapse")
        if self.members is None:
            raise RuntimeError("Distributed.collapse: model is not expanded; call Distributed.expand first")
        self._reduction.remove()
        self._gather(self.model)
        self.members, self.total_members, self._watched = None, 1, []
        return collapse(self.model, mode=mode)

    def state_dict(self, *optimizers: torch.optim.Optimizer) -> dict[str, Any]:
        """Return the state of the model and its optimizers for torch.distributed.checkpoint; every rank calls this.

        Late-phase tensors are DTensors [K, …] over the member ranks, so that another number of ranks can load them.

        Returns:
            {"model": …, "optimizers": […]}
        """
        optimizers_state = [optimizer_state(self, optimizer) for optimizer in optimizers]
        return {"model": model_state(self, self.model), "optimizers": optimizers_state}

    def load_state_dict(self, state: dict[str, Any], *optimizers: torch.optim.Optimizer) -> None:
        """Load what state_dict returned, on whichever ranks: DTensors of this mesh, or whole tensors [K, …]."""
        load_model_state(self, self.model, state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            load_optimizer_state(self, optimizer, saved)
