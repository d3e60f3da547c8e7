"""Members of tar and zip archives and of folders, read one at a time into memory.

Nothing is extracted to the disk and nothing is executed; links and devices are never followed. Sizes are limited as
declared and as read, so that a small archive cannot fill the memory.
"""

import gzip
import os
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from .files import ArchiveError, named, named_errors

_CHUNK = 1 << 20
_HEADER_BYTES = 1 << 16  # of one member of a tar archive, with its extended headers
_ZIP_UNIX = 3  # the system of a zip entry whose external attributes hold Unix file types


@dataclass(frozen=True)
class Limits:
    """What an archive may hold before it is refused.

    Attributes:
        member_bytes: size of one member that is read.
        total_bytes: size of the decompressed archive.
        members: their number, directories and ignored ones included.
    """

    member_bytes: int
    total_bytes: int
    members: int = 10_000


class Member:
    """One file of an archive or folder, to be read front to back before the next one is asked for.

    Attributes:
        name: with forward slashes, without a leading "./".
        size: bytes, as declared.
        offset: where they begin: in a plain tar archive, counted from the archive's start.
    """

    def __init__(self, path: Path, name: str, size: int, stream: IO[bytes]):
        self.name, self.size, self.offset = name, size, stream.tell()
        self._path, self._stream, self._left = path, stream, size

    def error(self, what: str) -> ArchiveError:
        """Return an error that names the archive and this member; `what` completes "… member 'x' ⟨what⟩"."""
        return ArchiveError(f"{named(self._path, self.name)} {what}")

    def read(self, size: int | None = None) -> bytes:
        """Return the next `size` bytes, or all that is left.

        Raises:
            ArchiveError: there are fewer, or the archive is damaged.
            OSError: the file cannot be read.
        """
        size = self._left if size is None else size
        self._check_left(size)
        chunks = []
        with named_errors(self._path, self.name):
            while size:
                chunk = self._stream.read(min(size, _CHUNK))
                if not chunk:
                    raise self.error(f"is cut off {size} bytes before its end; get the file again")
                chunks.append(chunk)
                size -= len(chunk)
                self._left -= len(chunk)
        return b"".join(chunks)

    def skip(self, size: int) -> None:
        """Pass over the next `size` bytes; raises as `read` does, or the next `read` will."""
        self._check_left(size)
        with named_errors(self._path, self.name):
            self._stream.seek(size, os.SEEK_CUR)
        self._left -= size

    def _check_left(self, size: int) -> None:
        if size > self._left:
            raise self.error(f"ends {size - self._left} bytes early; get the file again")


class _HeaderReader:
    """What tarfile may do with a stream: go forwards, up to a limit, and read headers of a reasonable size.

    tarfile keeps extended headers in memory, whatever size they claim; and headers with forged sizes can send it back
    to where it was, forever. Both end here.
    """

    def __init__(self, path: Path, stream: IO[bytes], limit: int):
        self._path, self._stream, self._limit = path, stream, limit
        self.budget = _HEADER_BYTES  # of the next member
        self.last = b""  # what was read last

    def tell(self) -> int:
        return self._stream.tell()

    def read(self, size: int) -> bytes:
        self.budget -= size
        if size < 0 or self.budget < 0:
            raise ArchiveError(f"{self._path} has headers of absurd size; get the file again from its publisher")
        self.last = self._stream.read(size)
        return self.last

    def seek(self, position: int) -> None:
        if position < self._stream.tell():
            raise ArchiveError(f"{self._path} has a header that points back; get the file again from its publisher")
        if position > self._limit:
            raise ArchiveError(
                f"{self._path} holds more than {self._limit} bytes, decompressed; it is not the file expected here"
            )
        self._stream.seek(position)


