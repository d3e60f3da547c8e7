"""Images in WebDataset shards: plain tar files of KEY.jpg beside KEY.cls, read at random by their offsets.

An index of every member's place is made once, from the tar headers; then any image is one read away, and minibatches
are true samples of the whole set, as they would not be from streams through a shuffle buffer.
"""

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from .archives import Limits, iterate_members
from .files import ArchiveError, named, named_errors
from .image_files import IMAGE_SUFFIXES, ImageFiles, Names
from .worker_pool import available_cores, can_fork

LAYOUT = (
    "expected are FOLDER/train/*.tar and FOLDER/val/*.tar, or FOLDER/*train*.tar and FOLDER/*val*.tar, of members "
    "KEY.jpg and KEY.cls (the class as a number)"
)
_LABEL_SUFFIX = ".cls"
_MOST_LABEL_BYTES = 64
_MOST_LABEL_DIGITS = 18  # what int64 holds in any case
_MOST_OPEN_FILES = 128
_TAR_BLOCK = 512
_FLAGS = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)  # the latter on Windows
_seeking = threading.Lock()


def find_shards(folder: str | Path, split: str) -> list[Path]:
    """Return the shards of "train" or "val", sorted; none is an empty list."""
    folder = Path(folder)
    inside = sorted((folder / split).glob("*.tar"))
    return inside or sorted(folder.glob(f"*{split}*.tar"))


class ImageShards(ImageFiles):
    """The images of one split's shards, sorted by shard and place within it.

    Args:
        shards: paths of tar files.
        num_classes: of the training split, for another one; its labels are below that.
        class_names: of all classes; their numbers where they are not given.

    Raises:
        ArchiveError: a shard is compressed, damaged, cut off or empty; an image has no label or a label no image; a
            label is no number or too large; a class has no image.
        OSError: a shard cannot be read.
    """

    def __init__(
        self, shards: Sequence[Path], *, num_classes: int | None = None, class_names: Sequence[str] | None = None
    ):
        if not shards:
            raise FileNotFoundError(f"there are no shards; {LAYOUT}")
        self.shards = list(shards)
        workers = min(available_cores(), len(shards))
        if workers > 1 and len(shards) > 8 and can_fork():
            with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
                parts = list(pool.map(index_shard, self.shards, chunksize=4))
        else:
            parts = [index_shard(shard) for shard in self.shards]
        counts = [len(part.keys) for part in parts]
        self._shard = np.repeat(np.arange(len(parts), dtype=np.int32), counts)
        self._offset, self._size = (
            np.concatenate([getattr(part, field) for part in parts]) for field in ("offsets", "sizes")
        )
        self.labels = np.concatenate([part.labels for part in parts])
        self._names = Names([key for part in parts for key in part.keys])
        self._check_classes(num_classes, class_names)
        self._files: dict[int, int] = {}  # of this process, by shard
        self._owner = os.getpid()

    def _check_classes(self, num_classes: int | None, class_names: Sequence[str] | None) -> None:
        largest = int(self.labels.argmax())
        known = num_classes if num_classes is not None else len(class_names) if class_names else None
        if known is not None and self.labels[largest] >= known:
            raise ArchiveError(f"{self.name(largest)} has class {self.labels[largest]}, there are {known}")
        count = int(self.labels[largest]) + 1 if known is None else known
        present = np.unique(self.labels)  # not bincount: a wrong number may be huge
        absent = count - len(present)
        if absent and num_classes is None:
            gaps = np.flatnonzero(present != np.arange(len(present)))
            first = gaps[0] if len(gaps) else len(present)
            raise ArchiveError(
                f"{self.shards[0]} and the {len(self.shards) - 1} other shards hold no image of {absent} of "
                f"{count} classes, {first} the first; classes are numbered from 0 without gaps"
            )
        self.classes = tuple(class_names) if class_names else tuple(str(label) for label in range(count))

    def name(self, index: int) -> str:
        """Return shard and key of image `index`."""
        return named(self.shards[self._shard[index]], self._names[index]).rstrip(",")

    def read(self, index: int) -> bytes:
        """Return the file of image `index`; see ImageFiles."""
        size = int(self._size[index])
        content = _read_at(self._descriptor(int(self._shard[index])), size, int(self._offset[index]))
        if len(content) < size:
            raise ArchiveError(f"{self.name(index)} is cut off {size - len(content)} bytes early; get the shard again")
        return content

    def _descriptor(self, shard: int) -> int:
        if self._owner != os.getpid():  # forked: the parent's descriptors stay the parent's to close
            self._files, self._owner = {}, os.getpid()
        if shard not in self._files:
            if len(self._files) >= _MOST_OPEN_FILES:
                self.close()
            self._files[shard] = os.open(self.shards[shard], _FLAGS)
        return self._files[shard]

    def close(self) -> None:
        """Close the shards that this process has open; reading opens them again."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files = {}


def _read_at(descriptor: int, size: int, offset: int) -> bytes:
    """Return size bytes of a file from offset on, fewer at its end."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, size, offset)
    with _seeking:  # Windows has no read that leaves the file's position alone
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, size)


