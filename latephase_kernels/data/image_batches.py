"""Minibatches of images that do not fit in memory: for training, with prefetching, and for evaluation, in order.

Legend: N images; B samples a minibatch; K members; n = N // B minibatches an epoch; they are numbered through the whole
run: number m is minibatch m % n of epoch m // n. S × S pixels are what a network sees.
"""

import itertools
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .device_images import normalize, per_channel
from .gpu_jpeg import Decoder, find_gpu_decoder
from .image_files import ImageFiles
from .image_loader import ImageLoader, Loaded, Processing, Request
from .sampling import derived_seed, rank_share


class ImageBatches:
    """Shuffled, cropped and flipped minibatches, as DeviceBatches has them, loaded from the disk ahead of their use.

    Every epoch is a new random order of all images; each image gets its own random-resized-crop and is mirrored with
    probability ½. All of it follows from (seed, epoch, place in the epoch's order): whatever was taken before, however
    many workers and ranks there are. Pixels are the same bits for the same decoder, which is the CPU's or the GPU's.

    What is loaded ahead is guessed from the last two calls of stack: as many minibatches again, as far on again.

    Args:
        files: the images.
        batch_size: B, over all ranks.
        device: where minibatches shall be.
        size: S.
        seed: of the order and of all augmentation.
        num_workers: processes that read and decode; 0: everything happens when it is asked for.
        decoder: "cpu"; "gpu"; "auto": the GPU's where there is one; or a function (see gpu_jpeg).
        corrupt: "error", or "replace": put another random image in a corrupt one's place, with a warning that names
            it.
        memory_format: of the images.
        rank: which share of every minibatch's samples to take, of num_ranks equal ones.
        num_ranks: for data-parallel training; all ranks together give what one alone would.

    Attributes:
        decoder_name: what decodes: "cpu", "torchcodec", "torchvision" or "given".
        minibatches_per_epoch: n.
        batch_size: of this rank's share.

    Raises:
        ValueError: an argument does not fit, or no GPU decoder is there; the message says why.
        ImportError: Pillow is missing.
    """

    def __init__(
        self,
        files: ImageFiles,
        batch_size: int,
        device: str | torch.device = "cpu",
        *,
        size: int = 224,
        seed: int = 0,
        num_workers: int = 0,
        decoder: str | Decoder = "cpu",
        corrupt: str = "error",
        memory_format: torch.memory_format = torch.contiguous_format,
        rank: int = 0,
        num_ranks: int = 1,
    ):
        if not 1 <= batch_size <= len(files):
            raise ValueError(f"ImageBatches: batch_size must be from 1 to {len(files)} (the images), got {batch_size}")
        share = rank_share("ImageBatches", batch_size, rank, num_ranks)
        if corrupt not in ("error", "replace"):
            raise ValueError(f"ImageBatches: corrupt must be error or replace, got {corrupt!r}")
        self.files, self.seed, self.device = files, seed, torch.device(device)
        self.minibatches_per_epoch, self.batch_size = len(files) // batch_size, len(share)
        self._global_batch_size, self._first_row = batch_size, share.start
        self._input = _Input(files, self.device, memory_format)
        found, self.decoder_name = _chosen(decoder, self.device)
        processing = Processing(
            size,
            seed=derived_seed("ImageBatches", seed),
            replace_corrupt=corrupt == "replace",
            encoded=found is not None,
        )
        self._loader = ImageLoader(
            files, processing, self.device, batch_size=self.batch_size, num_workers=num_workers, decoder=found
        )
        self._draws: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._stream: Any = iter(())
        self._plan = _Plan(-1, 0, 0)
        self._last: tuple[int, int] | None = None
        self._told: set[int] = set()

    def close(self) -> None:
        """End the workers."""
        self._close_stream()
        self._loader.close()

    @property
    def num_corrupt(self) -> int:
        """How many corrupt images were met, and replaced, so far."""
        return len(self._loader.corrupt)

    def stack(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Return minibatches first … first + count − 1 of the run.

        Returns:
            images [count·B, 3, S, S] float32, normalized; labels [count·B] int64; member-major; B is this rank's share.

        Raises:
            CorruptImage: an image is, and they are not to be replaced.
            WorkerError: a worker died, or has been stuck for 25 s.
            OSError: an image cannot be read.

        Warns:
            UserWarning: a corrupt image was replaced, once for each; the GPU's decoder failed.
        """
        parts: list[Loaded] = []
        try:
            for number in range(first, first + count):
                if self._plan.next() != number or count > self._plan.count:
                    self._restart(number, first, count)
                parts.append(next(self._stream))
                self._plan.taken += 1
        except BaseException:
            self._close_stream()
            raise
        self._last = first, count
        self._warn()
        pixels, labels = (torch.cat([getattr(part, name) for part in parts]) for name in ("pixels", "labels"))
        return self._input(pixels), labels

    def _restart(self, number: int, first: int, count: int) -> None:
        """Begin to load with minibatch `number`, one of first … first + count − 1."""
        self._close_stream()
        stride = count
        if self._last is not None and self._last[1] == count and first > self._last[0]:
            stride = first - self._last[0]
        self._plan = _Plan(first, count, stride, taken=number - first)
        self._stream = self._loader.load(map(self._request, self._plan.numbers()), ahead=count + 1)

    def _close_stream(self) -> None:
        if hasattr(self._stream, "close"):
            self._stream.close()
        self._stream, self._plan = iter(()), _Plan(-1, 0, 0)

    def _request(self, number: int) -> Request:
        epoch, step = divmod(number, self.minibatches_per_epoch)
        if epoch not in self._draws:
            generator = torch.Generator().manual_seed(derived_seed("ImageBatches", self.seed, epoch))
            order = torch.randperm(len(self.files), generator=generator).numpy()
            flip = torch.randint(2, (len(self.files),), generator=generator, dtype=torch.uint8).bool().numpy()
            self._draws = {key: value for key, value in self._draws.items() if key == epoch - 1}
            self._draws[epoch] = order, flip
        order, flip = self._draws[epoch]
        position = step * self._global_batch_size + self._first_row
        rows = slice(position, position + self.batch_size)
        return Request(number, order[rows], epoch, position, flip[rows])

    def _warn(self) -> None:
        for index in self._loader.corrupt.keys() - self._told:
            self._told.add(index)
            warnings.warn(f"{self._loader.corrupt[index]}; another image takes its place", stacklevel=3)
        if self._loader.decoder_failure is not None:
            warnings.warn(
                f"{self.decoder_name} failed on some images, which the CPU decoded: {self._loader.decoder_failure}",
                stacklevel=3,
            )
            self._loader.decoder_failure = None


class EvaluationImages:
    """All images in their order, resized, their middle taken, normalized: as torchvision's presets do, on the CPU.

    Args:
        files: the images.
        device: where batches shall be.
        size: S.
        resize: the shorter side before the middle is taken.
        num_workers: processes that read and decode.
        memory_format: of the images.

    Attributes:
        labels: [N] int64 on the device.

    Raises:
        ValueError: resize is less than size.
    """

    def __init__(
        self,
        files: ImageFiles,
        device: str | torch.device = "cpu",
        *,
        size: int = 224,
        resize: int = 256,
        num_workers: int = 0,
        memory_format: torch.memory_format = torch.contiguous_format,
    ):
        if resize < size:
            raise ValueError(f"EvaluationImages: resize must be at least size={size}, got {resize}")
        self.files, self.device = files, torch.device(device)
        self.labels = torch.from_numpy(files.labels).to(self.device)
        self._input = _Input(files, self.device, memory_format)
        self._loader = ImageLoader(
            files, Processing(size, resize), self.device, batch_size=len(files), num_workers=num_workers
        )

    def __len__(self) -> int:
        return len(self.files)

    def close(self) -> None:
        """End the workers."""
        self._loader.close()

    def batches(self, batch_size: int, numbers: Iterable[int] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images [batch_size, 3, S, S] float32 and labels [batch_size]; the last may be short.

        Args:
            batch_size: images of a batch.
            numbers: of the batches to yield, from 0; None for all.

        Raises:
            ValueError: batch_size is not positive.
            CorruptImage, WorkerError, OSError: see ImageBatches.stack.
        """
        if batch_size < 1:
            raise ValueError(f"EvaluationImages.batches: batch_size must be at least 1, got {batch_size}")
        everything, starts = np.arange(len(self)), range(0, len(self), batch_size)
        requests = (
            Request(number, everything[first : first + batch_size])
            for number, first in enumerate(starts if numbers is None else (starts[number] for number in numbers))
        )
        stream: Any = self._loader.load(requests, ahead=2)
        try:
            for part in stream:
                yield self._input(part.pixels), part.labels
        finally:
            stream.close()


class _Plan:
    """Which minibatches are loaded, in order: count from `first` on, count from first + stride on, …"""

    def __init__(self, first: int, count: int, stride: int, taken: int = 0):
        self.first, self.count, self.stride, self.taken = first, count, stride, taken

    def at(self, position: int) -> int:
        return self.first + position // self.count * self.stride + position % self.count

    def next(self) -> int | None:
        """The number of the next one that is taken; None where nothing is planned."""
        return self.at(self.taken) if self.count else None

    def numbers(self) -> Iterator[int]:
        """All that are still to be taken, in order."""
        return map(self.at, itertools.count(self.taken))


class _Input:
    """From bytes to what a network takes."""

    def __init__(self, files: ImageFiles, device: torch.device, memory_format: torch.memory_format):
        self.mean, self.std = (per_channel("mean or std", values, 3, device) for values in (files.mean, files.std))
        self.memory_format = memory_format

    def __call__(self, pixels: Tensor) -> Tensor:
        """pixels: [M, S, S, 3] uint8"""
        return normalize(pixels.permute(0, 3, 1, 2), self.mean, self.std, self.memory_format)


def _chosen(decoder: str | Decoder, device: torch.device) -> tuple[Decoder | None, str]:
    """The GPU's decoder, or None for the CPU's; and its name."""
    if callable(decoder):
        return decoder, "given"
    if decoder not in ("auto", "cpu", "gpu"):
        raise ValueError(f"ImageBatches: decoder must be auto, cpu or gpu, got {decoder!r}")
    if decoder == "cpu":
        return None, "cpu"
    found, name = find_gpu_decoder(device)
    if found is None and decoder == "gpu":
        raise ValueError(f"ImageBatches: decoder must be cpu here: there is none on the GPU ({name})")
    return found, name if found is not None else "cpu"
