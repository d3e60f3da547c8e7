"""Files that are written whole or not at all, and errors that name them."""

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..data.files import write_synced


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an OSError the path that it lacks, as that of a write to a full disk does."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader finds the old content or the new, never a part.

    Raises:
        OSError: with path and errno; the old content is still there.
    """
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        with naming(path):
            write_synced(unfinished, content.encode() if isinstance(content, str) else content)
            os.replace(unfinished, path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


def finite(value: Any) -> Any:
    """Return value with null in place of numbers that are not finite: JSON has none of them."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, content: Any) -> None:
    """Write content as JSON, as write_whole does; see finite."""
    write_whole(path, json.dumps(finite(content), indent=2, allow_nan=False) + "\n")


def prepare_output(folder: Path) -> None:
    """Make the folder, and find out now rather than at the end whether it can be written.

    Raises:
        OSError: it cannot.
    """
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / ".write_test"
    probe.write_bytes(b"")
    probe.unlink()
