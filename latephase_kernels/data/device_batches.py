"""Shuffled and augmented minibatches of images that live on the device.

Legend: N images; B samples a minibatch; n = N // B minibatches an epoch; they are numbered through the whole
run: number m is minibatch m % n of epoch m // n.
"""

import torch
from torch import Tensor

from .device_images import DeviceImages
from .sampling import derived_seed, rank_share


class DeviceBatches:
    """The minibatches of a run, by number.

    Every epoch is a new random order of the images; each image gets its own shift (0 … 2p rows and columns of the
    padded image, p = images.padding), flip (probability ½) and, if asked for, erased square. All of it follows from
    (seed, epoch): the same numbers on the same kind of device give the same bits, a run can go on from any minibatch
    without drawing those before, and what is switched off does not change the rest. The images that fill no minibatch
    sit out the epoch. Nothing waits for the device.

    Args:
        images: the set on its device.
        batch_size: B, over all ranks.
        crop: shift at random; else the images as they are.
        flip: mirror an image with probability ½.
        cutout: side of the erased square, in pixels; its centre is anywhere in the image. 0: none.
        seed: of the order and of all augmentation.
        rank: which share of every minibatch's samples to take, of num_ranks equal ones.
        num_ranks: for data-parallel training; all ranks together give what one alone would.

    Attributes:
        minibatches_per_epoch: n.
        batch_size: of this rank's share.

    Raises:
        ValueError: an argument does not fit; there are fewer images than fill one minibatch.

    Source:
        cutout: DeVries and Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout", 2017.
    """

    def __init__(
        self,
        images: DeviceImages,
        batch_size: int,
        *,
        crop: bool = True,
        flip: bool = True,
        cutout: int = 0,
        seed: int = 0,
        rank: int = 0,
        num_ranks: int = 1,
    ):
        if not 1 <= batch_size <= len(images):
            raise ValueError(
                f"DeviceBatches: batch_size must be from 1 to {len(images)} (the images), got {batch_size}"
            )
        share = rank_share("DeviceBatches", batch_size, rank, num_ranks)
        if cutout < 0:
            raise ValueError(f"DeviceBatches: cutout must be at least 0, got {cutout}")
        self.images, self.seed = images, seed
        self._global_batch_size = batch_size
        self.batch_size, self._share = len(share), slice(share.start, share.stop)
        self.crop, self.flip, self.cutout = crop, flip, cutout
        self.minibatches_per_epoch = len(images) // batch_size
        self._drawn: dict[int, Tensor] = {}

    def stack(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Return minibatches first … first + count − 1 of the run, whatever was taken before.

        Returns:
            images [count·B, C, H, W] float32 in the set's memory format, labels [count·B] int64, member-major; B is
            this rank's share.
        """
        parts = []
        while count > 0:
            epoch, step = divmod(first, self.minibatches_per_epoch)
            here = min(count, self.minibatches_per_epoch - step)
            parts.append(self._draws(epoch)[:, step : step + here, self._share])
            first, count = first + here, count - here
        index, down, right, flip, row, column = torch.cat(parts, dim=1).flatten(1)
        images = self.images.crop(index, down, right, flip.bool())
        erase = self.images.square(row, column, self.cutout) if self.cutout else None
        return self.images.normalize(images, erase), self.images.labels[index]

    def _draws(self, epoch: int) -> Tensor:
        """The epoch's images, shifts down and right, flips, and squares' rows and columns: [6, n, B] int64."""
        if epoch not in self._drawn:
            device, padding = self.images.device, self.images.padding
            count = self.minibatches_per_epoch * self._global_batch_size
            generator = torch.Generator(device).manual_seed(derived_seed("DeviceBatches", self.seed, epoch))
            order = torch.randperm(len(self.images), generator=generator, device=device)[:count]
            down, right, flip, row, column = (
                torch.randint(choices, (count,), generator=generator, device=device)
                for choices in (2 * padding + 1, 2 * padding + 1, 2, self.images.height, self.images.width)
            )
            if not self.crop:
                down, right = torch.full_like(down, padding), torch.full_like(right, padding)
            if not self.flip:
                flip = torch.zeros_like(flip)
            drawn = torch.stack([order, down, right, flip, row, column])
            # A stacked batch may begin in the epoch before.
            self._drawn = {key: value for key, value in self._drawn.items() if key == epoch - 1}
            self._drawn[epoch] = drawn.view(6, self.minibatches_per_epoch, self._global_batch_size)
        return self._drawn[epoch]
