"""Data sets from their publishers: addresses, sizes and checksums, and a download that leaves a whole file or none."""

import errno
import hashlib
import importlib.util
import os
import shutil
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any

from .files import ArchiveError, check_digest, sync_folder

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Download:
    """A file with a public address.

    Attributes:
        url: where it is.
        file_name: how the loaders know it.
        size: bytes.
        algorithm: of the digest.
        digest: hexadecimal; the publisher's where one is given (CIFAR, CIFAR-C), else what other libraries expect.
    """

    url: str
    file_name: str
    size: int
    algorithm: str
    digest: str

    def check(self, path: Path) -> None:
        """Raise ArchiveError unless the file at path has this size and digest; OSError if it cannot be read."""
        check_digest(path, self.algorithm, self.digest, self.size)


def _cifar(version: str, size: int, md5: str) -> Download:
    file_name = f"{version}.tar.gz"
    return Download(f"https://www.cs.toronto.edu/~kriz/{file_name}", file_name, size, "md5", md5)


DOWNLOADS = {
    "cifar-10-python": _cifar("cifar-10-python", 170_498_071, "c58f30108f718f92721af3b95e74349a"),
    "cifar-10-binary": _cifar("cifar-10-binary", 170_052_171, "c32a1d4ab5d03f1284b67883e8d87530"),
    "cifar-100-python": _cifar("cifar-100-python", 169_001_437, "eb9058c3a382ffc7106e4002c42a8d85"),
    "cifar-100-binary": _cifar("cifar-100-binary", 168_513_733, "03b5dce01913d631647c71ecec9e9cb8"),
    "cifar-10-c": Download(
        "https://zenodo.org/records/2535967/files/CIFAR-10-C.tar?download=1",
        "CIFAR-10-C.tar",
        2_918_471_680,
        "md5",
        "56bf5dcef84df0e2308c6dcbcbbd8499",
    ),
    "cifar-100-c": Download(
        "https://zenodo.org/records/3555552/files/CIFAR-100-C.tar?download=1",
        "CIFAR-100-C.tar",
        2_918_473_216,
        "md5",
        "11f0ed0f1191edbf9fa23466ae6021d3",
    ),
    "svhn-test": Download(
        "http://ufldl.stanford.edu/housenumbers/test_32x32.mat",
        "test_32x32.mat",
        64_275_384,
        "md5",
        "eb5a983be6a315427106f1b164d9cef3",
    ),
    # The publisher gives a checksum of the text inside, see text.py, and none of the archive.
    "enwik8": Download(
        "http://mattmahoney.net/dc/enwik8.zip",
        "enwik8.zip",
        36_445_475,
        "sha256",
        "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
    ),
}


# What has no stable public address, or none with a checksum.
_ELSEWHERE = (
    "LSUN_resize.tar.gz and Imagenet_resize.tar.gz have no stable address: https://github.com/facebookresearch/odin "
    "links to them; put them into the data folder as they are"
)


def how_to_get(name: str) -> str:
    """Return what to do where the file of this name, a key of DOWNLOADS, is missing."""
    return f'get it with latephase_kernels.data.download("{name}", folder), from {DOWNLOADS[name].url}'


@contextmanager
def _progress_bar(download: Download, show: bool) -> Iterator[Callable[[int], Any]]:
    """Yield what is to be told of every chunk's size: a bar if it is wanted, tqdm is there and someone looks."""
    bar = None
    if show and sys.stderr.isatty() and importlib.util.find_spec("tqdm") is not None:
        from tqdm import tqdm

        bar = tqdm(total=download.size, unit="B", unit_scale=True, desc=download.file_name)
    try:
        yield bar.update if bar is not None else lambda size: None
    finally:
        if bar is not None:
            bar.close()


@contextmanager
def _network_errors(download: Download) -> Iterator[None]:
    try:
        yield
    except (OSError, HTTPException) as error:
        raise ConnectionError(
            f"download: {download.url} cannot be read ({error or type(error).__name__}); check the network and try "
            f"again, or get {download.file_name} elsewhere and put it into the folder"
        ) from error


def _receive(download: Download, file: IO[bytes], timeout: float, show: bool) -> None:
    """Write the address's content into a file; its size and digest are compared at the end."""
    digest, received = hashlib.new(download.algorithm, usedforsecurity=False), 0
    with _network_errors(download):
        response = urllib.request.urlopen(download.url, timeout=timeout)
    with response, _progress_bar(download, show) as update:
        while True:
            with _network_errors(download):
                # One byte more than expected is enough to know that it is the wrong file.
                chunk = response.read(min(_CHUNK, download.size + 1 - received))
            if not chunk:
                break
            file.write(chunk)
            digest.update(chunk)
            received += len(chunk)
            update(len(chunk))
    if received != download.size or digest.hexdigest() != download.digest:
        amount = f"more than {download.size}" if received > download.size else str(received)
        raise ArchiveError(
            f"download: {download.url} gave {amount} bytes with {download.algorithm} {digest.hexdigest()}, expected "
            f"{download.size} with {download.digest}; try again, or get {download.file_name} elsewhere"
        )


def download(name: str, folder: str | Path, *, timeout: float = 60.0, progress: bool = True) -> Path:
    """Fetch a data set's file into a folder, unless it is there already.

    The content is checked before the file gets its name, so that what lies there is whole. A download that fails or is
    interrupted leaves nothing; a killed process leaves a hidden file that ends in ".part", which can be deleted.

    Args:
        name: a key of DOWNLOADS.
        folder: made if need be.
        timeout: seconds without an answer.
        progress: show a bar on a terminal, if tqdm is installed.

    Returns:
        The file's path; its size and digest are those of DOWNLOADS.

    Raises:
        ValueError: an unknown name; the server gave, or the folder holds, another file.
        ConnectionError: the server does not answer, or refuses.
        OSError: the folder cannot be written, or the disk is full; errno and filename say which.
    """
    if name not in DOWNLOADS:
        raise ValueError(f"download: name must be one of {', '.join(DOWNLOADS)}, got {name!r}; {_ELSEWHERE}")
    wanted = DOWNLOADS[name]
    folder = Path(folder)
    target = folder / wanted.file_name
    if target.exists():
        wanted.check(target)
        return target
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < wanted.size:
        raise OSError(
            errno.ENOSPC, f"download: {wanted.file_name} needs {wanted.size} bytes, {free} are free", str(folder)
        )
    temporary = folder / f".{wanted.file_name}.{os.getpid()}.part"
    try:
        with open(temporary, "wb") as file:
            _receive(wanted, file, timeout, progress)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        sync_folder(folder)
    except ConnectionError:
        raise
    except OSError as error:
        raise OSError(
            error.errno, f"download: {wanted.file_name} cannot be written: {error.strerror}", str(folder)
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return target
