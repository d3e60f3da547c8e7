"""Checkpoints that several ranks write together, and any number of them, or one process, reads.

    step-000001200-3f2a9c…/     the first 32 hexadecimal digits of the SHA-256 of digests.json
        .metadata, *.distcp     tensors, by torch.distributed.checkpoint: each member once, base weights shared out
        structure.pt            numbers, strings and the names of the tensors in their places
        rank-3-of-2x2.pt        what is rank 3's own, with 2 × 2 ranks: read again by as many ranks alone
        digests.json            SHA-256 of each other file

As the files of one process: written beside, synced, renamed when complete; a damaged one is noticed. All ranks must
see the same folder.
"""

import hashlib
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from ..data.files import sync_folder, write_synced
from .checkpoints import CheckpointFolder, RunError, digest_in_name, read_file
from .ranks import Answer, RankError, SeveralRanks

_UNFINISHED = "unfinished"
_DIGESTS, _STRUCTURE = "digests.json", "structure.pt"
_TENSOR = "__tensor__"  # {_TENSOR: name} stands for a tensor


class ShardedCheckpointFolder(CheckpointFolder):
    """The checkpoints of a run of several ranks; all ranks call save and load together.

    Args:
        folder: made where it is missing.
        ranks: this process among them.
        keep: see CheckpointFolder.
    """

    def __init__(self, folder: str | Path, ranks: SeveralRanks, *, keep: int = 2):
        super().__init__(folder, keep=keep)
        self.ranks = ranks

    def save(self, state: dict[str, Any], step: int) -> Path:
        """Write a checkpoint; when this returns, on any rank, it is on the disk and whole.

        Args:
            state: as in CheckpointFolder; tensors may be DTensors; "own" is this rank's alone.
            step: orders the checkpoints; saving the same step again replaces it.

        Raises:
            OSError: on the rank that could not write; nothing of the earlier checkpoints is lost.
            RunError: on the others; or the ranks do not see the same folder.
        """
        unfinished = self.folder / _UNFINISHED
        self._first(lambda: _remake(unfinished))
        structure, tensors = _taken_apart({key: value for key, value in state.items() if key != "own"})
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(unfinished, sync_files=True))
        own = f"{self.ranks.layout}.pt"
        _write(unfinished / own, state["own"])
        written = [path for path in unfinished.glob(f"__{self.ranks.rank}_*")] + [unfinished / own]
        digests: list[Any] = [None] * self.ranks.num_ranks
        dist.all_gather_object(digests, {path.name: _digest_of(path) for path in written})
        return self.folder / self._first(lambda: self._finish(unfinished, structure, digests, step))

    def _finish(self, unfinished: Path, structure: Any, digests: list[dict[str, str]], step: int) -> str:
        """Complete and rename the checkpoint, remove old ones; return its name. The first rank's part."""
        _write(unfinished / _STRUCTURE, structure)
        all_digests = {name: digest for part in digests for name, digest in part.items()}
        for name in (_STRUCTURE, ".metadata"):
            all_digests[name] = _digest_of(unfinished / name)
        missing = sorted(name for name in all_digests if not (unfinished / name).is_file())
        if missing:
            raise RunError(
                f"checkpoint of step {step}: {missing[0]}, which another rank wrote, is not in {unfinished}; "
                "give --output a folder that all ranks share"
            )
        content = json.dumps(all_digests, indent=1, sort_keys=True).encode()
        write_synced(unfinished / _DIGESTS, content)
        sync_folder(unfinished)
        path = self.folder / f"step-{step:09d}-{digest_in_name(content)}"
        if path.exists():  # the same state again
            shutil.rmtree(unfinished)
        else:
            os.replace(unfinished, path)
        sync_folder(self.folder)
        self.remove_old(path, step)
        return path.name

    def load(self, device: str | torch.device = "cpu") -> tuple[dict[str, Any], int] | None:
        """Return the state and step of the newest whole checkpoint, of several ranks or of one process; None if none.

        Tensors are whole, with all members; "own" is there where the checkpoint was written by ranks laid out so.

        Raises:
            RunError: there are checkpoints, and every one is damaged (on every rank).
            OSError: the folder cannot be read.
        """
        newest = self._first(self.newest)
        return None if newest is None else (self.read(newest[1], device, self.ranks.layout), newest[0])

    def _first(self, function: Callable[[], Answer]) -> Answer:
        """Return, on every rank, what function returns on the first, which alone calls it."""
        try:
            answer = [self.ranks.first_does(function)]
        except RankError as error:
            raise RunError(str(error)) from None
        dist.broadcast_object_list(answer)
        return answer[0]  # type: ignore[return-value]


