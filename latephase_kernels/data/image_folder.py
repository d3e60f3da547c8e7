"""Images in a tree SPLIT/CLASS/FILE, as ImageNet is usually laid out."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .files import ArchiveError
from .image_files import IMAGE_SUFFIXES, ImageFiles, Names

LAYOUT = "expected are FOLDER/train/CLASS/IMAGE.JPEG and FOLDER/val/CLASS/IMAGE.JPEG"


class ImageFolder(ImageFiles):
    """The images of one split; classes are its folders in alphabetical order, images are sorted within each.

    Args:
        path: the folder of the split.
        classes: of the training split, for another one: a label means the same in both.

    Raises:
        FileNotFoundError: there is no such folder.
        ArchiveError: there are no class folders, one of them is empty, or is no class of the training split.
        OSError: a folder cannot be read.

    Warns:
        UserWarning: files that are no images, which are left out; classes without a folder here. Both are counted.
    """

    def __init__(self, path: str | Path, classes: Sequence[str] | None = None):
        self.path = Path(path)
        if not self.path.is_dir():
            raise FileNotFoundError(f"{self.path} is no folder; {LAYOUT}")
        folders = sorted(entry.name for entry in os.scandir(self.path) if entry.is_dir())
        self.classes = tuple(folders if classes is None else classes)
        if not folders:
            raise ArchiveError(f"{self.path} holds no folders, one for each class; {LAYOUT}")
        number = {name: index for index, name in enumerate(self.classes)}
        foreign = [name for name in folders if name not in number]
        if foreign:
            raise ArchiveError(
                f"{self.path} has {len(foreign)} folders that are no class of the training images, {foreign[0]} the "
                "first; remove them, or add training images"
            )
        missing = sorted(number.keys() - set(folders))
        if missing:
            warnings.warn(
                f"{self.path} has no images of {len(missing)} of the {len(number)} classes, {missing[0]} the first",
                stacklevel=2,
            )
        names: list[str] = []
        labels: list[int] = []
        others: list[str] = []
        for folder in folders:
            images = self._images_in(folder, others)
            if not images:
                raise ArchiveError(f"{self.path / folder} holds no image; add some, or remove the folder")
            names += images
            labels += [number[folder]] * len(images)
        if others:
            warnings.warn(
                f"{self.path} holds {len(others)} files that are no images ({', '.join(IMAGE_SUFFIXES)}), "
                f"{others[0]} the first; they are left out",
                stacklevel=2,
            )
        self._names, self.labels = Names(names), np.array(labels, dtype=np.int64)

    def _images_in(self, folder: str, others: list[str]) -> list[str]:
        images: list[str] = []
        with os.scandir(self.path / folder) as entries:
            for entry in entries:
                is_image = entry.name.lower().endswith(IMAGE_SUFFIXES)
                (images if is_image else others).append(entry.name if is_image else f"{folder}/{entry.name}")
        return sorted(images)

    def name(self, index: int) -> str:
        """Return the path of image `index`."""
        return str(self.path / self.classes[self.labels[index]] / self._names[index])

    def read(self, index: int) -> bytes:
        """Return the file of image `index`; see ImageFiles."""
        with open(self.name(index), "rb") as file:
            return file.read()
