"""Contiguous streams of text for truncated backpropagation through time, one set of streams for each member.

Legend: T symbols of text; K members; B streams a member; S symbols a window, the length backpropagated through.
"""

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .sampling import rank_share


class TextBatches:
    """Windows of a text, each stream's windows one behind the other, one pass an epoch.

    The text is cut into K·B streams of equal length; row k·B + b of step s is window s of stream b of member k, so
    that a recurrent state is carried from step to step, row by row, and starts anew with each pass. Targets are the
    inputs' next symbols. An epoch is one pass over the text whatever K is: a member reads 1/K of it.

    Where an epoch begins follows from (seed, epoch): a random shift by less than a window, so that windows do not
    always cut at the same places; and in epoch e member k reads the part of member (k + e) mod K, so that each sees
    all of the text in K epochs. With shuffle off neither happens: for evaluation.

    The position is kept in the object as in DeviceBatches: a pass that was left early goes on where it stopped, and a
    state taken in the loop's body continues with the next window. The recurrent state is the caller's to save.

    Args:
        text: [T] integers, on the device where the batches shall be.
        batch_size: B, over all ranks.
        length: S.
        num_members: K; may be set again between two passes.
        shuffle: as above.
        seed: of the shifts.
        rank: which share of every member's streams to take, of num_ranks equal ones.
        num_ranks: for data-parallel training; all ranks together give what one alone would.

    Raises:
        TypeError: text is no one-dimensional tensor of integers.
        ValueError: a number is not positive, or the text is too short for one window in each stream.
    """

    def __init__(
        self,
        text: Tensor,
        batch_size: int,
        length: int,
        *,
        num_members: int = 1,
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        num_ranks: int = 1,
    ):
        if text.dim() != 1 or text.is_floating_point() or text.is_complex() or text.dtype == torch.bool:
            raise TypeError(f"TextBatches: text must be integers [T], got {text.dtype} {list(text.shape)}")
        if batch_size < 1 or length < 1:
            raise ValueError(f"TextBatches: batch_size and length must be positive, got {batch_size} and {length}")
        share = rank_share("TextBatches", batch_size, rank, num_ranks, "streams")
        self.text, self.length = text, length
        self._global_batch_size, self.batch_size = batch_size, len(share)
        self.shuffle, self.seed = shuffle, seed
        self._epoch = self._step = 0
        self._window = torch.arange(length + 1, device=text.device)
        self._streams = torch.arange(share.start, share.stop, device=text.device)
        self.num_members = num_members

    @property
    def num_members(self) -> int:
        """K, the members that have streams of their own."""
        return self._num_members

    @num_members.setter
    def num_members(self, num_members: int) -> None:
        if num_members < 1:
            raise ValueError(f"TextBatches: num_members must be at least 1, got {num_members}")
        if self._step:
            raise RuntimeError("TextBatches: num_members must be set between two passes; finish this one first")
        rows, longest_shift = num_members * self._global_batch_size, self.length - 1 if self.shuffle else 0
        stream_length = (len(self.text) - 1 - longest_shift) // rows  # the last stream needs one more symbol, as target
        if stream_length < self.length:
            raise ValueError(
                f"TextBatches: text must have at least {rows * self.length + 1 + longest_shift} symbols for {rows} "
                f"streams of one window of {self.length}, got {len(self.text)}; choose a smaller batch_size or length"
            )
        self._num_members, self._stream_length = num_members, stream_length
        self._members = torch.arange(num_members, device=self.text.device)

    @property
    def epoch(self) -> int:
        """How many passes are complete."""
        return self._epoch

    @property
    def step(self) -> int:
        """How many windows of the pass that runs were handed out; 0 is where recurrent states start anew."""
        return self._step

    def __len__(self) -> int:
        """Windows of a pass."""
        return self._stream_length // self.length

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while self._step < len(self):
            step = self._step
            self._step += 1
            yield self.window(self._epoch, step)
        self._epoch, self._step = self._epoch + 1, 0

    def window(self, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets [K·B, S] int64 of a step of an epoch, whatever was taken before; B is the share."""
        shift = random.Random(f"{self.seed}/{epoch}").randrange(self.length) if self.shuffle else 0
        parts = (self._members + (epoch if self.shuffle else 0)) % self.num_members  # [K]
        streams = (parts[:, None] * self._global_batch_size + self._streams).flatten()  # [K·B]
        first = streams * self._stream_length + (shift + step * self.length)
        symbols = self.text[first[:, None] + self._window].long()  # [K·B, S + 1]
        return symbols[:, :-1].contiguous(), symbols[:, 1:].contiguous()

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and what it refers to; plain numbers."""
        return {**self._identity(), "epoch": self._epoch, "step": self._step}

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "shuffle": self.shuffle,
            "num_symbols": len(self.text),
            "batch_size": self._global_batch_size,
            "length": self.length,
            "num_members": self.num_members,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position, with the very next window.

        Raises:
            ValueError: it is of another text, batch size, length, number of members or seed, or no position at all.
        """
        for key, value in self._identity().items():
            if state.get(key) != value:
                raise ValueError(f"TextBatches: the state was saved with {key}={state.get(key)}, here it is {value}")
        epoch, step = state.get("epoch"), state.get("step")
        if type(epoch) is not int or type(step) is not int or epoch < 0 or not 0 <= step <= len(self):
            raise ValueError(f"TextBatches: the state's position does not fit a pass of {len(self)} windows")
        self._epoch, self._step = epoch, step
