"""The loader of `latephase demo`: minibatches of images in memory. `latephase train` has device_batches.py."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad


def random_shift(images: Tensor, pixels: int, fill: float, generator: torch.Generator) -> Tensor:
    """Shift every image by its own random whole number of pixels; what comes in from outside is `fill`.

    Args:
        images: [N, C, H, W]
        pixels: the largest shift, up, down, left and right.
        fill: the background's value.
        generator: drives the shifts: (2·pixels + 1)² equally likely ones.

    Returns:
        [N, C, H, W], a new tensor.
    """
    count, _, height, width = images.shape
    padded = pad(images, (pixels, pixels, pixels, pixels), value=fill)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # [N, C, 2·pixels + 1, 2·pixels + 1, H, W], a view
    down, right = torch.randint(2 * pixels + 1, (2, count), generator=generator)
    return windows[torch.arange(count), :, down, right]


class Minibatches:
    """A loader: every pass shuffles the data, shifts each image at random and yields (images, labels) minibatches.

    Two loaders with generators of the same state yield the same minibatches. A short last one is dropped.

    Args:
        images: [N, C, H, W]
        labels: [N]
        batch_size: images in a minibatch.
        shift: largest random shift in pixels, see `random_shift`; its background is `fill`.
        fill: the background's value.
        generator: drives the order and the shifts.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, batch_size: int, *, shift: int, fill: float, generator: torch.Generator
    ):
        self.images, self.labels, self.batch_size = images, labels, batch_size
        self.shift, self.fill, self.generator = shift, fill, generator

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.images), generator=self.generator)[: len(self) * self.batch_size]
        images = random_shift(self.images[order], self.shift, self.fill, self.generator)
        yield from zip(images.split(self.batch_size), self.labels[order].split(self.batch_size), strict=True)
