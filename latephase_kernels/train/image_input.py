"""A recipe's images as minibatches: of sets that live on the device, or of files on the disk."""

import os
from typing import Any

import torch

from ..data import DeviceBatches, DeviceImages, EvaluationImages, ImageBatches, ImageFiles, ImageSet
from ..data.worker_pool import available_cores, can_fork
from .recipe import Recipe

_MOST_WORKERS = 16


def memory_format_of(recipe: Recipe) -> torch.memory_format:
    """Return the memory format of a recipe's images and convolutions."""
    return torch.channels_last if recipe.channels_last else torch.contiguous_format


def num_workers_of(recipe: Recipe) -> int:
    """Return how many processes read and decode images for this one; the cores are shared with other local ranks."""
    if not can_fork():  # whatever the recipe says: a run from elsewhere is evaluated here, too
        return 0
    if recipe.images.workers is not None:
        return recipe.images.workers
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's
    return min(max(available_cores() // local_ranks, 1), _MOST_WORKERS)


def training_batches(
    recipe: Recipe, train: ImageSet | ImageFiles, device: torch.device, *, rank: int = 0, num_ranks: int = 1
) -> DeviceBatches | ImageBatches:
    """Return the minibatches of a training set.

    Raises:
        ValueError: the recipe does not fit the images, or the device.
        ImportError: Pillow is missing.
    """
    share: dict[str, Any] = {"seed": recipe.seed, "rank": rank, "num_ranks": num_ranks}
    if isinstance(train, ImageFiles):
        return ImageBatches(
            train,
            recipe.batch_size,
            device,
            size=recipe.images.size,
            num_workers=num_workers_of(recipe),
            decoder=recipe.images.decoder,
            corrupt=recipe.images.corrupt,
            memory_format=memory_format_of(recipe),
            **share,
        )
    data = recipe.data
    images = DeviceImages(train, device, padding=data.crop_padding, memory_format=memory_format_of(recipe))
    return DeviceBatches(
        images, recipe.batch_size, crop=data.crop_padding > 0, flip=data.flip, cutout=data.cutout, **share
    )


def evaluation_images(
    recipe: Recipe, train: ImageSet | ImageFiles, test: ImageSet | ImageFiles, device: str | torch.device
) -> DeviceImages | EvaluationImages:
    """Return the images of another set, prepared as a run's network expects them; they have batches(size) and labels.

    Args:
        recipe: of the run.
        train: for its mean and std.
        test: the images.
        device: where batches shall be.
    """
    if isinstance(test, ImageFiles):
        size, resize = recipe.images.size, recipe.images.resize
        workers = num_workers_of(recipe)
        return EvaluationImages(
            test, device, size=size, resize=resize, num_workers=workers, memory_format=memory_format_of(recipe)
        )
    return DeviceImages(test, device, mean=train.mean, std=train.std, padding=0, memory_format=memory_format_of(recipe))
