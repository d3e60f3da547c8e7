"""Files of data sets: where they lie, whether they are the published ones, and errors that name them."""

import hashlib
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_CHUNK = 1 << 20


class ArchiveError(ValueError):
    """An archive or file that is damaged, hostile, or not the one expected. Its text names the file and the remedy."""


def named(path: Path, member: str | None = None) -> str:
    """How an error begins: with the file, and the member of an archive."""
    return f"{path}" if member is None else f"{path}, member {member[:200]!r},"


@contextmanager
def named_errors(path: Path, member: str | None = None) -> Iterator[None]:
    """Turn whatever the standard library raises for bad archives into an ArchiveError with the file's name."""
    try:
        yield
    except ArchiveError:
        raise
    except OSError as error:
        if error.errno is not None:  # of the system; gzip's own have none
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise ArchiveError(f"{named(path, member)} is damaged ({error}); get the file again") from error
    except (
        tarfile.TarError,
        zipfile.BadZipFile,
        zlib.error,
        struct.error,
        EOFError,
        ValueError,
        OverflowError,
        RuntimeError,  # encrypted zip members, unknown compressions, and headers nested until the stack is full
    ) as error:
        reason = str(error) or type(error).__name__
        raise ArchiveError(f"{named(path, member)} is damaged or cannot be read ({reason}); get it again") from error


def check_digest(path: str | Path, algorithm: str, expected: str, size: int | None = None) -> None:
    """Compare a file's size and digest with the published ones.

    Args:
        algorithm: a name that hashlib knows, "md5" or "sha256".
        expected: hexadecimal.
        size: bytes; None where it is not published.

    Raises:
        ArchiveError: they differ.
        OSError: the file cannot be read.
    """
    path = Path(path)
    with named_errors(path):
        actual_size = path.stat().st_size
        if size is not None and actual_size != size:
            raise ArchiveError(f"{path} has {actual_size} bytes, expected {size}; delete it and get it again")
        with open(path, "rb") as file:
            digest = hashlib.new(algorithm, usedforsecurity=False)
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    if digest.hexdigest() != expected:
        raise ArchiveError(
            f"{path} is damaged or another file: its {algorithm} is {digest.hexdigest()}, expected {expected}; delete "
            "it and get it again"
        )


def write_synced(path: Path, content: bytes | memoryview) -> None:
    """Write a file; it is on the disk when this returns, its name after sync_folder."""
    path.write_bytes(content)
    with open(path, "r+b") as file:  # Windows syncs only what may be written
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make a rename durable; not every system lets a folder be opened."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find_data(path: str | Path, candidates: Sequence[str], remedy: str) -> Path:
    """Return the first candidate that lies in the folder `path`, or else `path` itself if it has a candidate's name.

    Raises:
        FileNotFoundError: there is none; the text ends with `remedy`.
    """
    path = Path(path)
    for candidate in candidates:
        if (path / candidate).exists():
            return path / candidate
    if path.name in candidates and path.exists():
        return path
    raise FileNotFoundError(f"{path} is none of {', '.join(candidates)}, and holds none of them; {remedy}")
