"""Contiguous streams of text for truncated backpropagation through time, one set of streams for each member.

Legend: T symbols of text; K members; B streams a member; S symbols a window, the length backpropagated through.
"""

import random

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
    all of the text in K epochs.

    Args:
        text: [T] integers, on the device where the batches shall be.
        batch_size: B, over all ranks.
        length: S.
        num_members: K, the members that have streams of their own.
        seed: of the shifts.
        rank: which share of every member's streams to take, of num_ranks equal ones.
        num_ranks: for data-parallel training; all ranks together give what one alone would.

    Attributes:
        batch_size: of this rank's share.

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
        seed: int = 0,
        rank: int = 0,
        num_ranks: int = 1,
    ):
        if text.dim() != 1 or text.is_floating_point() or text.is_complex() or text.dtype == torch.bool:
            raise TypeError(f"TextBatches: text must be integers [T], got {text.dtype} {list(text.shape)}")
        if min(batch_size, length, num_members) < 1:
            raise ValueError(
                f"TextBatches: batch_size, length and num_members must be positive, got {batch_size}, {length} and "
                f"{num_members}"
            )
        share = rank_share("TextBatches", batch_size, rank, num_ranks, "streams")
        rows = num_members * batch_size
        self._stream_length = (len(text) - length) // rows  # a shift takes length − 1, the last target 1
        if self._stream_length < length:
            raise ValueError(
                f"TextBatches: text must have at least {(rows + 1) * length} symbols for {rows} streams of one window "
                f"of {length}, got {len(text)}; choose a smaller batch_size or length"
            )
        self.text, self.length, self.seed = text, length, seed
        self._global_batch_size, self.batch_size = batch_size, len(share)
        self._window = torch.arange(length + 1, device=text.device)
        self._streams = torch.arange(share.start, share.stop, device=text.device)
        self._members = torch.arange(num_members, device=text.device)

    def __len__(self) -> int:
        """Windows of a pass."""
        return self._stream_length // self.length

    def window(self, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets [K·B, S] int64 of a step of an epoch; B is this rank's share."""
        shift = random.Random(f"{self.seed}/{epoch}").randrange(self.length)
        parts = (self._members + epoch) % len(self._members)  # [K]
        streams = (parts[:, None] * self._global_batch_size + self._streams).flatten()  # [K·B]
        first = streams * self._stream_length + (shift + step * self.length)
        symbols = self.text[first[:, None] + self._window].long()  # [K·B, S + 1]
        return symbols[:, :-1].contiguous(), symbols[:, 1:].contiguous()
