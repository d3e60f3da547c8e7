"""Sums of gradients over ranks: few large messages, sent while the backward pass goes on.

Legend: a bucket is a list of parameters whose gradients travel in one message; D data ranks.
"""

import zlib
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET_BYTES = 25 * 2**20  # as in DistributedDataParallel: large enough for bandwidth, small enough to overlap


class _Bucket:
    """Parameters of one type and device whose gradients are summed over one group together."""

    def __init__(self, group: "dist.ProcessGroup | None", parameters: list[nn.Parameter]):
        self.group, self.parameters = group, parameters
        self.exact = parameters[0].dtype in (torch.float32, torch.float64)  # counts ranks without rounding
        self.signs_for: list[nn.Parameter] = []  # all parameters of the group, where this is its last bucket
        self.forget()

    def forget(self) -> None:
        self.waiting = len(self.parameters)
        self.signature: Tensor | None = None
        self.flat: Tensor | None = None
        self.aside: Tensor | None = None  # the sum of signatures where flat cannot hold it
        self.work: list[dist.Work] = []

    @torch.no_grad()
    def start(self, divisor: int, rows: int) -> None:
        """Send the gradients, each divided by divisor; a missing one counts as 0. Behind the last of a group, sign."""
        gradients = [parameter.grad for parameter in self.parameters]
        if any(gradient is not None and gradient.layout != torch.strided for gradient in gradients):
            raise NotImplementedError("Distributed: gradients must be dense; make nn.Embedding with sparse=False")
        parts = [
            parameter.new_zeros(parameter.numel()) if gradient is None else gradient.reshape(-1)
            for parameter, gradient in zip(self.parameters, gradients)
        ]
        if self.signs_for:
            dtype = parts[0].dtype if self.exact else torch.float32
            self.signature = parts[0].new_tensor(_signature(self.signs_for, rows), dtype=dtype)
            if self.exact:
                parts.append(self.signature * divisor)
            else:
                self.aside = self.signature.clone()
        self.flat = torch.cat(parts).div_(divisor)
        for message in (self.flat, self.aside):
            if message is not None:
                self.work.append(dist.all_reduce(message, group=self.group, async_op=True))

    def finish(self) -> None:
        """Wait, and write the sums into the gradients that exist."""
        assert self.flat is not None
        for work in self.work:
            work.wait()
        sizes = [parameter.numel() for parameter in self.parameters]
        *sums, behind = self.flat.split([*sizes, self.flat.numel() - sum(sizes)])
        if self.signature is not None:
            expected = self.signature * dist.get_world_size(self.group)
            _check_same(((behind if self.aside is None else self.aside) - expected).abs().amax() < 0.5)
        found = [(p.grad, part.view_as(p)) for p, part in zip(self.parameters, sums) if p.grad is not None]
        if found:
            torch._foreach_copy_([gradient for gradient, _ in found], [part for _, part in found])
        self.forget()


class GradientReduction:
    """Replaces each gradient by its sum over a group, divided by D: the mean over data, the sum over members.

    Messages leave in one fixed order, the same on every rank: from the last parameters to the first, as a backward pass
    finishes them.

    Args:
        groups: (process group, its parameters in the model's order); of groups of one rank nothing is sent.
        divisor: D.
        bucket_bytes: the size a message has at least, but for the last one of a group and type.
    """

    def __init__(
        self,
        groups: Iterable[tuple["dist.ProcessGroup | None", list[nn.Parameter]]],
        divisor: int,
        bucket_bytes: int = BUCKET_BYTES,
    ):
        self.divisor = divisor
        self._buckets: list[_Bucket] = []
        for group, parameters in groups:
            if dist.get_world_size(group) > 1 and parameters:
                self._buckets += [_Bucket(group, part) for part in _split(parameters, bucket_bytes)]
                self._buckets[-1].signs_for = parameters
        self._started = self._rows = 0
        self._listening = False
        self._handles = [
            parameter.register_post_accumulate_grad_hook(lambda _, bucket=bucket: self._accumulated(bucket))
            for bucket in self._buckets
            for parameter in bucket.parameters
        ]

    def remove(self) -> None:
        """Leave the parameters alone from now on."""
        for handle in self._handles:
            handle.remove()

    def listen(self, rows: int = 0) -> None:
        """Send each bucket as soon as the backward pass that follows has its gradients; finish() ends it."""
        self._listening, self._rows = True, rows

    def _accumulated(self, bucket: _Bucket) -> None:
        if not self._listening:
            return
        bucket.waiting -= 1
        while self._started < len(self._buckets) and self._buckets[self._started].waiting <= 0:
            self._start_next()

    def _start_next(self) -> None:
        bucket = self._buckets[self._started]
        self._started += 1
        bucket.start(self.divisor, self._rows)

    @torch.no_grad()
    def finish(self, rows: int = 0) -> None:
        """Send what was not sent yet, and wait for everything.

        Args:
            rows: of this rank's batch, where they shall be compared with the other ranks'.

        Raises:
            RuntimeError: another rank is gone or does not answer, or has gradients of other parameters or other rows
                (a CUDA device asserts the latter instead, without a wait).
        """
        self._listening, self._rows = False, rows
        while self._started < len(self._buckets):
            self._start_next()
        for bucket in self._buckets:
            bucket.finish()
        self._started = 0

    def forget(self) -> None:
        """Drop what a backward pass that failed had begun; the other ranks wait for it in vain and end."""
        self._listening, self._started = False, 0
        for bucket in self._buckets:
            bucket.forget()


def _signature(parameters: list[nn.Parameter], rows: int) -> list[int]:
    """Whole numbers that must be the same on every rank, for rows and for which gradients exist.

    Below 2¹⁰, so that their sums over 2¹⁰ ranks are still exact to ½ in float32.
    """
    missing = [place for place, parameter in enumerate(parameters) if parameter.grad is None]
    return [rows % 2**10, zlib.crc32(repr(missing).encode()) % 2**10]


def _check_same(same: Tensor) -> None:
    message = (
        "Distributed: every rank must have gradients of the same parameters, from the same number of rows; "
        "give every rank an equal share of each batch"
    )
    if same.is_cuda:
        torch._assert_async(same, message)
    elif not same:
        raise RuntimeError(message)


def _split(parameters: list[nn.Parameter], bucket_bytes: int) -> list[list[nn.Parameter]]:
    """Return the parameters that require gradients in buckets, the last ones first."""
    full: list[list[nn.Parameter]] = []
    filling: dict[tuple, list[nn.Parameter]] = {}
    for parameter in reversed(parameters):
        if not parameter.requires_grad:
            continue
        bucket = filling.setdefault((parameter.dtype, parameter.device), [])
        bucket.append(parameter)
        if sum(p.numel() * p.element_size() for p in bucket) >= bucket_bytes:
            full.append(filling.pop((parameter.dtype, parameter.device)))
    return full + list(filling.values())