def is_whole(folder: Path, digest: str) -> bool:
    """Return whether a checkpoint's files are all there with their digests."""
    try:
        content = (folder / _DIGESTS).read_bytes()
        if digest_in_name(content) != digest:
            return False
        return all(_digest_of(folder / name) == expected for name, expected in json.loads(content).items())
    except FileNotFoundError:
        return False


def read_sharded(folder: Path, device: str | torch.device, layout: str | None) -> dict[str, Any]:
    """Return the state in a whole checkpoint, with all members, and the "own" part of this layout if there is one."""
    structure = read_file(folder / _STRUCTURE, device)
    reader = _SafeReader(folder)
    tensors = {
        name: torch.empty(found.size, dtype=found.properties.dtype, device=device)
        for name, found in reader.read_metadata().state_dict_metadata.items()
        if isinstance(found, dcp.metadata.TensorStorageMetadata)
    }
    with warnings.catch_warnings():  # that this is one process, which is intended
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    state = _put_together(structure, tensors)
    own = folder / f"{layout}.pt"
    if layout is not None and own.exists():
        state["own"] = read_file(own, device)
    return state


# ---------------------------------------------------------------------------------------------- files


def _remake(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def _write(path: Path, state: Any) -> None:
    with open(path, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    read_file(path, "meta")  # what could not be read again raises now


def _digest_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 22):
            digest.update(part)
    return digest.hexdigest()


_DESCRIPTION = "torch.distributed.checkpoint"
_ALLOWED = {
    *(
        (f"{_DESCRIPTION}.metadata", name)
        for name in (
            "Metadata",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "TensorProperties",
            "ChunkStorageMetadata",
            "MetadataIndex",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    (f"{_DESCRIPTION}.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}
_PATHS = {(m, name) for m in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")}  # of any Python


class _SafeUnpickler(pickle.Unpickler):
    """Reads the description of tensors that torch.distributed.checkpoint pickles, and nothing that could do harm."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PATHS:
            return Path
        if (module, name) in _ALLOWED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"a checkpoint's .metadata refers to {module}.{name}, which it has no use for")


class _SafeReader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp.Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = _SafeUnpickler(file).load()
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = dcp.metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


# ---------------------------------------------------------------------------------------------- nested states


def _taken_apart(state: Any, name: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Return the state with the names of tensors in their places, and the tensors by name."""
    if isinstance(state, Tensor):
        return {_TENSOR: name}, {name: state}
    if not isinstance(state, (dict, list, tuple)):
        return state, {}
    tensors: dict[str, Tensor] = {}

    def part(key: Any, value: Any) -> Any:
        structure, found = _taken_apart(value, f"{name}/{key}" if name else str(key))
        tensors.update(found)
        return structure

    if isinstance(state, dict):
        return {key: part(key, value) for key, value in state.items()}, tensors
    return type(state)(part(place, value) for place, value in enumerate(state)), tensors


def _put_together(structure: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(structure, dict):
        if structure.keys() == {_TENSOR}:
            return tensors[structure[_TENSOR]]
        return {key: _put_together(value, tensors) for key, value in structure.items()}
    if isinstance(structure, (list, tuple)):
        return type(structure)(_put_together(value, tensors) for value in structure)
    return structure
