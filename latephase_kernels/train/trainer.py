"""The training loop: plain until T0, stacked members after it, nothing read from the device inside a step.

Legend: K members; B samples a member; n minibatches an epoch. Minibatches are numbered through the whole run; a stacked
step takes the next K. All that a step depends on is the state that `Trainer.state_dict` returns. What depends on the
kind of data is its `Task`'s.
"""

import contextlib
import copy
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel

from .. import late_phase as lp
from ..data import TextSet
from ..nn.routing import is_expanded
from ..reference.precision import widest_dtype
from .build import AnyData, build_optimizer, build_targets
from .checkpoints import random_state, set_random_state
from .cuda_graph import GraphedPasses
from .evaluation import dropout_layers
from .image_task import ImageTask
from .loss_record import LossRecord
from .pretrained import load_pretrained
from .ranks import Ranks
from .recipe import Recipe
from .schedule import mark_new_groups, set_learning_rates
from .task import Task
from .text_task import TextTask


class Trainer:
    """One training run in memory; see `runs.py` for its folder.

    Args:
        recipe: checked.
        train: the training data; they go to the device.
        device: where to train.
        ranks: the processes of the run; None: this one alone.

    Raises:
        ValueError: the recipe's parts do not fit the data or each other.

    Attributes:
        task: what depends on the kind of data.
        model: plain before T0, expanded after it.
        averaged: SWA's average, or None.
        minibatch: the number of the next one.
        total: minibatches of the whole run; what fills no last cycle of K is left out.
    """

    def __init__(
        self,
        recipe: Recipe,
        train: AnyData,
        device: str | torch.device = "cpu",
        ranks: Ranks | None = None,
    ):
        self.recipe, self.device = recipe, torch.device(device)
        self.ranks = ranks or Ranks(self.device)
        torch.manual_seed(recipe.seed)
        kind: Any = TextTask if isinstance(train, TextSet) else ImageTask
        self.task: Task = kind(recipe, train, self.device, rank=self.ranks.rank, num_ranks=self.ranks.num_ranks)
        self.model: nn.Module = self.task.build_network()
        if recipe.model.weights is not None:
            load_pretrained(self.model, recipe.model)
        if recipe.dropout_passes and not dropout_layers(self.model):
            raise ValueError(
                f"train: dropout_passes must be 0 for a network without dropout, got {recipe.dropout_passes}; "
                "give it dropout with --model.options.dropout=0.1"
            )
        self.optimizer = build_optimizer(recipe.optimizer, self.model, skips_steps=recipe.skip_nonfinite)
        self.averaged: AveragedModel | None = None
        self.expanded = False
        self.minibatch = 0
        per_epoch = self.batches.minibatches_per_epoch
        late = recipe.late
        turns = recipe.accumulate
        self.t0 = None if late.start is None else round(late.start * per_epoch / turns) * turns
        self.total = recipe.epochs * per_epoch
        if self.t0 is not None and self.total - self.t0 < turns * late.members:
            raise ValueError(
                f"train: late.members must be at most {(self.total - self.t0) // turns}, the steps' minibatches from "
                f"late.start ({late.start}) on, got {late.members}; start earlier, or take more epochs or a smaller "
                "batch_size"
            )
        self.total -= self.total % turns if self.t0 is None else (self.total - self.t0) % (turns * late.members)
        if recipe.swa.start is not None and self.total / per_epoch < recipe.swa.start:
            raise ValueError(
                f"train: swa.start must be at most {self.total / per_epoch:g}, the epoch in which the last whole "
                f"step ends, got {recipe.swa.start}: nothing would be averaged"
            )
        if self.t0 is not None:
            self._check_targets()
        self.ranks.take(self.model)
        self._prepare_optimizer()
        if recipe.compile:
            self.model.compile()
        if (recipe.accumulate > 1 or recipe.cuda_graph) and not self.task.independent_steps:
            raise ValueError("train: accumulate must be 1 and cuda_graph false for a text, whose steps carry a state")
        if self.ranks.member_ranks > 1 and not self.task.independent_steps:
            raise ValueError(
                f"train: parallel.member_ranks must be 1 for a text, got {self.ranks.member_ranks}; each process has "
                "streams of all members"
            )
        if recipe.cuda_graph and self.ranks.num_ranks > 1:
            raise ValueError(f"train: cuda_graph must be false on several processes, got {self.ranks.num_ranks}")
        if recipe.cuda_graph and self.device.type != "cuda":
            raise ValueError(f"train: cuda_graph must be false on {self.device}: only a GPU captures graphs")
        self._graphed = GraphedPasses() if recipe.cuda_graph else None
        if self.ranks.num_ranks > 1:
            self.ranks.seed(recipe.seed)  # of dropout: masks of other rows
        self._record = LossRecord(0 if self.t0 is None else late.members, self.device, self.ranks)

    @property
    def batches(self) -> Any:
        """The task's."""
        return self.task.batches

    @property
    def epoch(self) -> float:
        """Passes over the training set so far."""
        return self.minibatch / self.batches.minibatches_per_epoch

    @property
    def num_members(self) -> int:
        """Members of the next step: 1 before T0."""
        late_now = self.t0 is not None and self.minibatch >= self.t0
        return self.recipe.late.members if late_now else 1

    # ------------------------------------------------------------------------------------------ steps

    def step(self) -> int:
        """Take one step, of the next minibatch or of the next K (times accumulate); return how many it took."""
        if self.num_members > 1 or self.minibatch == self.t0:
            self._expand_once()
        own, turns = self.ranks.own(self.num_members), self.recipe.accumulate
        count = self.num_members * turns
        inputs, targets = self._stack(own, turns)
        set_learning_rates(self.optimizer.param_groups, self.recipe.schedule, self.recipe.optimizer, self.epoch)
        statistics = self._statistics() if self.recipe.skip_nonfinite else []
        before = [buffer.clone() for buffer in statistics]
        if not self.model.training:
            self.model.train()
        self.task.begin_step(self.minibatch, len(own) * turns)
        if self._graphed is None:
            self.optimizer.zero_grad()
            losses = self._passes(inputs, targets)
        else:
            losses = self._graphed(self.expanded, self._passes, (inputs, targets), self.model.parameters)
        if self.ranks.num_ranks > 1:
            self.ranks.reduce_gradients()
            # A member's loss is the mean over the ranks that have rows of it.
            losses = losses / (self.ranks.data_ranks if self.expanded else self.ranks.num_ranks)
        loss = losses.sum()
        finite = torch.isfinite(self.ranks.total(loss) if self.recipe.skip_nonfinite else loss)
        if self.recipe.skip_nonfinite:
            # The fused step leaves everything as it is where this is 1.
            self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
            for buffer, old in zip(statistics, before):
                torch.where(finite, buffer, old, out=buffer)
        self._clip_gradients()
        self.optimizer.step()
        self.task.end_step(finite)
        of_members = own if self.expanded else range(0)
        self._record.add(losses, finite, of_members, turns, self.minibatch, count)
        start, self.minibatch = self.minibatch, self.minibatch + count
        self._average_if_due(start)
        return count

    def _stack(self, own: range, turns: int) -> tuple[Tensor, Tensor]:
        """Return this rank's rows of its own members' minibatches, turn after turn of what is accumulated."""
        members = self.num_members
        if len(own) == members:
            return self.batches.stack(self.minibatch, members * turns)
        starts = range(self.minibatch + own.start, self.minibatch + members * turns, members)
        parts = [self.batches.stack(first, len(own)) for first in starts]
        inputs, targets = (torch.cat(tensors) if turns > 1 else tensors[0] for tensors in zip(*parts))
        return inputs, targets

    def _passes(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Forward and backward; return the losses of this rank's members, each the mean over what is accumulated."""
        own = len(self.ranks.own(self.num_members))
        losses = torch.zeros(own, dtype=widest_dtype(self.device), device=self.device)
        for part, rows in self._chunks():
            with lp.members(self.model, part) if self.expanded else contextlib.nullcontext():
                part_losses = self.task.losses(self.model, inputs[rows], targets[rows], rows) / self.recipe.accumulate
                part_losses.sum().backward()
            losses[part.start : part.stop] += part_losses.detach()
        return losses

    def _chunks(self) -> Iterator[tuple[range, slice]]:
        """Yield (members of this rank, their rows of the stacked batch): turn after turn of what is accumulated."""
        count, batch = len(self.ranks.own(self.num_members)), self.batches.batch_size
        chunk = self.recipe.late.member_chunk or count
        for turn in range(0, count * self.recipe.accumulate, count):
            for first in range(0, count, chunk):
                part = range(first, min(first + chunk, count))
                yield part, slice((turn + part.start) * batch, (turn + part.stop) * batch)

    def _clip_gradients(self) -> None:
        max_norm = self.recipe.optimizer.clip_norm
        if max_norm is not None and self.expanded:
            lp.clip_grad_norm_(self.model, max_norm)
        elif max_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)

    def _statistics(self) -> list[Tensor]:
        layers = [module for module in self.model.modules() if isinstance(module, _BatchNorm)]
        return [buffer for layer in layers for buffer in layer._buffers.values() if buffer is not None]

    # ------------------------------------------------------------------------------------------ phases

    def _check_targets(self) -> None:
        """Raise a ValueError now where `expand` would find at T0 that the targets do not fit the model."""
        late = self.recipe.late
        what = f"train: late.targets {late.targets} do not fit {self.recipe.model.name}"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                trial = lp.expand(copy.deepcopy(self.model), late.members, targets=build_targets(late.targets))
        except (ValueError, TypeError, NotImplementedError) as error:
            raise ValueError(f"{what}: {error}") from None
        if not is_expanded(trial):
            raise ValueError(f"{what}: they match no module")

    def _expand_once(self) -> None:
        if self.expanded:
            return
        late = self.recipe.late
        options = {
            key: value for key, value in (("lr", late.lr), ("weight_decay", late.weight_decay)) if value is not None
        }
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"]
        num_base_groups = len(self.optimizer.param_groups)
        generator = torch.Generator().manual_seed(self.recipe.seed)
        self.ranks.expand(
            self.model,
            late.members,
            targets=build_targets(late.targets),
            noise_std=late.noise_std,
            generator=generator,
            optimizers=[self.optimizer],
            member_state=late.member_state,
            member_options=options,
        )
        if late.fuse:
            lp.fuse(self.model)
        lp.set_base_grad_scale(self.optimizer, self.model, late.base_grad_scale)
        self.expanded = True
        mark_new_groups(self.optimizer, num_base_groups)
        if self.ranks.member_ranks > 1:
            self.task.set_share(self.ranks.data_rank, self.ranks.data_ranks)
        self._prepare_optimizer()

    def _prepare_optimizer(self) -> None:
        """Give groups their initial rate and, where steps may be skipped, SGD its momentum before its first step."""
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
            if self.recipe.skip_nonfinite and group.get("momentum"):
                for parameter in group["params"]:
                    self.optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))

    def _average_if_due(self, start: int) -> None:
        swa, per_epoch = self.recipe.swa, self.batches.minibatches_per_epoch
        before, now = (minibatch * swa.per_epoch // per_epoch for minibatch in (start, self.minibatch))
        due = before != now or self.minibatch == self.total
        before_t0 = self.t0 is not None and not self.expanded  # the step that ends at T0 still trained the plain model
        if swa.start is None or not due or self.epoch < swa.start or before_t0:
            return
        if self.averaged is None:
            self.averaged = AveragedModel(self.model)
        self.averaged.update_parameters(self.model)

    def final_model(self) -> nn.Module:
        """Return the model to evaluate, with members if there are any: SWA's with fresh statistics, where it ran."""
        if self.averaged is None:
            return self.model
        model = copy.deepcopy(self.averaged.module)
        self.task.update_statistics(model, self.expanded)
        return model

    # ------------------------------------------------------------------------------------------ reading and state

    def read_loss(self) -> tuple[float | None, list[float], int]:
        """Return the mean training loss a minibatch since the last reading, each member's, and all steps skipped.

        The first is None if there was no minibatch, the second empty if no member had one.

        Raises:
            FloatingPointError: a loss was not finite, and the recipe does not skip such steps.
        """
        self._raise_if_nonfinite()
        return self._record.read()

    def _raise_if_nonfinite(self) -> None:
        first = self._record.first_nonfinite()
        if first is not None and not self.recipe.skip_nonfinite:
            raise FloatingPointError(
                f"train: the loss of minibatch {first} (epoch {first / self.batches.minibatches_per_epoch:.2f}) is not "
                "finite; lower optimizer.lr, or give --skip_nonfinite=true to leave such steps out"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the rest of the run depends on; fit for weights_only loading.

        Of several ranks' the tensors with members are sharded, and what differs between ranks is in "own".

        Raises:
            FloatingPointError: a loss was not finite: this state is not worth keeping.
        """
        self._raise_if_nonfinite()
        state: dict[str, Any] = {
            "minibatch": self.minibatch,
            "total": self.total,
            "expanded": self.expanded,
            "model": self.ranks.model_state(self.model),
            "optimizer": self.ranks.optimizer_state(self.optimizer),
            "averaged": None if self.averaged is None else self._averaged_state(self.averaged),
            "late": self._record.state(),
        }
        of_process = {"task": self.task.state_dict(), "random": random_state()}
        if self.ranks.num_ranks == 1:
            return {**state, **of_process}
        own = {**of_process, "losses": self._record.own_state(), "statistics": self.ranks.own_statistics(self.model)}
        return {**state, "own": own}

    def _averaged_state(self, averaged: AveragedModel) -> dict[str, Tensor]:
        state = self.ranks.model_state(averaged.module)
        return {"n_averaged": averaged.n_averaged, **{f"module.{name}": tensor for name, tensor in state.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state, bit for bit, whatever this trainer has done before T0.

        A state of other ranks goes on to rounding, with other numbers from the random generators.

        Args:
            state: with all members; "own" is there if as many ranks, laid out alike, have saved it.
        """
        of_process = state if self.ranks.num_ranks == 1 and "task" in state else state.get("own")
        if state["expanded"]:
            self._expand_once()
        self.ranks.load_model_state(self.model, state["model"])
        self.ranks.load_optimizer_state(self.optimizer, state["optimizer"])
        if state["averaged"] is not None:
            self.averaged = AveragedModel(self.model)
            self.averaged.n_averaged.copy_(state["averaged"]["n_averaged"])
            averaged = {name.removeprefix("module."): tensor for name, tensor in state["averaged"].items()}
            del averaged["n_averaged"]
            self.ranks.load_model_state(self.averaged.module, averaged)
        self.minibatch = state["minibatch"]
        several = self.ranks.num_ranks > 1
        self._record.load_state(state["late"], of_process.get("losses") if several and of_process else None)
        if of_process is None:
            self.ranks.seed(self.recipe.seed, self.minibatch)
            if not self.task.independent_steps:
                warnings.warn(
                    "train: other processes saved this run; what they carried from step to step starts anew",
                    stacklevel=2,
                )
            return
        self.task.load_state_dict(of_process["task"])
        set_random_state(of_process["random"])
        if several:
            self.ranks.load_own_statistics(self.model, of_process["statistics"])
