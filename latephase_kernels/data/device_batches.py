"""Shuffled and augmented minibatches of images that live on the device, stacked for K members or not.

Legend: N images; B samples a minibatch; K members; n = N // B minibatches an epoch; they are numbered through the whole
run: number m is minibatch m % n of epoch m // n.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .device_images import DeviceImages
from .sampling import derived_seed, rank_share


class DeviceBatches:
    """An endless supply of minibatches, one pass (`for images, labels in batches`) an epoch.

    Every epoch is a new random order of the images; each image gets its own shift (0 … 2p rows and columns of the
    padded image, p = images.padding), flip (probability ½) and, if asked for, erased square. All of it follows from
    (seed, epoch): the same numbers on the same kind of device give the same bits, a run can go on from any minibatch
    without drawing those before, and what is switched off does not change the rest. Nothing waits for the device.

    With num_members = K a pass yields stacked batches: member k's rows are the k-th of K consecutive minibatches, so
    that an epoch stays one pass over the data. `lp.stack_batches(DeviceBatches(…), K)` gives the same bits in K times
    as many operations. As there, minibatches left over at the end of an epoch open the next pass, and the images that
    fill no minibatch sit out the epoch.

    The position is kept in the object: a pass that was left early goes on where it stopped. It moves on before a batch
    is handed out; a state taken in the loop's body continues with the next one. For passes that shall not move it (to
    recompute statistics, say) make a second DeviceBatches of the same images: they are not copied.

    Args:
        images: the set on its device.
        batch_size: B, over all ranks.
        num_members: K; may be set again between two passes.
        crop: shift at random; else the images as they are.
        flip: mirror an image with probability ½.
        cutout: side of the erased square, in pixels; its centre is anywhere in the image. 0: none.
        seed: of the order and of all augmentation.
        rank: which share of every minibatch's samples to take, of num_ranks equal ones.
        num_ranks: for data-parallel training; all ranks together give what one alone would.

    Raises:
        ValueError: an argument does not fit; there are fewer images than fill one minibatch.

    Source:
        cutout: DeVries and Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout", 2017.
    """

    drop_last = True  # for what asks a loader, as lp.stack_batches does

    def __init__(
        self,
        images: DeviceImages,
        batch_size: int,
        *,
        num_members: int = 1,
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
        self._epoch = self._pass_start = self._next = 0
        self._drawn: dict[int, Tensor] = {}
        self.num_members = num_members

    @property
    def num_members(self) -> int:
        """K, the minibatches in a stacked batch."""
        return self._num_members

    @num_members.setter
    def num_members(self, num_members: int) -> None:
        if num_members < 1:
            raise ValueError(f"DeviceBatches: num_members must be at least 1, got {num_members}")
        if self._next != self._pass_start:
            raise RuntimeError("DeviceBatches: num_members must be set between two passes; finish this one first")
        self._num_members = num_members

    @property
    def epoch(self) -> int:
        """How many passes are complete."""
        return self._epoch

    @property
    def step(self) -> int:
        """How many batches of the pass that runs were handed out."""
        return (self._next - self._pass_start) // self.num_members

    def __len__(self) -> int:
        """Batches of the pass that runs, from its start, or of the next one."""
        return ((self._epoch + 1) * self.minibatches_per_epoch - self._pass_start) // self.num_members

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while self.step < len(self):
            first = self._next
            self._next += self.num_members
            yield self.stack(first, self.num_members)
        self._epoch += 1
        self._pass_start = self._next

    def stack(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Return minibatches first … first + count − 1 of the run, whatever was taken before; moves nothing.

        Returns:
            images [count·B, C, H, W] in the set's dtype and memory format, labels [count·B] int64, member-major; B is
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

    def state_dict(self) -> dict[str, int]:
        """Return the position, and what it refers to; plain integers, the same on every rank."""
        return {**self._identity(), "epoch": self._epoch, "pass_start": self._pass_start, "next": self._next}

    def _identity(self) -> dict[str, int]:
        return {"seed": self.seed, "num_images": len(self.images), "batch_size": self._global_batch_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position, with the very next minibatch.

        Raises:
            ValueError: it is of another seed, number of images or batch size, or no position at all.
        """
        for key, value in self._identity().items():
            if state.get(key) != value:
                raise ValueError(f"DeviceBatches: the state was saved with {key}={state.get(key)}, here it is {value}")
        position: list[Any] = [state.get(key) for key in ("epoch", "pass_start", "next")]
        epoch, pass_start, following = position
        if not all(type(value) is int for value in position) or not (
            0 <= pass_start <= following <= (epoch + 1) * self.minibatches_per_epoch
        ):
            raise ValueError(
                f"DeviceBatches: the state's position does not fit an epoch's {self.minibatches_per_epoch}"
            )
        self._epoch, self._pass_start, self._next = epoch, pass_start, following
