"""LSUN (resized) and Tiny-ImageNet (resized), 10,000 pictures each of 32 × 32 pixels, for out-of-distribution tests.

Source: S. Liang, Y. Li and R. Srikant, "Enhancing The Reliability of Out-of-distribution Image Detection in Neural
Networks", ICLR 2018; https://github.com/facebookresearch/odin has the links. They have moved before, and the
publisher gives no checksums: those below are what other libraries expect.
"""

import io
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from .archives import Limits, Member, iterate_members
from .files import ArchiveError, check_digest, find_data
from .sets import ImageSet

_NUM_IMAGES = 10_000
_SIZE = (32, 32)
_ENDINGS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
_LIMITS = Limits(member_bytes=1 << 20, total_bytes=1 << 30, members=100_000)


@dataclass(frozen=True)
class _Pictures:
    folder: str
    md5: str

    @property
    def archive(self) -> str:
        return f"{self.folder}.tar.gz"


_LSUN = _Pictures("LSUN_resize", "278b7b31c8cb7e804a1465a8ce03a2dc")
_TINY_IMAGENET = _Pictures("Imagenet_resize", "0f9ff11d45babf2eff5fe12281d1ac31")


def _is_picture(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in _ENDINGS and not path.name.startswith(".")  # macOS adds hidden companions


def _decode(member: Member) -> np.ndarray:
    """[32, 32, 3] uint8; the size is compared before anything is decoded."""
    from PIL import Image

    kind = _ENDINGS[PurePosixPath(member.name).suffix.lower()]
    content = member.read()
    try:
        with Image.open(io.BytesIO(content), formats=[kind]) as picture:
            if picture.size != _SIZE:
                raise member.error(f"has {picture.width} × {picture.height} pixels, expected 32 × 32; get it again")
            return np.asarray(picture.convert("RGB"))
    except ArchiveError:
        raise
    except Exception as error:  # whatever a decoder stumbles over
        raise member.error(f"is no {kind} picture or damaged ({error!s:.100}); get the file again") from error


def _load(path: str | Path, pictures: _Pictures, verify: bool) -> ImageSet:
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise ImportError("reading pictures needs Pillow; install latephase_kernels[train] or pillow") from error
    remedy = (
        f"https://github.com/facebookresearch/odin links to {pictures.archive}: put it into that folder, as it is "
        f"or unpacked as {pictures.folder}"
    )
    source = find_data(path, [pictures.folder, pictures.archive], remedy)
    if verify and source.is_file():
        check_digest(source, "md5", pictures.md5)
    named = [(member.name, _decode(member)) for member in iterate_members(source, _is_picture, _LIMITS)]
    if len(named) != _NUM_IMAGES:
        raise ArchiveError(f"{source} holds {len(named)} pictures, expected {_NUM_IMAGES}; {remedy}")
    images = np.stack([image for _, image in sorted(named, key=lambda entry: entry[0])])
    shaped = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return ImageSet(shaped, torch.full((len(images),), -1), ())


def load_lsun_resized(path: str | Path, *, verify: bool = True) -> ImageSet:
    """Read LSUN (resized).

    Args:
        path: LSUN_resize.tar.gz, the folder LSUN_resize made of it, or a folder that holds one of these.
        verify: compare an archive's MD5 with the known one first.

    Returns:
        images [10000, 3, 32, 32] uint8, sorted by name; labels −1; no classes, mean or std.

    Raises:
        FileNotFoundError: there is no such data; the text says how to get it.
        ValueError: it is damaged, incomplete or something else.
        OSError: it cannot be read.
        ImportError: Pillow is missing.
    """
    return _load(path, _LSUN, verify)


def load_tiny_imagenet_resized(path: str | Path, *, verify: bool = True) -> ImageSet:
    """Read Tiny-ImageNet (resized) from Imagenet_resize.tar.gz or Imagenet_resize; see load_lsun_resized."""
    return _load(path, _TINY_IMAGENET, verify)
