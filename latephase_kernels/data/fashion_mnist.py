"""Fashion-MNIST: grey images of clothing in ten classes, from the IDX files that it is published in.

An IDX file of bytes is a header (two zeros, the type 8, the number of dimensions, each dimension as a big-endian int32)
and the values.

Source: H. Xiao, K. Rasul, R. Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning
Algorithms", 2017, https://arxiv.org/abs/1708.07747; MIT licence.
"""

import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np
import torch

from .files import ArchiveError, find_data, named_errors
from .sets import ImageSet

_SIDE = 28
_NUM_TRAIN, _NUM_TEST = 60_000, 10_000
_CLASSES = (*"T-shirt/top Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag".split(), "Ankle boot")
_MEAN, _STD = 0.2860, 0.3530  # of all training pixels divided by 255
_SHA256 = {  # of what is in the files: gzip's own header differs from copy to copy
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
_REMEDY = (
    "get it with torchvision.datasets.FashionMNIST(folder, download=True), or as Debian's package "
    "dataset-fashion-mnist, whose folder is /usr/share/datasets/fashion-mnist"
)


def _read_idx(folder: str | Path, name: str, shape: tuple[int, ...], verify: bool) -> np.ndarray:
    """The bytes of one file, of this shape."""
    places = [place + ending for place in (name, f"FashionMNIST/raw/{name}") for ending in (".gz", "")]
    path = find_data(folder, places, _REMEDY)
    header = struct.pack(f">4B{len(shape)}i", 0, 0, 8, len(shape), *shape)
    size = len(header) + int(np.prod(shape))
    with named_errors(path), gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
        content = file.read(size + 1)
    if not content.startswith(header) or len(content) != size:
        raise ArchiveError(f"{path} is no IDX file of bytes {list(shape)}; {_REMEDY}")
    if verify and hashlib.sha256(content).hexdigest() != _SHA256[name]:
        raise ArchiveError(f"{path} is damaged, or another data set in the same format; {_REMEDY}")
    return np.frombuffer(content, dtype=np.uint8, offset=len(header)).reshape(shape).copy()


def load_fashion_mnist(path: str | Path, *, train: bool = True, verify: bool = True) -> ImageSet:
    """Read Fashion-MNIST's 60,000 training or 10,000 test images.

    Args:
        path: a folder that holds the published files (train-images-idx3-ubyte.gz, …, or unpacked), or torchvision's,
            in which they are in FashionMNIST/raw.
        train: the training images, else the test images; in the order of the files.
        verify: compare the SHA-256 of what the files hold with the published data's.

    Returns:
        images [N, 1, 28, 28] uint8, labels [N] int64 from 0 to 9, ten class names; mean and std of the training pixels.

    Raises:
        FileNotFoundError: there is no such data; the text says how to get it.
        ValueError: it is damaged, or something else.
        OSError: it cannot be read.
    """
    part, count = ("train", _NUM_TRAIN) if train else ("t10k", _NUM_TEST)
    images = _read_idx(path, f"{part}-images-idx3-ubyte", (count, _SIDE, _SIDE), verify)
    labels = _read_idx(path, f"{part}-labels-idx1-ubyte", (count,), verify)
    if labels.max() >= len(_CLASSES):
        raise ArchiveError(f"{path} has the label {labels.max()}, the largest is {len(_CLASSES) - 1}; {_REMEDY}")
    shaped = torch.from_numpy(images).unsqueeze(1)
    return ImageSet(shaped, torch.from_numpy(labels).long(), _CLASSES, (_MEAN,), (_STD,))