class _Entries:
    """Checks every entry of one archive: their number, names and, for wanted ones, size and uniqueness."""

    def __init__(self, path: Path, wanted: Callable[[str], bool], limits: Limits):
        self.path, self.wanted, self.limits = path, wanted, limits
        self.count = self.total = 0
        self.seen: set[str] = set()

    def admit(self, name: str, size: int, is_file: bool, is_directory: bool) -> str | None:
        """Return the entry's plain name if it shall be read, None if it is to be passed over."""
        self.count += 1
        if self.count > self.limits.members:
            raise ArchiveError(
                f"{self.path} holds more than {self.limits.members} members; it is not the file expected"
            )
        plain = name.replace("\\", "/")
        while plain.startswith("./"):
            plain = plain[2:]
        if plain.startswith("/") or plain[1:2] == ":" or ".." in plain.split("/"):
            raise ArchiveError(
                f"{named(self.path, name)} points outside of the archive; do not use or extract this file"
            )
        if size < 0:
            raise ArchiveError(f"{named(self.path, name)} declares {size} bytes; get the archive again")
        if is_directory or not self.wanted(plain):
            return None
        if not is_file:
            raise ArchiveError(f"{named(self.path, name)} is a link or a device, not a file; get the archive again")
        if plain in self.seen:
            raise ArchiveError(f"{named(self.path, name)} is there twice; get the archive again")
        self.seen.add(plain)
        self.total += size
        if size > self.limits.member_bytes or self.total > self.limits.total_bytes:
            raise ArchiveError(
                f"{named(self.path, name)} declares {size} bytes, more than the {self.limits.member_bytes} a member, "
                f"{self.limits.total_bytes} in all, that are allowed here; it is not the file expected"
            )
        return plain


def _tar_members(path: Path, entries: _Entries, compressed: bool) -> Iterator[Member]:
    with open(path, "rb") as raw:
        stream: Any = gzip.GzipFile(fileobj=raw) if compressed else raw
        reader: Any = _HeaderReader(path, stream, entries.limits.total_bytes)
        archive: Any = tarfile.open(fileobj=reader, mode="r:")
        with archive as tar:
            for info in tar:
                tar.members.clear()  # else every header stays in memory
                name = entries.admit(info.name, info.size, info.isreg() and not info.issparse(), info.isdir())
                if name is not None:
                    reader.seek(info.offset_data)
                    yield Member(path, name, info.size, stream)
                reader.budget = _HEADER_BYTES
        if reader.last.strip(b"\0"):  # tarfile takes a header that it cannot read for the archive's end
            raise ArchiveError(f"{path} has a damaged header behind its member {entries.count}; get the file again")
        while compressed and stream.read(_CHUNK):  # up to the checksum, which stands at the end
            reader.seek(stream.tell())


def _zip_members(path: Path, entries: _Entries) -> Iterator[Member]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16) if info.create_system == _ZIP_UNIX else 0
            name = entries.admit(info.filename, info.file_size, kind in (0, stat.S_IFREG), info.is_dir())
            if name is not None:
                if info.compress_type not in (
                    zipfile.ZIP_STORED,
                    zipfile.ZIP_DEFLATED,
                ):  # the others may need gigabytes
                    raise ArchiveError(f"{named(path, name)} is not stored or deflated; make the archive again so")
                with archive.open(info) as stream:
                    yield Member(path, name, info.file_size, stream)


def _folder_members(path: Path, entries: _Entries) -> Iterator[Member]:
    for folder, subfolders, files in os.walk(path, onerror=_raise):
        subfolders.sort()
        for file in sorted(files):
            location = Path(folder, file)
            is_file = location.is_file()  # a link to a file counts: in a folder it is the user's own
            size = location.stat().st_size if is_file else 0
            name = entries.admit(location.relative_to(path).as_posix(), size, is_file, is_directory=False)
            if name is not None:
                with open(location, "rb") as stream:
                    yield Member(path, name, size, stream)


def _raise(error: OSError) -> None:
    raise error


def iterate_members(path: str | Path, wanted: Callable[[str], bool], limits: Limits) -> Iterator[Member]:
    """Yield the wanted files of an archive (tar, tar.gz or zip, told by content) or of a folder, in stored order.

    A folder's files come sorted. Members that are not wanted are passed over.

    Args:
        path: the archive or folder.
        wanted: told a member's name, with forward slashes; says whether it shall be read.
        limits: what may be in there.

    Raises:
        ArchiveError: damage; more than the limits allow, declared or in fact; any name that is absolute or contains
            "..", even of an unwanted member; a wanted member that is a link or a device, or is there twice.
        OSError: the file cannot be read.
    """
    path = Path(path)
    entries = _Entries(path, wanted, limits)
    with named_errors(path):
        if path.is_dir():
            yield from _folder_members(path, entries)
            return
        with open(path, "rb") as file:
            magic = file.read(4)
        if magic == b"PK\x03\x04":
            yield from _zip_members(path, entries)
        else:
            yield from _tar_members(path, entries, compressed=magic[:2] == b"\x1f\x8b")
