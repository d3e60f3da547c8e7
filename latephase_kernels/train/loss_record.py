"""The losses of steps, added up on the device and read at an epoch's end, so that no step waits for the device.

Legend: K members.
"""

from typing import Any

import torch
from torch import Tensor

from ..reference.precision import widest_dtype
from .ranks import Ranks

_NEVER = torch.iinfo(torch.int64).max


class LossRecord:
    """Sums over the steps since the last reading; and, of the whole run, the steps that were left out.

    Args:
        num_members: K, from T0 on; 0 where there is no T0.
        device: of the losses.
        ranks: the processes of the run; the sums are this one's parts.
    """

    def __init__(self, num_members: int, device: torch.device, ranks: Ranks):
        def count() -> Tensor:
            return torch.zeros((), dtype=torch.int64, device=device)

        self._ranks, dtype = ranks, widest_dtype(device)
        self._loss = torch.zeros((), dtype=dtype, device=device)
        self._minibatches, self._skipped = count(), count()
        self._first_nonfinite = count() - 1  # minibatch of the first step whose loss was not finite
        self._member_losses = torch.zeros(num_members, dtype=dtype, device=device)
        self._member_minibatches = count()  # of each

    def add(self, losses: Tensor, finite: Tensor, own: range, turns: int, first: int, count: int) -> None:
        """Add a step, without waiting for the device.

        Args:
            losses: this rank's parts of the losses, [len(own)], or [1] of the plain model.
            finite: [] bool; False where the step is left out.
            own: which members they are of; empty for the plain model.
            turns: minibatches that each of them is the mean over.
            first, count: the step's minibatches, over all members.
        """
        losses = torch.where(finite, losses * turns, 0.0)
        self._loss += losses.sum()
        self._minibatches += count * finite
        self._skipped += ~finite
        here = torch.where(finite, -1, first)
        self._first_nonfinite = torch.where(self._first_nonfinite < 0, here, self._first_nonfinite)
        if own:
            self._member_losses[own.start : own.stop] += losses
            self._member_minibatches += turns * finite

    def read(self) -> tuple[float | None, list[float], int]:
        """Return the mean loss a minibatch since the last reading, that of each member, and all steps left out.

        The first is None if there was no minibatch, the second empty if no member had one.
        """
        minibatches, of_each = int(self._minibatches), int(self._member_minibatches)
        mean = float(self._ranks.total(self._loss)) / minibatches if minibatches else None
        members = (self._ranks.total(self._member_losses) / of_each).cpu().tolist() if of_each else []
        for part in (self._loss, self._minibatches, self._member_losses, self._member_minibatches):
            part.zero_()
        return mean, members, int(self._skipped)

    def first_nonfinite(self) -> int | None:
        """Return the first minibatch of the first step whose loss, on any rank, was not finite; None if all were."""
        here = self._first_nonfinite.where(self._first_nonfinite >= 0, _NEVER)
        first = int(self._ranks.total(here, "min"))
        return first if first < _NEVER else None

    def state(self) -> list[Any]:
        """Return the record of all ranks, as numbers: a float64 tensor could not be loaded onto every device."""
        loss, *counts, member_losses, of_each = self._parts()
        parts = (self._ranks.total(loss), *counts, self._ranks.total(member_losses), of_each)
        return [part.cpu().tolist() for part in parts]

    def own_state(self) -> list[Any]:
        """Return this rank's parts of the sums."""
        return [self._loss.item(), self._member_losses.cpu().tolist()]

    def load_state(self, state: list[Any], own: list[Any] | None) -> None:
        """Go on from what state, and on this very rank own_state, returned; without the latter the first has all."""
        # A checkpoint of before the members' losses were recorded has four parts, and tensors.
        values = list(zip(self._parts(), state))
        if own is not None or self._ranks.rank > 0:
            values += zip((self._loss, self._member_losses), own or (0.0, 0.0))
        for part, saved in values:
            part.copy_(torch.as_tensor(saved, dtype=part.dtype).to(part.device))

    def _parts(self) -> tuple[Tensor, ...]:
        run = (self._minibatches, self._skipped, self._first_nonfinite)
        return self._loss, *run, self._member_losses, self._member_minibatches
