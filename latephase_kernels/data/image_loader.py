"""Batches of encoded images, read and decoded by worker processes ahead of their use, in order, in bounded memory.

Legend: b images a request; S × S pixels are what a network sees.
"""

import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .gpu_jpeg import Decoder, resized_crops
from .image_crops import sample_generator
from .image_decoding import CorruptImage, jpeg_for_gpu, training_pixels, validation_pixels
from .image_files import ImageFiles
from .worker_pool import Slot, WorkerPool

_CHUNK = 32  # images a task
_ENCODED_BYTES = 1 << 18  # what a GPU decodes is no larger; larger files are large images, cheaper to send decoded
_MOST_REPLACEMENTS = 100


@dataclass(frozen=True)
class Request:
    """Which images to load.

    Attributes:
        number: the caller's, returned with the result.
        indices: [b] int64.
        epoch: with the place in its order, the origin of each image's random numbers.
        position: of the first image in the epoch's order.
        flip: [b] bool, which ones to mirror; None for none.
    """

    number: int
    indices: np.ndarray
    epoch: int = 0
    position: int = 0
    flip: np.ndarray | None = None


@dataclass(frozen=True)
class Loaded:
    """What a request brought.

    Attributes:
        number: the request's.
        pixels: [b, S, S, 3] uint8 on the device.
        labels: [b] int64 on the device.
    """

    number: int
    pixels: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Processing:
    """What happens to an image between the disk and the network.

    Attributes:
        size: S.
        resize: the shorter side before the middle is taken; None: a random-resized-crop.
        seed: of the crops.
        replace_corrupt: put another image in a damaged one's place; else it is an error.
        encoded: hand JPEGs over as they are, for a GPU.
    """

    size: int
    resize: int | None = None
    seed: int = 0
    replace_corrupt: bool = False
    encoded: bool = False

    @property
    def slot_bytes(self) -> int:
        """Of one image in a slot."""
        return max(3 * self.size**2, _ENCODED_BYTES if self.encoded else 0)


class _Work:
    """What the workers do with a slot: read, decode, crop, image by image; returns the corrupt ones it replaced."""

    def __init__(self, files: ImageFiles, processing: Processing):
        self.files, self.processing = files, processing

    def __call__(self, slot: Slot, at: Any, encoded: bool | None = None) -> list[tuple[int, str]]:
        replaced: list[tuple[int, str]] = []
        for row in range(int(slot["count"][0])):
            at(row)
            random = sample_generator(self.processing.seed, int(slot["origin"][0]), int(slot["origin"][1]) + row)
            for _ in range(_MOST_REPLACEMENTS):
                try:
                    self._load(slot, row, random, self.processing.encoded if encoded is None else encoded)
                    break
                except CorruptImage as error:
                    if not self.processing.replace_corrupt:
                        raise
                    replaced.append((int(slot["index"][row]), str(error)))
                    slot["index"][row] = random.integers(len(self.files))
            else:
                raise CorruptImage(f"{_MOST_REPLACEMENTS} images in a row are corrupt; the last: {replaced[-1][1]}")
        return replaced

    def _load(self, slot: Slot, row: int, random: np.random.Generator, encoded: bool) -> None:
        index, processing = int(slot["index"][row]), self.processing
        content = self.files.read(index)
        slot["length"][row] = 0
        if encoded and len(content) <= processing.slot_bytes:
            jpeg = jpeg_for_gpu(content, random)
            if jpeg is not None:
                target = slot["pixels"][row, : len(content)]
                target[:] = np.frombuffer(content, dtype=np.uint8)
                target[list(jpeg.exif)] = 0xEF  # the marker of an application's own segment, which decoders ignore
                slot["box"][row], slot["length"][row] = jpeg.box, len(content)
                return
        name, size = self.files.name(index), processing.size
        if processing.resize is None:
            pixels = training_pixels(content, name, random, size)
        else:
            pixels = validation_pixels(content, name, processing.resize, size)
        slot["pixels"][row, : pixels.size] = pixels.reshape(-1)


