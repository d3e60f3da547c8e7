"""The bundled handwritten digits: 1797 grey images of 8×8 pixels in ten classes, in a 45 kB file.

Source: "Optical Recognition of Handwritten Digits" by E. Alpaydin and C. Kaynak, UCI Machine Learning Repository
(https://doi.org/10.24432/C50P49), licence CC BY 4.0. The copy here is the part (UCI's test set) that scikit-learn 1.9.1
(BSD-3-Clause) ships as `sklearn.datasets.load_digits`, its values 0 … 16 stored unchanged as uint8.
"""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

NUM_CLASSES = 10
# Mean and standard deviation over all pixel values divided by 16.
PIXEL_MEAN = 0.305260
PIXEL_STD = 0.376049
BACKGROUND = (0.0 - PIXEL_MEAN) / PIXEL_STD  # an empty pixel after normalization

_FILE = Path(__file__).with_name("digits.npz")
_SHA256 = "b2dab7b501728c22e9119ad76740b2e17c77a231e42d1e592380d90886f1a05e"


@dataclass(frozen=True)
class Split:
    """Training and test set: images [N, 1, 8, 8] float32 (normalized), labels [N] int64, indices [N] into the file."""

    train_images: Tensor
    train_labels: Tensor
    train_indices: Tensor
    test_images: Tensor
    test_labels: Tensor
    test_indices: Tensor


def load_digits(path: str | Path = _FILE) -> tuple[Tensor, Tensor]:
    """Read the digits; nothing in the file is executed, and its SHA-256 is checked before it is parsed.

    Args:
        path: the bundled file, unless a copy lies elsewhere.

    Returns:
        images [1797, 1, 8, 8] float32, normalized: (value / 16 − mean) / std; labels [1797] int64, 0 … 9.

    Raises:
        OSError: the file cannot be read.
        ValueError: its content is not what was bundled.
    """
    content = Path(path).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != _SHA256:
        raise ValueError(
            f"load_digits: {path} is damaged: {len(content)} bytes with SHA-256 {digest[:12]}…, expected "
            f"{_SHA256[:12]}…; reinstall latephase_kernels"
        )
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        pixels, labels = arrays["images"], arrays["labels"]
    images = torch.from_numpy(pixels).float().div_(16).sub_(PIXEL_MEAN).div_(PIXEL_STD)
    return images.unsqueeze(1), torch.from_numpy(labels).long()


def split_digits(images: Tensor, labels: Tensor, *, num_train: int = 300, seed: int = 0) -> Split:
    """Draw a training set with the same number of images of every class; the rest is the test set.

    Args:
        images: [N, 1, 8, 8]
        labels: [N] int64, 0 … 9
        num_train: size of the training set, a multiple of ten; small, so that the test accuracy is not saturated.
        seed: the same seed gives the same split, whatever the state of PyTorch's global generator.

    Raises:
        ValueError: num_train is no multiple of ten, or leaves a class without a training or a test image.
    """
    smallest_class = int(labels.bincount(minlength=NUM_CLASSES).min())
    per_class, remainder = divmod(num_train, NUM_CLASSES)
    if remainder or not 0 < per_class < smallest_class:
        raise ValueError(
            f"split_digits: num_train must be a multiple of {NUM_CLASSES} from {NUM_CLASSES} to "
            f"{NUM_CLASSES * (smallest_class - 1)}, got {num_train}"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    chosen = [order[labels[order] == digit][:per_class] for digit in range(NUM_CLASSES)]
    train = torch.cat(chosen).sort().values
    is_test = torch.ones(len(labels), dtype=torch.bool)
    is_test[train] = False
    test = is_test.nonzero().flatten()
    return Split(images[train], labels[train], train, images[test], labels[test], test)
