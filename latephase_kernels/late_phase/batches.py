"""stack_batches: K minibatches of any loader as one member-major batch.

Shapes: K members, B samples a minibatch; the stacked batch has K·B rows, row k·B + b is sample b of member k.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..ops.checks import check_num_members


def find_rows(batch: Any) -> int | None:
    """Return the number of samples of a batch, the size of its first tensor or array; None if it has none."""
    if isinstance(batch, (Tensor, np.ndarray)) and batch.ndim > 0:
        return batch.shape[0]
    if isinstance(batch, (Mapping, list, tuple)):
        found = map(find_rows, batch.values() if isinstance(batch, Mapping) else batch)
        return next((rows for rows in found if rows is not None), None)
    return None


def rows_of(batch: Any, where: str = "stack_batches") -> int:
    """Return what find_rows does.

    Raises:
        TypeError: there is no tensor.
    """
    if (rows := find_rows(batch)) is not None:
        return rows
    raise TypeError(
        f"{where}: a batch must hold a tensor with a batch dimension, got {type(batch).__name__}; where there is none, "
        "let the members take turns: lp.members(model, k), predict(…, members=k), update_bn(…, turns=True)"
    )


def one_a_sample(part: Any, rows: int | None) -> bool:
    """Whether part of a batch is a list or tuple of samples, one for each of so many rows; not of tensors [rows, …].

    A pair of tensors [2, …] or [4, …] is none of two samples; two dictionaries of the same keys are.
    """
    if not isinstance(part, (list, tuple)) or hasattr(part, "_fields") or len(part) != rows:
        return False
    if all(isinstance(entry, Mapping) and entry.keys() == part[0].keys() for entry in part):
        return True
    tensors = [entry.shape[0] for entry in part if isinstance(entry, (Tensor, np.ndarray)) and entry.ndim > 0]
    if 0 < len(tensors) < len(part):
        return all(size % rows for size in tensors)
    sizes = [size for size in map(find_rows, part) if size is not None]
    return not sizes or any(size % rows for size in sizes)


def map_leaves(function: Callable[[Any], Any], structure: Any) -> Any:
    """Return structure with function of each leaf, as tree_map does, in mappings too that pytree takes for leaves."""

    def of(leaf: Any) -> Any:
        if not isinstance(leaf, Mapping):
            return function(leaf)
        rebuild: Any = type(leaf)
        return rebuild({key: map_leaves(function, value) for key, value in leaf.items()})

    return tree_map(of, structure)


def repeat(batch: Any, num_members: int) -> Any:
    """Return the stacked batch in which every member gets the same samples."""
    return map_leaves(lambda x: torch.cat([x] * num_members) if isinstance(x, Tensor) and x.dim() else x, batch)


def concatenate(batches: list, rows: int | None = None, inside: bool = False) -> Any:
    """Join equal structures of tensors along dim 0; lists of samples are appended.

    These are lists without tensors and, inside a batch, what has one entry for each of `rows`.
    """
    first = batches[0]
    if isinstance(first, Tensor):
        shapes = {tuple(batch.shape[1:]) for batch in batches if isinstance(batch, Tensor)}
        if len(shapes) > 1:
            raise ValueError(
                f"stack_batches: samples of minibatches that stand together must have one shape, got "
                f"{' and '.join(str(list(shape)) for shape in sorted(shapes)[:2])}; pad them to one length, or where "
                "they are graphs or images in lists, let the members take turns: lp.members(model, k)"
            )
        return torch.cat(batches) if first.dim() else torch.stack(batches)
    if isinstance(first, np.ndarray):
        return np.concatenate(batches) if first.ndim else np.stack(batches)
    if isinstance(first, Mapping):
        rebuild: Any = type(first)
        return rebuild({key: concatenate([batch[key] for batch in batches], rows, True) for key in first})
    if isinstance(first, (list, tuple)):
        parts = (Tensor, np.ndarray, Mapping, list, tuple)
        named = hasattr(first, "_fields")
        samples = (inside and one_a_sample(first, rows)) or not any(isinstance(part, parts) for part in first)
        if first and not named and samples:
            return type(first)(sample for batch in batches for sample in batch)
        joined = [concatenate(list(parts_of_all), rows, True) for parts_of_all in zip(*batches)]
        return type(first)(*joined) if named else type(first)(joined)
    return first if all(batch == first for batch in batches) else list(batches)


class StackedBatches:
    """Iterates over a loader's minibatches, num_members at a time; see stack_batches."""

    def __init__(self, loader: Iterable, num_members: int):
        check_num_members("stack_batches", num_members)
        self.loader, self.num_members = loader, num_members
        self._carried: list = []
        self._carried_before = 0  # at the start of the epoch that runs, so that its length does not change
        self._batch_size: int | None = None
        self._full_batches: int | None = None  # of the last complete epoch

    def __iter__(self) -> Iterator:
        self._carried_before = len(self._carried)
        full_batches = 0
        for batch in self.loader:
            rows = rows_of(batch)
            if self._batch_size is None:
                self._batch_size = rows
            if rows > self._batch_size:
                raise ValueError(
                    f"stack_batches: a batch has {rows} samples, the first had {self._batch_size}; "
                    "give every batch the same number"
                )
            if rows < self._batch_size:
                continue
            full_batches += 1
            self._carried.append(batch)
            if len(self._carried) == self.num_members:
                batches, self._carried = self._carried, []
                yield concatenate(batches, rows)
        if 0 < full_batches < self.num_members and len(self._carried) == full_batches:
            warnings.warn(
                f"stack_batches: an epoch had {full_batches} minibatches, fewer than num_members={self.num_members}, "
                "and gave none of its own; keep one stack_batches(…) over the epochs, the next goes on with them",
                stacklevel=2,
            )
        self._full_batches = full_batches
        self._carried_before = len(self._carried)

    def __len__(self) -> int:
        """Stacked batches of the epoch that runs, or of the next one."""
        full_batches = self._full_batches
        if full_batches is None:
            full_batches = self._expected_batches()
        return (self._carried_before + full_batches) // self.num_members

    def _expected_batches(self) -> int:
        """Full batches an epoch, before one was seen."""
        batch_size, drop_last = getattr(self.loader, "batch_size", None), getattr(self.loader, "drop_last", True)
        if not isinstance(batch_size, int) or drop_last:
            return len(self.loader)
        try:
            samples = len(self.loader.sampler)
        except (AttributeError, TypeError):
            return len(self.loader)
        return max(samples // batch_size, min(samples, 1))  # a single short batch is the first, and sets the size


def stack_batches(loader: Iterable, num_members: int) -> StackedBatches:
    """Return an iterable of stacked batches: num_members minibatches of loader one behind the other.

    It can be iterated again and again, as the loader can. Minibatches left over at the end of an epoch open the next
    one. Minibatches shorter than the first one are dropped.

    Args:
        loader: yields tensors [B, …], or tuples, lists and dicts of them. A list or tuple of B samples beside them (a
            detector's targets, captions) becomes one of K·B.
        num_members: K.

    Returns:
        An iterable with len(), of the loader's structures with tensors [K·B, …].

    Raises:
        TypeError, ValueError: num_members does not fit; while iterating: a batch without tensors, longer ones, or
            samples of several shapes.
    """
    return StackedBatches(loader, num_members)
