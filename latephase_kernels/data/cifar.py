"""CIFAR-10 and CIFAR-100, from the official archives or the folders that come out of them.

Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009;
https://www.cs.toronto.edu/~kriz/cifar.html. The normalization constants are those of the published recipes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from .archives import Limits, Member, iterate_members
from .cifar_pickle import read_cifar_pickle
from .downloads import DOWNLOADS
from .files import find_data
from .sets import ImageSet

_IMAGE_SHAPE = (3, 32, 32)
_IMAGE_BYTES = 3 * 32 * 32
_LIMITS = Limits(member_bytes=256 << 20, total_bytes=1 << 30, members=1000)


@dataclass(frozen=True)
class CifarFormat:
    """Where one of the two sets keeps what.

    Attributes:
        name: for messages.
        downloads: the archives, by their names in DOWNLOADS.
        folders: what they hold, in the same order.
        num_classes: labels are smaller.
        train_files: of the Python version; the binary ones end in ".bin".
        images_per_file: in every training file.
        test_file: likewise.
        test_images: in it.
        label_key: of the Python version.
        label_bytes: in front of every image of the binary version; the last one is the label.
        names: file and key of the Python version's class names, and file of the binary version's.
        mean: of the published recipes, per channel, for values divided by 255.
        std: likewise.
    """

    name: str
    downloads: tuple[str, ...]
    folders: tuple[str, ...]
    num_classes: int
    train_files: tuple[str, ...]
    images_per_file: int
    test_file: str
    test_images: int
    label_key: str
    label_bytes: int
    names: tuple[str, str, str]
    mean: tuple[float, ...]
    std: tuple[float, ...]


CIFAR10 = CifarFormat(
    name="CIFAR-10",
    downloads=("cifar-10-python", "cifar-10-binary"),
    folders=("cifar-10-batches-py", "cifar-10-batches-bin"),
    num_classes=10,
    train_files=tuple(f"data_batch_{number}" for number in range(1, 6)),
    images_per_file=10_000,
    test_file="test_batch",
    test_images=10_000,
    label_key="labels",
    label_bytes=1,
    names=("batches.meta", "label_names", "batches.meta.txt"),
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2023, 0.1994, 0.2010),
)
CIFAR100 = CifarFormat(
    name="CIFAR-100",
    downloads=("cifar-100-python", "cifar-100-binary"),
    folders=("cifar-100-python", "cifar-100-binary"),
    num_classes=100,
    train_files=("train",),
    images_per_file=50_000,
    test_file="test",
    test_images=10_000,
    label_key="fine_labels",
    label_bytes=2,
    names=("meta", "fine_label_names", "fine_label_names.txt"),
    mean=(0.5071, 0.4867, 0.4408),
    std=(0.2675, 0.2565, 0.2761),
)


def _images_and_labels(member: Member, python: bool, layout: CifarFormat, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Images [count, 3072] and labels [count] of one file, checked."""
    if python:
        content = _unpickled(member)
        pixels, entries = content.get("data"), content.get(layout.label_key)
        if not isinstance(pixels, np.ndarray) or pixels.shape[1] != _IMAGE_BYTES:
            raise member.error(f"has no images of {_IMAGE_BYTES} bytes; get the file again")
        if not isinstance(entries, list) or not all(type(entry) is int and 0 <= entry < 256 for entry in entries):
            raise member.error(f"has no labels from 0 to {layout.num_classes - 1}; get the file again")
        labels = np.array(entries, dtype=np.uint8)
    else:
        records = np.frombuffer(member.read(), dtype=np.uint8)
        record = layout.label_bytes + _IMAGE_BYTES
        if len(records) % record:
            raise member.error(f"has {len(records)} bytes, no multiple of the {record} an image takes; get it again")
        records = records.reshape(-1, record)
        pixels, labels = records[:, layout.label_bytes :], records[:, layout.label_bytes - 1]
    if not len(pixels) == len(labels) == count:
        raise member.error(f"has {len(pixels)} images and {len(labels)} labels, expected {count}; get it again")
    if labels.max() >= layout.num_classes:
        raise member.error(f"has the label {labels.max()}, the largest is {layout.num_classes - 1}; get it again")
    return pixels, labels


