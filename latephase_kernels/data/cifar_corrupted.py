"""CIFAR-10-C and CIFAR-100-C: the CIFAR test images, corrupted in 19 ways at 5 severities.

Source: D. Hendrycks and T. Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", ICLR 2019; https://zenodo.org/records/2535967 and https://zenodo.org/records/3555552, CC BY 4.0.
"""

from pathlib import Path, PurePosixPath

import numpy as np
import torch

from .archives import Limits, Member, iterate_members
from .cifar import CIFAR10, CIFAR100, CifarFormat
from .downloads import DOWNLOADS, how_to_get
from .files import ArchiveError, find_data
from .sets import ImageSet

# The fifteen of the benchmark, and the four meant for validation.
CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
EXTRA_CORRUPTIONS = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
NUM_SEVERITIES = 5
_NUM_IMAGES = 10_000  # at each severity
_IMAGE_SHAPE = (32, 32, 3)
_LIMITS = Limits(member_bytes=1 << 28, total_bytes=1 << 33, members=100)


def _read_rows(member: Member, row_shape: tuple[int, ...], rows: range, num_rows: int) -> np.ndarray:
    """Some rows of an .npy file of bytes [num_rows, *row_shape]; its header holds plain values, objects are refused."""
    try:
        version = np.lib.format.read_magic(member)  # type: ignore[arg-type]
        if version != (1, 0):
            raise ValueError(f"its format is version {version}")
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(member)  # type: ignore[arg-type]
    except ArchiveError:
        raise
    except ValueError as error:
        raise member.error(f"is no .npy file as CIFAR-C has ({error!s:.100}); get the archive again") from error
    if shape != (num_rows, *row_shape) or is_fortran or dtype != np.uint8:
        raise member.error(f"holds {dtype!s:.40} of shape {shape!s:.100}, expected uint8 {(num_rows, *row_shape)}")
    row_bytes = int(np.prod(row_shape, dtype=np.int64))
    member.skip(rows.start * row_bytes)
    return np.frombuffer(bytearray(member.read(len(rows) * row_bytes)), dtype=np.uint8).reshape(len(rows), *row_shape)


def _load(path: str | Path, layout: CifarFormat, corruption: str, severity: int, verify: bool) -> ImageSet:
    known = (*CORRUPTIONS, *EXTRA_CORRUPTIONS)
    if corruption not in known:
        raise ValueError(f"corruption must be one of {', '.join(known)}, got {corruption!r}")
    if severity not in range(1, NUM_SEVERITIES + 1):
        raise ValueError(f"severity must be from 1 to {NUM_SEVERITIES}, got {severity!r}")
    name = f"{layout.name.lower()}-c"
    archive = DOWNLOADS[name]
    source = find_data(path, [f"{layout.name}-C", archive.file_name], how_to_get(name))
    if verify and source.is_file():
        archive.check(source)
    rows, num_rows = range((severity - 1) * _NUM_IMAGES, severity * _NUM_IMAGES), NUM_SEVERITIES * _NUM_IMAGES
    shapes = {f"{corruption}.npy": _IMAGE_SHAPE, "labels.npy": ()}
    found: dict[str, np.ndarray] = {}
    for member in iterate_members(source, lambda file: PurePosixPath(file).name in shapes, _LIMITS):
        file = PurePosixPath(member.name).name
        found[file] = _read_rows(member, shapes[file], rows, num_rows)
        if len(found) == len(shapes):
            break
    missing = [file for file in shapes if file not in found]
    if missing:
        raise ArchiveError(f"{source} lacks {', '.join(missing)}; get it again: {archive.url}")
    images, labels = found[f"{corruption}.npy"], found["labels.npy"]
    if labels.max() >= layout.num_classes:
        raise ArchiveError(f"{source} has labels above {layout.num_classes - 1}; get it again: {archive.url}")
    shaped = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return ImageSet(shaped, torch.from_numpy(labels).long(), (), layout.mean, layout.std)


def load_cifar10_c(path: str | Path, corruption: str, severity: int, *, verify: bool = False) -> ImageSet:
    """Read the 10,000 test images of CIFAR-10 with one corruption at one severity.

    Args:
        path: CIFAR-10-C.tar, the folder CIFAR-10-C made of it, or a folder that holds one of these.
        corruption: one of CORRUPTIONS, or of the EXTRA_CORRUPTIONS.
        severity: 1 … 5.
        verify: compare the archive's MD5 with the published one first: some seconds, so once rather than each time.

    Returns:
        images [10000, 3, 32, 32] uint8, labels [10000] int64, CIFAR-10's mean and std; no class names.

    Raises:
        FileNotFoundError: there is no such data; the text says how to get it.
        ValueError: an unknown corruption or severity; the data is damaged, incomplete or something else.
        OSError: it cannot be read.

    Cost:
        The archive is not unpacked; 31 MB are read.
    """
    return _load(path, CIFAR10, corruption, severity, verify)


def load_cifar100_c(path: str | Path, corruption: str, severity: int, *, verify: bool = False) -> ImageSet:
    """Read CIFAR-100's test images, corrupted, from CIFAR-100-C.tar or CIFAR-100-C; see load_cifar10_c."""
    return _load(path, CIFAR100, corruption, severity, verify)
