"""The test images of Street View House Numbers, with a reader of just the one kind of MATLAB file they come in.

A version 5 file is a header and a row of elements, each a type, a length and data. Here each element is one array,
usually compressed with zlib. Nothing else (cells, structures, objects, functions) is read.

Source: Y. Netzer et al., "Reading Digits in Natural Images with Unsupervised Feature Learning", 2011;
http://ufldl.stanford.edu/housenumbers, for non-commercial use. Format: MathWorks, "MAT-File Format", Level 5.
"""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from .downloads import DOWNLOADS, how_to_get
from .files import ArchiveError, find_data
from .sets import ImageSet

_NUM_TEST_IMAGES = 26_032
_MAX_BYTES = 1 << 27  # of the file, and of each array in it: X has 80 MB

_HEADER_BYTES = 128
_VERSION_5_LITTLE_ENDIAN = b"\x00\x01IM"
_INT8, _INT32, _UINT32, _MATRIX, _COMPRESSED = 1, 5, 6, 14, 15
_NUMBERS = {1: "i1", 2: "u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 9: "<f8"}
_COMPLEX = 0x800
_DOUBLE_CLASS, _UINT8_CLASS = 6, 9  # MATLAB stores doubles that are small integers as bytes


def _elements(content: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The types and data of the elements of a file, or of a matrix."""
    position = 0
    while position < len(content):
        kind, size = struct.unpack_from("<II", content, position)
        if kind >> 16:  # up to four bytes stand in the tag itself
            kind, size, start, end = kind & 0xFFFF, kind >> 16, position + 4, position + 8
        else:
            start, end = position + 8, position + 8 + size
        if start + size > min(end, len(content)):
            raise ValueError("an element is longer than what holds it")
        yield kind, content[start : start + size]
        position = end if kind == _COMPRESSED else end + -end % 8


def _decompress(data: memoryview) -> memoryview:
    stream = zlib.decompressobj()
    content = stream.decompress(data, _MAX_BYTES)
    if not stream.eof:
        raise ValueError(f"an array is cut off, or has more than {_MAX_BYTES} bytes")
    return memoryview(content)


def _matrix(content: memoryview) -> tuple[str, np.ndarray | None]:
    """A variable's name, and its value if it is a real array of bytes or doubles."""
    (flags_kind, flags), (shape_kind, shape), (name_kind, name), *rest = _elements(content)
    if (flags_kind, shape_kind, name_kind) != (_UINT32, _INT32, _INT8) or len(flags) != 8 or len(shape) % 4:
        raise ValueError("an array's header is not as it should be")
    (flag_bits,) = struct.unpack_from("<I", flags)
    title = bytes(name).decode("ascii", errors="replace")
    if flag_bits & 0xFF not in (_DOUBLE_CLASS, _UINT8_CLASS) or flag_bits & _COMPLEX or len(rest) != 1:
        return title, None
    number_kind, numbers = rest[0]
    values = np.frombuffer(numbers, dtype=_NUMBERS[number_kind])
    return title, values.reshape(struct.unpack(f"<{len(shape) // 4}i", shape), order="F")


def _read_variables(content: bytes) -> dict[str, np.ndarray]:
    if content[_HEADER_BYTES - 4 : _HEADER_BYTES] != _VERSION_5_LITTLE_ENDIAN:
        raise ValueError("it is no MATLAB file of version 5")
    variables = {}
    for kind, data in _elements(memoryview(content)[_HEADER_BYTES:]):
        for inner_kind, inner in _elements(_decompress(data)) if kind == _COMPRESSED else [(kind, data)]:
            if inner_kind == _MATRIX:
                name, values = _matrix(inner)
                if values is not None and name in ("X", "y"):  # others may be many, and large
                    variables[name] = values
    return variables


def load_svhn(path: str | Path, *, verify: bool = True) -> ImageSet:
    """Read SVHN's 26,032 test images.

    Args:
        path: test_32x32.mat, or a folder that holds it.
        verify: compare the MD5 with the known one first.

    Returns:
        images [26032, 3, 32, 32] uint8; labels [26032] int64, 0 to 9, the digits (the file says 10 for 0). No mean
        and std: here the set serves to test networks that were trained on another one.

    Raises:
        FileNotFoundError: there is no such data; the text says how to get it.
        ValueError: it is damaged or something else.
        OSError: it cannot be read.
    """
    file = DOWNLOADS["svhn-test"]
    source = find_data(path, [file.file_name], how_to_get("svhn-test"))
    if verify:
        file.check(source)
    with open(source, "rb") as stream:
        content = stream.read(_MAX_BYTES)
    try:
        variables = _read_variables(content)
    except (ValueError, KeyError, struct.error, zlib.error) as error:
        raise ArchiveError(f"{source} cannot be read as SVHN's file ({error!s:.100}); get it again") from error
    pixels, numbers = variables.get("X"), variables.get("y")
    shape = (32, 32, 3, _NUM_TEST_IMAGES)
    if pixels is None or pixels.shape != shape or pixels.dtype != np.uint8:
        raise ArchiveError(f"{source} has no images X of bytes {shape}; get it again: {file.url}")
    if numbers is None or numbers.shape != (_NUM_TEST_IMAGES, 1) or not np.isin(numbers, np.arange(1, 11)).all():
        raise ArchiveError(f"{source} has no labels y from 1 to 10, one an image; get it again: {file.url}")
    images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(3, 2, 0, 1)))
    labels = torch.from_numpy(numbers[:, 0].astype(np.int64) % 10)
    return ImageSet(images, labels, tuple("0123456789"))