def _class_names(member: Member, python: bool, layout: CifarFormat) -> tuple[str, ...]:
    if python:
        entries = _unpickled(member).get(layout.names[1])
        strings = [entry for entry in entries if isinstance(entry, (str, bytes))] if isinstance(entries, list) else []
        names = [entry if isinstance(entry, str) else entry.decode("ascii", errors="replace") for entry in strings]
    else:
        names = member.read().decode("ascii", errors="replace").split()
    if len(set(names)) != layout.num_classes or len(names) != layout.num_classes:
        raise member.error(f"has {len(names)} names of classes, expected {layout.num_classes}; get the file again")
    return tuple(names)


def _unpickled(member: Member) -> dict[str, Any]:
    try:
        return read_cifar_pickle(member.read())
    except ValueError as error:
        raise member.error(f"cannot be used: {error}; get the file again from its publisher") from error


def load_cifar(path: str | Path, layout: CifarFormat, *, train: bool = True, verify: bool = True) -> ImageSet:
    """Read one split of CIFAR-10 or CIFAR-100; see load_cifar10."""
    archives = [DOWNLOADS[name] for name in layout.downloads]
    candidates = [*layout.folders, *(archive.file_name for archive in archives)]
    remedy = f"get one with latephase_kernels.data.download({layout.downloads[1]!r}, folder), from {archives[1].url}"
    source = find_data(path, candidates, remedy)
    python = candidates.index(source.name) % 2 == 0
    if verify and source.is_file():
        archives[0 if python else 1].check(source)

    ending = "" if python else ".bin"
    files: Sequence[str] = layout.train_files if train else (layout.test_file,)
    count = layout.images_per_file if train else layout.test_images
    rows = {file + ending: slice(number * count, (number + 1) * count) for number, file in enumerate(files)}
    names_file = layout.names[0 if python else 2]
    images = np.empty((len(files) * count, _IMAGE_BYTES), dtype=np.uint8)
    labels = np.empty(len(images), dtype=np.int64)
    classes: tuple[str, ...] = ()
    missing = {*rows, names_file}
    for member in iterate_members(source, lambda name: PurePosixPath(name).name in {*rows, names_file}, _LIMITS):
        file = PurePosixPath(member.name).name
        if file not in missing:
            raise member.error(f"is a second {file}; get the file again from its publisher")
        missing.remove(file)
        if file == names_file:
            classes = _class_names(member, python, layout)
        else:
            images[rows[file]], labels[rows[file]] = _images_and_labels(member, python, layout, count)
    if missing:
        raise ValueError(f"{source} lacks {', '.join(sorted(missing))}; get {layout.name} again: {archives[1].url}")
    shaped = torch.from_numpy(images).view(-1, *_IMAGE_SHAPE)
    return ImageSet(shaped, torch.from_numpy(labels), classes, layout.mean, layout.std)


def load_cifar10(path: str | Path, *, train: bool = True, verify: bool = True) -> ImageSet:
    """Read CIFAR-10's 50,000 training or 10,000 test images.

    Args:
        path: the official archive (cifar-10-python.tar.gz or cifar-10-binary.tar.gz), the folder made of it
            (cifar-10-batches-py or cifar-10-batches-bin), or a folder that holds one of these.
        train: the training images, in the order of the five files; else the test images.
        verify: compare an archive's MD5 with the published one first. (Nobody publishes any for the folders.)

    Returns:
        images [N, 3, 32, 32] uint8, labels [N] int64 from 0 to 9, ten class names, and the recipes' mean and std.

    Raises:
        FileNotFoundError: there is no such data; the text says how to get it.
        ValueError: it is damaged, incomplete or not CIFAR-10; nothing in it is executed in any case.
        OSError: it cannot be read.
    """
    return load_cifar(path, CIFAR10, train=train, verify=verify)


def load_cifar100(path: str | Path, *, train: bool = True, verify: bool = True) -> ImageSet:
    """Read CIFAR-100's images with their fine labels (0 to 99); everything else as load_cifar10.

    The archives are cifar-100-python.tar.gz and cifar-100-binary.tar.gz, the folders cifar-100-python and
    cifar-100-binary.
    """
    return load_cifar(path, CIFAR100, train=train, verify=verify)
