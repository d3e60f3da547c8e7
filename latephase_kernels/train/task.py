"""What the training loop leaves to the kind of data: minibatches, network, loss, state between steps, evaluation."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .recipe import Recipe

Batch = TypeVar("Batch")


class Task(ABC):
    """Training data of one kind on its device, and what a step of the `Trainer` does with them.

    A step calls `begin_step`, then `losses` once for each chunk of members, then `end_step`.

    Attributes:
        batches: has minibatches_per_epoch; batch_size, this rank's rows of a member's minibatch; and
            stack(first, count) -> (inputs, targets), [count·B, …] each, minibatches first … first + count − 1 of the
            run.
        unit: what throughput counts.
        units_per_minibatch: how many of them there are in a minibatch, over all ranks.
        independent_steps: a step needs nothing of the one before but weights and statistics.
    """

    batches: Any
    unit: str
    units_per_minibatch: int
    independent_steps: bool = True

    @abstractmethod
    def build_network(self) -> nn.Module:
        """Return the recipe's freshly initialized network on the device.

        Raises:
            ValueError: the recipe's model does not fit this kind of data.
        """

    @abstractmethod
    def losses(self, model: nn.Module, inputs: Tensor, targets: Tensor, rows: slice) -> Tensor:
        """Return the members' mean losses, [members of this chunk].

        Args:
            model: in train mode, routed to the members of this chunk.
            inputs, targets: the chunk's rows of the step's stacked batch.
            rows: which ones these are.
        """

    def begin_step(self, first: int, count: int) -> None:  # noqa: B027 (nothing to do is a fine answer)
        """Prepare the step of minibatches first … first + count − 1."""

    def end_step(self, finite: Tensor) -> None:  # noqa: B027
        """Finish the step: every chunk is through backward.

        Args:
            finite: [] bool on the device; False where the step is to be as if it had never been.
        """

    def set_share(self, rank: int, num_ranks: int) -> None:  # noqa: B027 (nothing to do is a fine answer)
        """Take another share of every member's minibatches from now on: members have been divided among ranks."""

    def update_statistics(self, model: nn.Module, expanded: bool) -> None:  # noqa: B027
        """Recompute the running statistics of averaged weights from one pass over the training data."""

    def counts(self) -> dict[str, int]:
        """Return what to log about the data so far, such as how many of them were unusable; see the epoch's end."""
        return {}

    def close(self) -> None:  # noqa: B027
        """End what was started for the data."""

    def state_dict(self) -> dict[str, Any]:
        """Return what the next step needs beyond its minibatches' numbers; fit for weights_only loading."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Go on from what state_dict returned."""


class Evaluation(ABC):
    """Held-out data of one kind on its device, and how well a model does on them.

    Attributes:
        classes: their names, in the order of the logits; empty where there are none.
    """

    classes: Sequence[str] = ()

    @abstractmethod
    def progress(self, model: nn.Module, look: Callable[[], None]) -> tuple[dict[str, float], str]:
        """Evaluate a model in training, averaged; return what to log, and a few words for the terminal.

        Args:
            model: plain or expanded.
            look: called before each batch, on every rank as often; may raise, which ends the evaluation.
        """

    @abstractmethod
    def final(self, model: nn.Module) -> tuple[dict[str, dict[str, float]], Tensor]:
        """Return the metrics of every way to predict, and what `logits` returns for the model."""

    def close(self) -> None:  # noqa: B027
        """End what was started for the data."""

    @abstractmethod
    def logits(self, model: nn.Module) -> Tensor:
        """Return the logits by which a collapsed model is compared with the averaged one."""


def looking(batches: Iterable[Batch], look: Callable[[], None]) -> Iterator[Batch]:
    """Yield the batches, calling look before each."""
    for batch in batches:
        look()
        yield batch


def cross_entropies(logits: Tensor, targets: Tensor, recipe: Recipe) -> Tensor:
    """Return the loss of each target [N] by logits [N, classes], in float32 whatever autocast has made of them."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, targets, reduction="none", label_smoothing=recipe.label_smoothing)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context in which a recipe's forward passes run: bfloat16 where it says so."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")
