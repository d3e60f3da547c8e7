"""From a file's bytes to the pixels a network sees, on the CPU; and what a GPU's decoder must be told of a JPEG."""

import io
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from .files import ArchiveError
from .image_crops import Box, central_box, random_resized_crop, resized_shape

# JPEG markers: start and end of image; the frame headers, of which SOF0 is baseline; those without a length.
_START, _END, _SCAN, _BASELINE, _EXIF, _ADOBE = 0xD8, 0xD9, 0xDA, 0xC0, 0xE1, 0xEE
_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
_ALONE = frozenset({0x01, *range(0xD0, 0xD8)})


class CorruptImage(ArchiveError):
    """A file that is no image, or a damaged one. Its text names the file."""


def imaging() -> Any:
    """Return Pillow's Image module, all its formats loaded.

    Raises:
        ImportError: Pillow is missing.
    """
    try:
        from PIL import Image
    except ModuleNotFoundError:
        raise ImportError("images on the disk need Pillow; pip install 'latephase_kernels[train]'") from None
    Image.init()  # now and here: workers that are forked later have them loaded
    return Image


def _opened(content: bytes, name: str) -> Any:
    """Return a Pillow image whose size is known and whose pixels are still to be decoded."""
    try:
        return imaging().open(io.BytesIO(content))
    except ImportError:
        raise
    except Exception as error:  # each format has its own for damaged headers
        raise _corrupt(name, error) from None


def _corrupt(name: str, error: Exception) -> CorruptImage:
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, imaging().UnidentifiedImageError):  # whose text is of the buffer
        reason = "of no known format"
    return CorruptImage(f"{name} is no image or damaged ({reason[:200]})")


def training_pixels(content: bytes, name: str, random: np.random.Generator, size: int) -> np.ndarray:
    """Return a random-resized-crop: what torchvision's makes of the same box, but for very large images.

    Where the box is twice the size or more, the JPEG is decoded at ½, ¼ or ⅛ of its resolution, which is faster.

    Args:
        content: an encoded image.
        name: for errors.
        random: see sample_generator.
        size: of the result.

    Returns:
        [size, size, 3] uint8.

    Raises:
        CorruptImage: it cannot be decoded.
    """
    image = _opened(content, name)
    width, height = image.size
    top, left, box_height, box_width = random_resized_crop(random, height, width)
    bilinear = imaging().Resampling.BILINEAR
    try:
        reduction = min(box_height, box_width) // size
        if reduction >= 2 and image.format == "JPEG":
            image.draft("RGB", (width // reduction, height // reduction))
        across, down = image.size[0] / width, image.size[1] / height
        pixels = image.convert("RGB")
        if pixels.size == (width, height):
            cropped = pixels.crop((left, top, left + box_width, top + box_height))
            return np.asarray(cropped.resize((size, size), bilinear))
        box = left * across, top * down, (left + box_width) * across, (top + box_height) * down
        return np.asarray(pixels.resize((size, size), bilinear, box))
    except Exception as error:
        raise _corrupt(name, error) from None


def validation_pixels(content: bytes, name: str, resize: int, size: int) -> np.ndarray:
    """Return the middle of the image resized so that its shorter side is `resize`: bit for bit torchvision's pixels.

    Args:
        content: an encoded image.
        name: for errors.
        resize: pixels of the shorter side.
        size: of the result.

    Returns:
        [size, size, 3] uint8.

    Raises:
        CorruptImage: it cannot be decoded.
    """
    image = _opened(content, name)
    try:
        pixels = image.convert("RGB")
        height, width = resized_shape(pixels.height, pixels.width, resize)
        pixels = pixels.resize((width, height), imaging().Resampling.BILINEAR)
        top, left, _, _ = central_box(height, width, size)
        return np.asarray(pixels.crop((left, top, left + size, top + size)))
    except Exception as error:
        raise _corrupt(name, error) from None


@dataclass(frozen=True)
class JpegForGpu:
    """A JPEG that a GPU's decoder reads as a CPU's does.

    Attributes:
        box: of its pixels to be seen.
        exif: where the markers of its EXIF segments stand; one that turns the image must not be seen.
    """

    box: Box
    exif: tuple[int, ...]


def jpeg_for_gpu(content: bytes, random: np.random.Generator) -> JpegForGpu | None:
    """Return what a GPU must be told for a random-resized-crop; None for what the CPU had better decode.

    That is what is no JPEG, not baseline, in other colours than YCbCr or grey, or not whole.
    """
    header = _frame(content)
    if header is None:
        return None
    (height, width), exif = header
    return JpegForGpu(random_resized_crop(random, height, width), exif)


def _frame(content: bytes) -> tuple[tuple[int, int], tuple[int, ...]] | None:
    """Height, width and EXIF markers of a whole baseline JPEG in YCbCr or grey, or None."""
    if content[:2] != bytes((0xFF, _START)) or content.rstrip(b"\0")[-2:] != bytes((0xFF, _END)):
        return None
    position, shape, components = 2, None, 0
    exif: list[int] = []
    try:
        while True:
            prefix, marker = struct.unpack_from(">BB", content, position)
            if prefix != 0xFF:
                return None
            if marker == 0xFF or marker in _ALONE:  # padding, or a marker without a segment
                position += 1 if marker == 0xFF else 2
                continue
            if marker == _SCAN:
                return (shape, tuple(exif)) if shape and components in (1, 3) else None
            (length,) = struct.unpack_from(">H", content, position + 2)
            if marker in _FRAMES:
                precision, height, width, components = struct.unpack_from(">BHHB", content, position + 4)
                if marker != _BASELINE or precision != 8 or not height or not width:
                    return None
                if content[position + 10 : position + 19 : 3] == b"RGB":  # the components' names
                    return None
                shape = height, width
            elif marker == _EXIF:
                exif.append(position + 1)
            elif marker == _ADOBE and content[position + 4 : position + 9] == b"Adobe" and not content[position + 15]:
                return None  # its components are RGB or CMYK as they are
            position += 2 + length
    except (struct.error, IndexError):
        return None
