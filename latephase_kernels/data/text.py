"""Text, byte by byte: enwik8, any file, and a text that comes with Python.

Source of enwik8: the first 10⁸ bytes of the English Wikipedia of March 3, 2006, prepared by M. Mahoney
(http://mattmahoney.net/dc/textdata.html); Wikipedia's text is under CC BY-SA and GFDL.
"""

import sysconfig
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import torch

from .archives import Limits, iterate_members
from .downloads import DOWNLOADS, how_to_get
from .files import ArchiveError, check_digest, find_data
from .sets import TextSet

ENWIK8_BYTES = 100_000_000
_ENWIK8_MD5 = "a1fa5ffddb56f4953e226637dabbb36a"
_ARCHIVE = DOWNLOADS["enwik8"]
_FILES = ("enwik8", _ARCHIVE.file_name)
# Single files with much prose in them, in every Python from 3.10 on.
PYTHON_MODULES = (
    *("argparse", "ast", "configparser", "dataclasses", "difflib", "doctest", "enum", "functools", "inspect"),
    *("pickle", "statistics", "subprocess", "tarfile", "typing"),
)


def split_text(content: bytes) -> TextSet:
    """Split a text: the first 90 % train, the next 5 % validation, the rest test; for enwik8 90, 5 and 5 million bytes.

    Args:
        content: at least 20 bytes.

    Returns:
        The three parts in symbols 0 … V − 1, one for each distinct byte of the whole text.

    Raises:
        ValueError: the text is too short.
    """
    return split_texts([content])


def split_texts(texts: Sequence[bytes]) -> TextSet:
    """Split each of several texts as split_text does, and join the parts: all three are then of the same mixture.

    Raises:
        ValueError: a text is shorter than 20 bytes, or there is none.
    """
    shortest = min(map(len, texts), default=0)
    if shortest < 20:
        raise ValueError(f"split_text: content must have at least 20 bytes, got {shortest}; give a longer text")
    whole = b"".join(texts)
    vocabulary = bytes(value for value in range(256) if value in whole)
    symbols = bytearray(256)
    for symbol, value in enumerate(vocabulary):
        symbols[value] = symbol
    parts: tuple[list[bytes], list[bytes], list[bytes]] = ([], [], [])
    for text in texts:
        training, held_out = len(text) * 9 // 10, len(text) // 20
        ends = (0, training, training + held_out, len(text))
        for part, start, end in zip(parts, ends, ends[1:]):
            part.append(text[start:end].translate(bytes(symbols)))
    train, validation, test = (torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8) for part in parts)
    return TextSet(train, validation, test, vocabulary)


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
    remedy = how_to_get("enwik8")
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
            _ARCHIVE.check(source)
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


def load_python_text() -> TextSet:
    """Return a real text that needs no download: 1.6 MB of Python's own documentation and sources.

    It is the topics of help() (`pydoc_data.topics`, half a megabyte of English, sorted by name), then the source files
    of PYTHON_MODULES, each text split 90 : 5 : 5. All come with Python (Python Software Foundation License) and differ
    a little from version to version: compare figures under one version only.

    Raises:
        FileNotFoundError: this Python was installed without some of it.
    """
    remedy = "install its full standard library, or give another text to load_text"
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise FileNotFoundError(f"load_python_text: this Python has no pydoc_data.topics; {remedy}") from None
    texts = ["\n\n".join(topics[name].strip() for name in sorted(topics)).encode()]
    folder = Path(sysconfig.get_path("stdlib"))
    for name in PYTHON_MODULES:
        try:
            texts.append((folder / f"{name}.py").read_bytes())
        except OSError as error:
            raise FileNotFoundError(f"load_python_text: cannot read {error.filename}; {remedy}") from None
    return split_texts(texts)
