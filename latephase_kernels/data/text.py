"""Text, byte by byte: enwik8, any file, and a text that comes with Python.

Source of enwik8: the first 10⁸ bytes of the English Wikipedia of March 3, 2006, prepared by M. Mahoney
(http://mattmahoney.net/dc/textdata.html); Wikipedia's text is under CC BY-SA and GFDL.
"""

from pathlib import Path, PurePosixPath

import torch

from .archives import Limits, iterate_members
from .downloads import DOWNLOADS
from .files import ArchiveError, check_digest, find_data
from .sets import TextSet

ENWIK8_BYTES = 100_000_000
_ENWIK8_MD5 = "a1fa5ffddb56f4953e226637dabbb36a"
_ARCHIVE = DOWNLOADS["enwik8"]
_FILES = ("enwik8", _ARCHIVE.file_name)


def split_text(content: bytes) -> TextSet:
    """Split a text: the first 90 % train, the next 5 % validation, the rest test; for enwik8 90, 5 and 5 million bytes.

    Args:
        content: at least 20 bytes.

    Returns:
        The three parts in symbols 0 … V − 1, one for each distinct byte of the whole text.

    Raises:
        ValueError: the text is too short.
    """
    if len(content) < 20:
        raise ValueError(f"split_text: content must have at least 20 bytes, got {len(content)}; give a longer text")
    vocabulary = bytes(value for value in range(256) if value in content)
    symbols = bytearray(256)
    for symbol, value in enumerate(vocabulary):
        symbols[value] = symbol
    text = torch.frombuffer(bytearray(content.translate(bytes(symbols))), dtype=torch.uint8)
    train, held_out = len(content) * 9 // 10, len(content) // 20
    return TextSet(text[:train], text[train : train + held_out], text[train + held_out :], vocabulary)


def load_enwik8(path: str | Path, *, verify: bool = True) -> TextSet:
    """Read enwik8 with the usual split: 90, 5 and 5 million bytes.

    Args:
        path: enwik8.zip, the file enwik8 that it holds, or a folder with one of them.
        verify: compare digests first: the zip's SHA-256, the text's published MD5.

    Returns:
        The parts in 205 symbols.

    Raises:
        FileNotFoundError: there is no such data; the text says how to get it.
        ValueError: it is damaged or another file.
        OSError: it cannot be read.
    """
    remedy = f'get it with latephase_kernels.data.download("enwik8", folder), from {_ARCHIVE.url}'
    source = find_data(path, _FILES, remedy)
    if source.is_dir():  # many keep it as enwik8/enwik8 or enwik8/enwik8.zip
        source = next((source / name for name in _FILES if (source / name).is_file()), source)
    if source.is_dir():
        raise FileNotFoundError(f"{source} holds none of {', '.join(_FILES)}; {remedy}")
    if source.name == "enwik8":
        if verify:
            check_digest(source, "md5", _ENWIK8_MD5, ENWIK8_BYTES)
        with open(source, "rb") as file:
            content = file.read(ENWIK8_BYTES + 1)
    else:
        if verify:
            check_digest(source, _ARCHIVE.algorithm, _ARCHIVE.digest, _ARCHIVE.size)
        content = _zipped_text(source)
    if len(content) != ENWIK8_BYTES:
        raise ArchiveError(f"{source} holds no text of {ENWIK8_BYTES} bytes, as enwik8 is; get it again")
    return split_text(content)


def _zipped_text(source: Path) -> bytes:
    limits = Limits(member_bytes=ENWIK8_BYTES, total_bytes=ENWIK8_BYTES, members=10)
    for member in iterate_members(source, lambda name: PurePosixPath(name).name == "enwik8", limits):
        return member.read()
    raise ArchiveError(f"{source} holds no file enwik8; get it again: {_ARCHIVE.url}")


def load_text(path: str | Path) -> TextSet:
    """Read any file as text, split 90 : 5 : 5.

    Raises:
        ValueError: it is shorter than 20 bytes.
        OSError: it cannot be read.
    """
    return split_text(Path(path).read_bytes())


def load_python_topics() -> TextSet:
    """Return a real text that needs no download: the topics of Python's own help(), about half a megabyte of English.

    They come with Python (`pydoc_data.topics`, part of its documentation: Python Software Foundation License) and
    differ a little from version to version; compare figures under one version only.

    Returns:
        The topics one after the other, sorted by name, UTF-8, split 90 : 5 : 5.

    Raises:
        FileNotFoundError: this Python was installed without them.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise FileNotFoundError(
            "load_python_topics: this Python has no pydoc_data.topics; install its full standard library, or give "
            "another text to load_text"
        ) from error
    return split_text("\n\n".join(topics[name].strip() for name in sorted(topics)).encode())
