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
        self.waiting = len(parameters)
        self.signature: list[int] = []
        self.flat: Tensor | None = None
        self.work: dist.Work | None = None

    @torch.no_grad()
    def start(self, divisor: int, signature: list[int]) -> None:
        """Send the gradients, each divided by divisor, and a signature behind them; a missing gradient counts as 0."""
        gradients = [parameter.grad for parameter in self.parameters]
        if any(gradient is not None and gradient.layout != torch.strided for gradient in gradients):
            raise NotImplementedError("Distributed: gradients must be dense; make nn.Embedding with sparse=False")
        parts = [
            parameter.new_zeros(parameter.numel()) if gradient is None else gradient.reshape(-1)
            for parameter, gradient in zip(self.parameters, gradients)
        ]
        self.signature = signature
        self.flat = torch.cat([*parts, parts[0].new_tensor(signature).mul_(divisor)]).div_(divisor)
        self.work = dist.all_reduce(self.flat, group=self.group, async_op=True)

    def finish(self) -> None:
        """Wait, and write the sums into the gradients that exist."""
        assert self.work is not None and self.flat is not None
        self.work.wait()
        *sums, signature = self.flat.split([*(p.numel() for p in self.parameters), len(self.signature)])
        if self.signature:
            expected = self.flat.new_tensor(self.signature) * dist.get_world_size(self.group)
            _check_same((signature - expected).abs().amax() < 0.5)
        found = [(p.grad, part.view_as(p)) for p, part in zip(self.parameters, sums) if p.grad is not None]
        if found:
            torch._foreach_copy_([gradient for gradient, _ in found], [part for _, part in found])
        self.waiting, self.flat, self.work = len(self.parameters), None, None


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
            if dist.get_world_size(group) > 1:
                self._buckets += [_Bucket(group, part) for part in _split(parameters, bucket_bytes)]
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
        last = self._started == len(self._buckets) and bucket.parameters[0].dtype in (torch.float32, torch.float64)
        bucket.start(self.divisor, self._signature() if last else [])

    def _signature(self) -> list[int]:
        """Whole numbers that must be the same on every rank, for rows and for which gradients exist.

        Below 2¹⁰, so that their sums over 2¹⁰ ranks are still exact to ½ in float32.
        """
        missing = [
            place
            for place, parameter in enumerate(p for bucket in self._buckets for p in bucket.parameters)
            if parameter.grad is None
        ]
        return [self._rows % 2**10, zlib.crc32(repr(missing).encode()) % 2**10]

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
            bucket.waiting, bucket.flat, bucket.work = len(bucket.parameters), None, None


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