class ShardIndex:
    """Where the images of one shard lie: keys, offsets [n], sizes [n] and labels [n], int64."""

    def __init__(self, keys: list[str], offsets: list[int], sizes: list[int], labels: list[int]):
        self.keys = keys
        self.offsets, self.sizes, self.labels = (np.array(part, dtype=np.int64) for part in (offsets, sizes, labels))


def index_shard(path: Path) -> ShardIndex:
    """Read a shard's headers and labels.

    Raises:
        ArchiveError, OSError: see ImageShards.
    """
    _check_ends(path)
    size = path.stat().st_size
    limits = Limits(member_bytes=size, total_bytes=size, members=10_000_000)
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, int] = {}
    for member in iterate_members(path, lambda name: name.lower().endswith((*IMAGE_SUFFIXES, _LABEL_SUFFIX)), limits):
        key, suffix = _split(member.name)
        if suffix == _LABEL_SUFFIX:
            text = member.read() if member.size <= _MOST_LABEL_BYTES else b""
            if not text.strip().isdigit() or len(text.strip()) > _MOST_LABEL_DIGITS:
                raise member.error(f"is no class number: {text[:20]!r}")
            labels[key] = int(text)
        elif key in images:
            raise member.error(f"is a second image of the sample {key!r}; keep one")
        else:
            images[key] = (member.name, member.offset, member.size)
    for kind, lonely in (("class", images.keys() - labels.keys()), ("image", labels.keys() - images.keys())):
        if lonely:
            raise ArchiveError(f"{path} has {len(lonely)} samples without {kind}, {sorted(lonely)[0]!r} the first")
    if not images:
        raise ArchiveError(f"{path} holds no images; {LAYOUT}")
    names, offsets, sizes = (list(part) for part in zip(*images.values()))
    return ShardIndex(names, offsets, sizes, [labels[key] for key in images])


def _split(name: str) -> tuple[str, str]:
    """A member's key, up to the first dot of its file name, and the last suffix in lower case."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0], os.path.splitext(file)[1].lower()


def _check_ends(path: Path) -> None:
    """Refuse what is compressed, and what lacks a tar archive's last block: cut between two members, it looks whole.

    Raises:
        ArchiveError, OSError: it is one of these, or cannot be read.
    """
    with named_errors(path), open(path, "rb") as file:
        if file.read(2) == b"\x1f\x8b":
            raise ArchiveError(f"{path} is compressed, and cannot be read at random; decompress it: gunzip")
        size = file.seek(0, os.SEEK_END)
        if size < 2 * _TAR_BLOCK:
            raise ArchiveError(f"{path} has {size} bytes, too few for a shard; get it again")
        file.seek(-_TAR_BLOCK, os.SEEK_END)
        if file.read().strip(b"\0") or size % _TAR_BLOCK:
            raise ArchiveError(f"{path} is cut off: it lacks the end mark of a tar archive; get it again")
