"""Images that live on the device as bytes, and what makes a network's input of them: crop, normalize, erase.

Legend: N images of C channels, H × W pixels; M of them at a time.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from .sets import ImageSet


def per_channel(name: str, values: Sequence[float], channels: int, device: torch.device) -> Tensor:
    """Return values as float32 [1, channels, 1, 1] on a device; a ValueError where there are more or fewer."""
    if len(values) != channels:
        raise ValueError(f"DeviceImages: {name} must have {channels} values, one for each channel, got {len(values)}")
    return torch.tensor(values, dtype=torch.float32, device=device).view(1, channels, 1, 1)


def normalize(
    images: Tensor, mean: Tensor, std: Tensor, memory_format: torch.memory_format, erase: Tensor | None = None
) -> Tensor:
    """Return (x / 255 − mean) / std, computed in this order, as torchvision's ToTensor and Normalize do.

    Args:
        images: [M, C, H, W] uint8
        mean: [1, C, 1, 1] float32
        std: likewise.
        memory_format: of the result.
        erase: [M, H, W] bool, pixels that become 0: the mean colour.

    Returns:
        [M, C, H, W] float32.
    """
    values = images.to(torch.float32, memory_format=memory_format)
    values.div_(255).sub_(mean).div_(std)
    if erase is not None:
        values.masked_fill_(erase[:, None], 0)
    return values


class DeviceImages:
    """An image set on a device, and what turns its bytes into a network's input.

    See normalize for the values.

    The images are kept as [N, H + 2p, W + 2p, C] with a black border of p pixels: a crop, flipped or not, is then one
    gather, and its result is channels_last as it stands.

    Args:
        data: uint8 images and int64 labels.
        device: where they shall live.
        mean: per channel; data.mean by default.
        std: per channel; data.std by default.
        padding: p, the largest shift of a crop.
        memory_format: of the output: torch.contiguous_format or torch.channels_last.

    Raises:
        TypeError: the images are no uint8 [N, C, H, W] or the labels no int64 [N].
        ValueError: the number of labels, mean or std does not fit; there are neither constants nor defaults.

    Cost:
        N·C·(H + 2p)·(W + 2p) bytes on the device: 240 MB for CIFAR's training images.
    """

    def __init__(
        self,
        data: ImageSet,
        device: str | torch.device = "cpu",
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        padding: int = 4,
        memory_format: torch.memory_format = torch.contiguous_format,
    ):
        images, labels = data.images, data.labels
        if images.dtype != torch.uint8 or images.dim() != 4 or labels.dtype != torch.int64 or labels.dim() != 1:
            raise TypeError(
                "DeviceImages: data must have uint8 images [N, C, H, W] and int64 labels [N], got "
                f"{images.dtype} {list(images.shape)} and {labels.dtype} {list(labels.shape)}"
            )
        if len(images) != len(labels):
            raise ValueError(
                f"DeviceImages: data must have a label for each image, got {len(images)} and {len(labels)}"
            )
        mean, std = data.mean if mean is None else mean, data.std if std is None else std
        if mean is None or std is None:
            raise ValueError("DeviceImages: data has no mean and std of its own; give those of the training set")
        if padding < 0:
            raise ValueError(f"DeviceImages: padding must be at least 0, got {padding}")
        self.labels = labels.to(device)
        self.device = self.labels.device  # with its index, whatever the current device will be later
        self.mean = per_channel("mean", mean, images.size(1), self.device)
        self.std = per_channel("std", std, images.size(1), self.device)
        self.padding, self.memory_format = padding, memory_format
        self.height, self.width = images.shape[2:]
        padded_shape = (len(images), self.height + 2 * padding, self.width + 2 * padding, images.size(1))
        self._padded = torch.zeros(padded_shape, dtype=torch.uint8, device=self.device)
        inner = self._padded[:, padding : padding + self.height, padding : padding + self.width]
        inner.copy_(images.to(self.device).permute(0, 2, 3, 1))
        self._rows = torch.arange(self.height, device=self.device)
        self._columns = torch.arange(self.width, device=self.device)

    def __len__(self) -> int:
        return len(self.labels)

    def crop(self, index: Tensor, down: Tensor, right: Tensor, flip: Tensor) -> Tensor:
        """Return windows of the padded images, as bytes.

        Args:
            index: [M] int64, which images.
            down: [M] int64, 0 … 2p, the window's first row in the padded image; p is the image itself.
            right: [M] int64, likewise its first column.
            flip: [M] bool, mirror the window left to right.

        Returns:
            [M, C, H, W] uint8, channels_last.
        """
        rows = down[:, None] + self._rows  # [M, H]
        mirrored = torch.where(flip[:, None], self.width - 1 - self._columns, self._columns)
        columns = right[:, None] + mirrored  # [M, W]
        return self._padded[index[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

    def normalize(self, images: Tensor, erase: Tensor | None = None) -> Tensor:
        """Return what a network takes: normalized, in this set's memory format.

        Args:
            images: [M, C, H, W] uint8
            erase: [M, H, W] bool, pixels that become 0: the mean colour.
        """
        return normalize(images, self.mean, self.std, self.memory_format, erase)

    def square(self, center_row: Tensor, center_column: Tensor, size: int) -> Tensor:
        """Return where a square around each centre lies, cut off at the border: [M, H, W] bool."""
        inside = []
        for center, positions in ((center_row, self._rows), (center_column, self._columns)):
            first = center[:, None] - size // 2
            inside.append((positions >= first) & (positions < first + size))  # [M, H], [M, W]
        return inside[0][:, :, None] & inside[1][:, None, :]

    def batches(self, batch_size: int, numbers: Iterable[int] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all images in their order, normalized and not augmented, with their labels; the last may be short.

        Args:
            batch_size: images of a batch.
            numbers: of the batches to yield, from 0; None for all.

        Raises:
            ValueError: batch_size is not positive.
        """
        if batch_size < 1:
            raise ValueError(f"DeviceImages.batches: batch_size must be at least 1, got {batch_size}")
        inner = slice(self.padding, self.padding + self.height), slice(self.padding, self.padding + self.width)
        starts = range(0, len(self), batch_size)
        for start in starts if numbers is None else (starts[number] for number in numbers):
            images = self._padded[start : start + batch_size, inner[0], inner[1]].permute(0, 3, 1, 2)
            yield self.normalize(images), self.labels[start : start + batch_size]
