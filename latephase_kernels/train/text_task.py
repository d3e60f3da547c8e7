"""Language modelling: streams of text, truncated backpropagation through time, bits per character.

Legend: K members; B streams a member; S symbols a window; V symbols in all; N streams in evaluation.
A minibatch is one window of B streams.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import late_phase as lp
from ..data import TextBatches, TextSet
from ..late_phase.kept_state import training_flags_kept
from ..nn.routing import is_expanded, routings_of
from ..reference.precision import wide, widest_dtype
from .build import build_language_model
from .recipe import Recipe
from .task import Evaluation, Task, autocast, cross_entropies, looking

State = tuple[Tensor, Tensor]

EVALUATION_WINDOW = 256  # symbols a forward pass; the state is carried, so it changes nothing
COMPARED_SYMBOLS = 10_000  # of the test text, for the collapsed model's logits
_IGNORED = -100  # cross_entropy's: no target here


class NumberedWindows:
    """A text's minibatches in the numbering of a run: B streams for a step of one, K·B for a stacked step.

    A stacked step's minibatches are window w // K of each member's own streams, where one of the plain model's would be
    window w: both phases pass over the text in the same number of minibatches, and T0 may lie anywhere in a pass.

    Args:
        recipe: checked.
        text: [T] uint8 on its device.
        rank, num_ranks: which share of every member's streams is this process's.

    Raises:
        ValueError: the text is too short.
    """

    def __init__(self, recipe: Recipe, text: Tensor, *, rank: int = 0, num_ranks: int = 1):
        members = 1 if recipe.late.start is None else recipe.late.members
        self._streams = {
            count: TextBatches(
                text,
                recipe.batch_size,
                recipe.text.window,
                num_members=count,
                seed=recipe.seed,
                rank=rank,
                num_ranks=num_ranks,
            )
            for count in {1, members}
        }
        self.batch_size = self._streams[1].batch_size
        self.minibatches_per_epoch = members * len(self._streams[members])

    def stack(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets [count·B, S] int64 of minibatches first … first + count − 1.

        Raises:
            KeyError: count is neither 1 nor the recipe's number of members.
        """
        epoch, window = divmod(first, self.minibatches_per_epoch)
        return self._streams[count].window(epoch, window // count)

    def begins(self, first: int, count: int) -> bool:
        """Return whether the streams of this step begin with it."""
        return first % self.minibatches_per_epoch // count == 0


class TextTask(Task):
    """Windows of a text that follow each other, with the recurrent state carried from step to step.

    The state starts at zero where streams begin: with every pass, and at T0, where the text is cut into K times as many
    streams. It is part of a checkpoint, and of nothing else: averaged weights (SWA, collapse) start from zeros.

    Args:
        recipe: checked.
        text: its training part goes to the device.
        device: where to train.
        rank, num_ranks: which share of every member's streams is this process's.
    """

    unit = "characters"
    independent_steps = False

    def __init__(self, recipe: Recipe, text: TextSet, device: torch.device, *, rank: int = 0, num_ranks: int = 1):
        self.recipe, self.device, self.num_symbols = recipe, device, len(text.vocabulary)
        try:
            self.batches = NumberedWindows(recipe, text.train.to(device), rank=rank, num_ranks=num_ranks)
        except ValueError as error:
            raise ValueError(f"train: batch_size, text.window or late.members do not fit the text: {error}") from None
        self.units_per_minibatch = recipe.batch_size * recipe.text.window
        self._state: State | None = None  # [layers, rows, H] each
        self._next: list[State] = []  # of this step's chunks

    def build_network(self) -> nn.Module:
        return build_language_model(self.recipe.model, self.num_symbols).to(self.device)

    def begin_step(self, first: int, count: int) -> None:
        rows = count * self.batches.batch_size
        if self.batches.begins(first, count) or (self._state is not None and self._state[0].size(1) != rows):
            self._state = None
        self._next = []

    def losses(self, model: nn.Module, inputs: Tensor, targets: Tensor, rows: slice) -> Tensor:
        state = None if self._state is None else (self._state[0][:, rows], self._state[1][:, rows])
        with autocast(self.device, self.recipe.precision):
            logits, new_state = model(inputs, state)
        self._next.append(new_state)
        losses = cross_entropies(logits.flatten(0, 1), targets.flatten(), self.recipe)
        return losses.view(-1, self.batches.batch_size * self.recipe.text.window).mean(1)

    def end_step(self, finite: Tensor) -> None:
        h, c = (torch.cat(parts, dim=1) if len(parts) > 1 else parts[0] for parts in zip(*self._next))
        if self.recipe.skip_nonfinite:
            old = self._state or (torch.zeros_like(h), torch.zeros_like(c))
            h, c = torch.where(finite, h, old[0]), torch.where(finite, c, old[1])
        self._state, self._next = (h, c), []

    def state_dict(self) -> dict[str, Any]:
        return {"recurrent": None if self._state is None else list(self._state)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        carried = state["recurrent"]
        self._state = None if carried is None else (carried[0], carried[1])


class TextEvaluation(Evaluation):
    """Bits per character on the whole validation and test text, the recurrent state carried through.

    Each rank evaluates all of it. Streams could be divided, but their length is what takes time, the steps of one
    following each other; and fewer of them side by side can round otherwise: figures would depend on the ranks.

    Args:
        recipe: checked.
        text: its parts after the training text go to the device.
        device: where the model is.
    """

    def __init__(self, recipe: Recipe, text: TextSet, device: str | torch.device):
        self.streams = recipe.text.evaluation_streams
        self.validation, self.test = text.validation.to(device), text.test.to(device)

    def progress(self, model: nn.Module, look: Callable[[], None]) -> tuple[dict[str, float], str]:
        found = _mean_bits(model, self.validation, self.streams, "average", look)[0]
        return {"validation bits per character": found}, f"validation {found:.4f} bits per character"

    def final(self, model: nn.Module) -> tuple[dict[str, dict[str, float]], Tensor]:
        tested = bits_per_character(model, self.test, self.streams)
        validated = bits_per_character(model, self.validation, self.streams)
        metrics = {
            way: {"bits_per_character": tested[way], "validation_bits_per_character": validated[way]} for way in tested
        }
        return metrics, self.logits(model)

    def logits(self, model: nn.Module) -> Tensor:
        windows = evaluation_windows(self.test[:COMPARED_SYMBOLS], 1)
        return torch.cat([logits.flatten(0, 2).float() for logits, _ in _answers(model, windows, "average")])


def evaluation_windows(text: Tensor, streams: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and targets [N, ≤ S] int64 of consecutive windows; each symbol but the first is a target once.

    Args:
        text: [T] integers, T ≥ 2.
        streams: N, at most T − 1; the last may end before the others: its missing targets are −100.
    """
    streams = min(streams, len(text) - 1)
    length = -(-(len(text) - 1) // streams)
    symbols = F.pad(text.long(), (0, streams * length + 1 - len(text)), value=_IGNORED)
    inputs, targets = symbols[:-1].clamp_min(0).view(streams, length), symbols[1:].view(streams, length)
    yield from zip(inputs.split(EVALUATION_WINDOW, 1), targets.split(EVALUATION_WINDOW, 1), strict=True)


@torch.no_grad()
def _answers(model: nn.Module, windows: Iterator[tuple[Tensor, Tensor]], which: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield logits [members, N, S, V] and targets [N, S] of consecutive windows, by "average" or "stacked" members."""
    expanded = is_expanded(model)
    members = routings_of("evaluation", model)[0].num_members if which == "stacked" else 1
    state = None
    with training_flags_kept(model):
        model.eval()
        for inputs, targets in windows:
            with lp.members(model, which) if expanded else contextlib.nullcontext():
                logits, state = model(inputs.repeat(members, 1), state)
            yield logits.unflatten(0, (members, -1)), targets


def bits_per_character(model: nn.Module, text: Tensor, streams: int = 1) -> dict[str, float]:
    """Return the mean of −log2 p(next symbol) over a text, of every way to predict.

    Args:
        model: a plain or expanded language model: (symbols, state) -> (logits, state).
        text: [T] integers on the model's device.
        streams: the text is cut into so many, read side by side; each starts from zeros.

    Returns:
        "averaged" (one model), and of an expanded one also "ensemble" (mean of the members' probabilities), "members"
        (mean of their bits) and "member 0", ….
    """
    bits = {"averaged": _mean_bits(model, text, streams, "average")[0]}
    if is_expanded(model):
        bits["ensemble"], *single = _mean_bits(model, text, streams, "stacked")
        bits["members"] = math.fsum(single) / len(single)
        bits.update({f"member {k}": one for k, one in enumerate(single)})
    return bits


def _mean_bits(
    model: nn.Module, text: Tensor, streams: int, which: str, look: Callable[[], None] = lambda: None
) -> list[float]:
    """Return the bits per character of the mean of the members' probabilities, and of each member.

    look is called before each window.
    """
    total: Tensor | float = 0.0
    windows = looking(evaluation_windows(text, streams), look)
    for logits, targets in _answers(model, windows, which):
        there = targets != _IGNORED
        chosen = targets.clamp_min(0).expand(logits.shape[:-1]).unsqueeze(-1)
        log_p = logits.to(widest_dtype(logits.device)).log_softmax(-1).gather(-1, chosen).squeeze(-1)  # [members, N, S]
        ensemble = log_p.logsumexp(0, keepdim=True) - math.log(len(log_p))
        total = total - wide(torch.cat([ensemble, log_p]).where(there, 0.0).sum((1, 2)))
    return [value / ((len(text) - 1) * math.log(2)) for value in torch.as_tensor(total).tolist()]
