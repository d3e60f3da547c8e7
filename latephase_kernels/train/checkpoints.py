"""Checkpoints that are whole or not there: written beside, synced, renamed; the digest is part of the name.

    step-000001200-3f2a9c….pt      the first 32 hexadecimal digits of the SHA-256 of its content
    step-000001200-3f2a9c…/        written by several ranks, see sharded_checkpoints.py

torch.load does not notice flipped bits; the digest does. A damaged newest checkpoint costs the steps since the one
before it.
"""

import hashlib
import io
import os
import random
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.files import sync_folder, write_synced

_NAME = re.compile(r"step-(\d{9,})-([0-9a-f]{32})(\.pt)?")
_UNFINISHED = "unfinished.pt"


class RunError(RuntimeError):
    """The state of a run's folder does not allow to go on; the message says what to do."""


class CheckpointFolder:
    """The checkpoints of one run.

    Args:
        folder: made where it is missing.
        keep: how many of the newest stay; older ones are removed after a new one is complete.

    Raises:
        ValueError: keep is less than 1.
        OSError: the folder cannot be made.
    """

    def __init__(self, folder: str | Path, *, keep: int = 2):
        if keep < 1:
            raise ValueError(f"CheckpointFolder: keep must be at least 1, got {keep}")
        self.folder, self.keep = Path(folder), keep
        self.folder.mkdir(parents=True, exist_ok=True)

    def steps(self) -> list[tuple[int, Path]]:
        """Return (step, path) of every checkpoint, the newest first; contents unchecked."""
        found = ((_NAME.fullmatch(path.name), path) for path in self.folder.iterdir())
        return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)

    def save(self, state: dict[str, Any], step: int) -> Path:
        """Write a checkpoint; when this returns it is on the disk and whole.

        Args:
            state: tensors, numbers, strings, and dicts, lists and tuples of them: what weights_only loading admits.
            step: orders the checkpoints; saving the same step again replaces it.

        Raises:
            OSError: with path and errno; nothing of the earlier checkpoints is lost.
            TypeError: state holds an object that could not be loaded again.
        """
        buffer = io.BytesIO()
        torch.save(state, buffer)
        content = buffer.getbuffer()
        buffer.seek(0)
        try:
            torch.load(buffer, weights_only=True, map_location="meta")
        except Exception as error:
            raise TypeError(f"CheckpointFolder.save: state must be loadable with weights_only=True: {error}") from None
        path = self.folder / f"step-{step:09d}-{digest_in_name(content)}.pt"
        unfinished = self.folder / _UNFINISHED
        try:
            write_synced(unfinished, content)
            os.replace(unfinished, path)
            sync_folder(self.folder)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            steps = self.steps()
            kept = f"the last good one is {steps[0][1].name}" if steps else "there is no earlier one"
            raise OSError(
                error.errno, f"checkpoint of step {step} not written: {error.strerror}; {kept}", str(path)
            ) from None
        self.remove_old(path, step)
        return path

    def remove_old(self, path: Path, step: int) -> None:
        """Remove what the new checkpoint at path, of this step, replaces, and what is no longer kept."""
        for position, (other_step, other) in enumerate(self.steps()):
            if other != path and (position >= self.keep or other_step == step):
                shutil.rmtree(other) if other.is_dir() else other.unlink(missing_ok=True)

    def load(self, device: str | torch.device = "cpu") -> tuple[dict[str, Any], int] | None:
        """Return the state and step of the newest whole checkpoint, or None where there never was one.

        A damaged one is left in place and named in a warning, together with the one used instead.

        Raises:
            RunError: there are checkpoints, and every one is damaged.
            OSError: the folder cannot be read.
        """
        newest = self.newest()
        return None if newest is None else (self.read(newest[1], device), newest[0])

    def read(self, path: Path, device: str | torch.device, layout: str | None = None) -> dict[str, Any]:
        """Return the state in a whole checkpoint; of several ranks' with what was this layout's own, if it was."""
        if path.is_dir():
            from .sharded_checkpoints import read_sharded  # which imports this module

            return read_sharded(path, device, layout)
        return read_file(path, device)

    def newest(self) -> tuple[int, Path] | None:
        """Return step and path of the newest whole checkpoint; warns and raises as load does."""
        damaged: list[str] = []
        for step, path in self.steps():
            if not _is_whole(path):
                damaged.append(path.name)
                continue
            if damaged:
                warnings.warn(
                    f"checkpoint {', '.join(damaged)} in {self.folder} is damaged (its content does not have "
                    f"the digest in its name); going on from {path.name}",
                    stacklevel=3,
                )
            return step, path
        if damaged:
            raise RunError(
                f"every checkpoint in {self.folder} is damaged: {', '.join(damaged)}; remove them to start again"
            )
        return None


def _is_whole(path: Path) -> bool:
    match = _NAME.fullmatch(path.name)
    assert match is not None  # as steps() has it
    if path.is_dir():
        from .sharded_checkpoints import is_whole

        return is_whole(path, match[2])
    return digest_in_name(path.read_bytes()) == match[2]


def digest_in_name(content: bytes | memoryview) -> str:
    """Return what the name of a checkpoint of this content ends with."""
    return hashlib.sha256(content).hexdigest()[:32]


def read_file(path: Path, device: str | torch.device) -> Any:
    """Return what torch.save wrote to a file, its tensors on a device; nothing in it is executed."""
    return torch.load(io.BytesIO(path.read_bytes()), weights_only=True, map_location=device)


# ---------------------------------------------------------------------------------------------- random state


def random_state() -> dict[str, Any]:
    """Return the state of every global generator (torch, each GPU's, numpy, Python), fit for a checkpoint."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    kind, gpus = _gpus()
    return {
        "torch": torch.get_rng_state(),
        kind: [gpus.get_rng_state(index) for index in range(gpus.device_count())],
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
        "python": random.getstate(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put every global generator into a state that random_state returned, on as many GPUs of a kind as before."""
    torch.set_rng_state(state["torch"].cpu())
    kind, gpus = _gpus()
    for index, part in enumerate(state.get(kind, [])):
        gpus.set_rng_state(part.cpu(), index)
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached))
    version, values, gauss = state["python"]
    random.setstate((version, tuple(values), gauss))


def _gpus() -> tuple[str, Any]:
    """Return this machine's kind of GPU and torch's module of it, as "mps" and torch.mps; without one, of CUDA's."""
    found = torch.accelerator.current_accelerator(check_available=True)
    kind = "cuda" if found is None else found.type
    return kind, getattr(torch, kind)
