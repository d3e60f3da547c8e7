"""Labelled images that stay encoded on the disk, read one at a time by number, in any order and from any process."""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


class Names:
    """File names in one buffer: a million Python strings would be copied into every worker by its reference counts."""

    def __init__(self, names: Sequence[str]):
        encoded = [os.fsencode(name) for name in names]
        self._bytes = b"".join(encoded)
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        first = int(self._ends[index - 1]) if index else 0
        return os.fsdecode(self._bytes[first : int(self._ends[index])])


class ImageFiles(ABC):
    """Encoded images with labels.

    Attributes:
        labels: [N] int64, an index into classes.
        classes: their names.
        mean: per channel, for values divided by 255.
        std: likewise.
        num_channels: of the decoded images.
    """

    labels: np.ndarray
    classes: tuple[str, ...]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    num_channels: int = 3

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def name(self, index: int) -> str:
        """Return where image `index` lies, for messages."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """Return the file of image `index`, still encoded.

        Raises:
            OSError: it cannot be read.
            ArchiveError: what holds it is cut off.
        """