class ImageLoader:
    """Worker processes for a set of images, and the results on a device.

    Args:
        files: the images.
        processing: of each.
        device: where results shall be.
        batch_size: of the requests, at most; for the size of a task.
        num_workers: processes; 0: everything happens here.
        decoder: for processing.encoded; see gpu_jpeg.

    Attributes:
        corrupt: by index, what is wrong with the images that were replaced so far.
        decoder_failure: why a GPU's decoder refused a chunk of images that the CPU decoded then, or None.
    """

    def __init__(
        self,
        files: ImageFiles,
        processing: Processing,
        device: torch.device,
        *,
        batch_size: int,
        num_workers: int,
        decoder: Decoder | None = None,
    ):
        self.files, self.processing, self.device, self.decoder = files, processing, device, decoder
        self.corrupt: dict[int, str] = {}
        self.decoder_failure: str | None = None
        self._labels = torch.from_numpy(files.labels)
        self._chunk = chunk = min(batch_size, _CHUNK)
        self._work = _Work(files, processing)
        arrays: dict[str, tuple[tuple[int, ...], Any]] = {
            "count": ((1,), np.int64),
            "origin": ((2,), np.int64),  # epoch and position
            "index": ((chunk,), np.int64),
            "box": ((chunk, 4), np.int64),
            "length": ((chunk,), np.int64),  # of an encoded image; 0 for pixels
            "pixels": ((chunk, processing.slot_bytes), np.uint8),
        }
        self._pool = WorkerPool(
            self._work,
            arrays,
            num_slots=3 * num_workers + 2,
            num_workers=num_workers,
            describe=lambda slot, row: files.name(int(slot["index"][row])),
        )

    def close(self) -> None:
        """End the workers."""
        self._pool.close()

    def load(self, requests: Iterable[Request], *, ahead: int) -> "Iterator[Loaded] | Ahead":
        """Yield the requests' images in order; close what this returns before another call.

        Args:
            requests: taken up as slots get free.
            ahead: on a GPU, requests that are completed before they are asked for.

        Raises:
            As WorkerPool.result; CorruptImage.
        """
        loaded = self._load(iter(requests))
        return Ahead(loaded, ahead, self.device) if self.device.type == "cuda" else loaded

    def _load(self, requests: Iterator[Request]) -> Iterator[Loaded]:
        in_flight: deque[tuple[Request, int, int]] = deque()  # request, its first row, number of the task
        chunks = ((request, first) for request in requests for first in range(0, len(request.indices), self._chunk))
        upcoming = next(chunks, None)
        pixels, index = torch.empty(0), np.empty(0, dtype=np.int64)
        try:
            while upcoming or in_flight:
                if upcoming and not in_flight:
                    self._pool.wait_for_slot()
                while upcoming and self._pool.has_free_slot:
                    in_flight.append((*upcoming, self._submit(*upcoming)))
                    upcoming = next(chunks, None)
                request, first, number = in_flight[0]
                slot, replaced = self._pool.result(number)
                self.corrupt.update(replaced)
                if first == 0:
                    size = self.processing.size
                    shape = (len(request.indices), size, size, 3)
                    pixels = torch.empty(shape, dtype=torch.uint8, device=self.device)
                    index = np.empty(len(request.indices), dtype=np.int64)
                last = first + int(slot["count"][0])
                self._fill(pixels[first:last], slot)
                index[first:last] = slot["index"][: last - first]
                in_flight.popleft()
                self._pool.release(number)
                if last == len(index):
                    yield self._loaded(request, pixels, index)
        finally:
            for _, _, number in in_flight:
                self._pool.release(number)

    def _submit(self, request: Request, first: int) -> int:
        indices = request.indices[first : first + self._chunk]

        def fill(slot: Slot) -> None:
            slot["count"][0] = len(indices)
            slot["origin"][:] = request.epoch, request.position + first
            slot["index"][: len(indices)] = indices

        return self._pool.submit(fill)

    def _fill(self, target: Tensor, slot: Slot) -> None:
        """Write a slot's images, decoded, into target [count, S, S, 3] on the device."""
        count, size = len(target), self.processing.size
        encoded = np.flatnonzero(slot["length"][:count])
        if len(encoded) and not self._decode(target, slot, encoded):
            self.corrupt.update(self._work(slot, lambda row: None, encoded=False))
            encoded = encoded[:0]
        pixels = torch.from_numpy(slot["pixels"][:count, : 3 * size * size]).view(-1, size, size, 3)
        if not len(encoded):
            target.copy_(pixels)
        elif len(encoded) < count:
            plain = torch.from_numpy(np.setdiff1d(np.arange(count), encoded))
            target[plain.to(self.device)] = pixels[plain].to(self.device)

    def _decode(self, target: Tensor, slot: Slot, encoded: np.ndarray) -> bool:
        """Let the decoder have the encoded images of a slot; return whether it could: one bad image fails them all."""
        assert self.decoder is not None
        jpegs = [torch.from_numpy(slot["pixels"][row, : slot["length"][row]]) for row in encoded]
        rows = torch.empty((len(encoded), *target.shape[1:]), dtype=torch.uint8, device=self.device)
        try:
            resized_crops(self.decoder(jpegs), slot["box"][encoded].tolist(), rows)
        except RuntimeError as error:
            self.decoder_failure = " ".join(str(error).split())[:200]
            return False
        target[torch.from_numpy(encoded).to(self.device)] = rows
        return True

    def _loaded(self, request: Request, pixels: Tensor, index: np.ndarray) -> Loaded:
        if request.flip is not None:
            flip = torch.from_numpy(request.flip).to(self.device)[:, None, None, None]
            pixels = torch.where(flip, pixels.flip(2), pixels)
        return Loaded(request.number, pixels, self._labels[index].to(self.device))


class Ahead:
    """An iterator run by a thread with a CUDA stream of its own; what it yields is complete when it is handed out.

    Args:
        items: a generator of Loaded; closed in the thread.
        ahead: how many of them wait at most.
        device: a GPU.
    """

    def __init__(self, items: Any, ahead: int, device: torch.device):
        self._items, self._device = items, device
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=max(ahead, 1))
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="image loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> "Ahead":
        return self

    def __next__(self) -> Loaded:
        item = self._queue.get()
        if isinstance(item, Loaded):
            if self._device.type == "cuda":
                for tensor in (item.pixels, item.labels):
                    tensor.record_stream(torch.cuda.current_stream(self._device))
            return item
        self._queue.put(item)  # for whoever asks again
        raise StopIteration if item is None else item

    def close(self) -> None:
        """End the thread; what it holds is dropped."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        on_gpu = self._device.type == "cuda"
        end: BaseException | None = None
        try:
            stream = torch.cuda.Stream(self._device) if on_gpu else None
            with torch.cuda.stream(stream) if on_gpu else nullcontext():
                for item in self._items:
                    if stream is not None:
                        stream.synchronize()
                    self._put(item)
                    if self._stopped.is_set():
                        break
        except BaseException as error:
            end = error
        finally:
            self._items.close()
        self._put(end)

    def _put(self, item: Any) -> None:
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return
            except queue.Full:
                continue
