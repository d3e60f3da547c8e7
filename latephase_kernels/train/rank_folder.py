"""The folder of a run of several ranks: the first writes it, checkpoints are written by all."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .checkpoints import CheckpointFolder
from .ranks import Ranks, SeveralRanks
from .runs import RunFolder
from .sharded_checkpoints import ShardedCheckpointFolder


class OtherRanksFolder:
    """What stands for the run's folder on every rank but the first: nothing is written but checkpoints' parts."""

    def __init__(self, checkpoints: CheckpointFolder):
        self.checkpoints = checkpoints

    def start_metrics(self, step: int) -> list[dict[str, Any]]:
        """Return no records; see RunFolder."""
        return []

    def log(self, record: dict[str, Any]) -> None:
        """Do nothing; see RunFolder."""


AnyFolder = RunFolder | OtherRanksFolder


@contextlib.contextmanager
def open_run_folder(ranks: Ranks, path: str | Path, config: str, **options: Any) -> Iterator[AnyFolder]:
    """Open the folder of a run, for the with block.

    Args:
        ranks: the run's processes.
        path, config, options: see RunFolder.

    Raises:
        As RunFolder, on the first rank; RankError on the others.
    """
    folder = ranks.first_does(lambda: RunFolder(path, config, **options))
    with contextlib.ExitStack() as closing:
        if folder is not None:
            closing.enter_context(folder)
        if not isinstance(ranks, SeveralRanks):
            assert folder is not None
            yield folder
            return
        keep = options.get("keep_checkpoints", 2)
        checkpoints = ShardedCheckpointFolder(Path(path) / "checkpoints", ranks, keep=keep)
        if folder is None:
            yield OtherRanksFolder(checkpoints)
            return
        folder.checkpoints = checkpoints
        yield folder
