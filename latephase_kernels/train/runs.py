"""A run's folder: who writes to it, what it was run with, its metrics, its curves, its final model.

config.yaml         the resolved recipe
environment.json    versions, device, command
metrics.jsonl       one object a line, each with "step"; metrics.csv is the same as a table
curves.png          drawn from the metrics
tensorboard/        the metrics once more, if asked for
checkpoints/        see checkpoints.py
model.safetensors   the plain model at the end
classes.txt         the names of the classes, in the order of its outputs
results.json        how well it predicts at the end; evaluation.json is by `latephase eval`
collapsed.safetensors  by `latephase collapse`, of the last checkpoint
lock                held by the process that writes here
"""

import contextlib
import csv
import io
import json
import math
import os
import platform
import re
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import torch

from .. import __version__
from .checkpoints import CheckpointFolder, RunError
from .figures import new_figure, save_figure
from .files import finite, naming, write_json, write_whole

try:
    import fcntl
except ImportError:  # Windows: no lock there
    fcntl = None  # type: ignore[assignment]

# A run may go on with others of these: its result does not depend on them.
_FREE = re.compile(
    r"^(  folder|  member_ranks|  timeout_seconds|  workers|checkpoint_minutes|keep_checkpoints): .*$", re.MULTILINE
)
_BOOKKEEPING = ("step", "epoch", "seconds")
_TAG = re.compile(r"^(train|validation|test) ")  # TensorBoard puts train/… and test/… into a group each


def _summary_writer() -> Any:
    """Return TensorBoard's class.

    Raises:
        ImportError: it is missing; the message says what to do.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError:
        raise ImportError("train: --tensorboard needs TensorBoard; pip install tensorboard") from None
    return SummaryWriter


def processor() -> str:
    """Return the processor's name, as the system has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def environment(device: str | torch.device | None = None) -> dict[str, Any]:
    """Return what a reader needs to repeat a run on a device; None: the GPU if there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if device is None else torch.device(device)
    cuda = device.type == "cuda"
    return {
        "latephase_kernels": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if cuda else processor() if device.type == "cpu" else str(device),
        "devices": torch.cuda.device_count() if cuda else 1,
        "threads": torch.get_num_threads(),
        "command": sys.argv,
    }


def _settings(config: str) -> dict[str, Any]:
    """Return the dotted options of a recipe's YAML; {} if it is none."""
    import yaml  # comes with jsonargparse

    try:
        parts = yaml.safe_load(config)
    except yaml.YAMLError:
        return {}
    found = {}
    for name, part in parts.items() if isinstance(parts, dict) else ():
        inner = {f"{name}.{key}": value for key, value in part.items()} if isinstance(part, dict) else {name: part}
        found.update(inner)
    return found


def _first_difference(before: str, config: str) -> str:
    there, here = _settings(before), _settings(config)
    if not there:
        return "its config.yaml cannot be read"
    missing = object()
    for option in {**here, **there}:
        one, other = there.get(option, missing), here.get(option, missing)
        if one != other:
            words = ["absent" if value is missing else str(value) for value in (one, other)]
            return f"{option} is {words[0]} there and {words[1]} here"
    return "written otherwise"


class RunFolder:
    """The folder of one run, held by one process at a time; a context manager.

    Args:
        path: made where it is missing.
        config: the resolved recipe as YAML.
        resume: go on with the run that is there, if there is one.
        keep_checkpoints: see CheckpointFolder.
        tensorboard: write the metrics for TensorBoard, too.
        device: that the run is on, for environment.json; see environment.

    Raises:
        ValueError: it holds another run and resume is False, or a run of another recipe, or of an unknown one.
        RunError: another process is writing to it.
        ImportError: tensorboard is asked for, and missing.
        OSError: it cannot be written.
    """

    def __init__(
        self,
        path: str | Path,
        config: str,
        *,
        resume: bool = False,
        keep_checkpoints: int = 2,
        tensorboard: bool = False,
        device: str | torch.device | None = None,
    ):
        self._make_writer = _summary_writer() if tensorboard else None
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = self._locked()
        try:
            self._check_config(config, resume)
            self.checkpoints = CheckpointFolder(self.path / "checkpoints", keep=keep_checkpoints)
            write_whole(self.path / "config.yaml", config)
            write_json(self.path / "environment.json", environment(device))
        except BaseException:
            self._lock.close()
            raise
        self._metrics: list[dict[str, Any]] = []
        self._file: IO[str] | None = None
        self._writer: Any = None

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # log has flushed, or raised
                self._file.close()
        if self._writer is not None:
            self._writer.close()
        self._lock.close()

    def _locked(self) -> IO[str]:
        file = open(self.path / "lock", "a+", encoding="utf-8")
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):  # the latter on some network file systems
                file.seek(0)
                holder = file.read().strip() or "unknown"
                file.close()
                raise RunError(
                    f"run folder {self.path} is in use by process {holder}; "
                    "choose another with --output, or stop that one"
                ) from None
            except OSError as error:
                warnings.warn(
                    f"{self.path} is on a file system without locks ({error.strerror}): nothing keeps a second run out",
                    stacklevel=4,
                )
        with naming(self.path / "lock"):
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        return file

    def _check_config(self, config: str, resume: bool) -> None:
        existing = self.path / "config.yaml"
        kept = (*(self.path / "checkpoints").glob("step-*"), *self.path.glob("model.safetensors"))
        if not kept:  # a run that ended before its first checkpoint left nothing to lose
            return
        if not resume:
            raise ValueError(
                f"run folder {self.path} already holds a run; give --resume to go on with it, or another --output"
            )
        if not existing.exists():
            raise ValueError(
                f"run folder {self.path} holds a run, but no config.yaml that says of which recipe; put it back, or "
                "give another --output"
            )
        before = existing.read_text(encoding="utf-8", errors="replace")
        before, config = _FREE.sub("", before), _FREE.sub("", config)
        if before != config:
            raise ValueError(
                f"run folder {self.path} holds a run of another recipe ({_first_difference(before, config)}); "
                "resume with the same recipe and options"
            )

    def start_metrics(self, step: int) -> list[dict[str, Any]]:
        """Open the metrics, drop what was logged after `step` (a resumed run logs it again), return what is kept."""
        path = self.path / "metrics.jsonl"
        kept = [record for record in read_metrics(path) if record["step"] <= step]
        write_whole(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._metrics = kept
        self._file = open(path, "a", encoding="utf-8")
        if self._make_writer is not None:
            self._writer = self._make_writer(str(self.path / "tensorboard"), purge_step=step + 1)
        return kept

    def log(self, record: dict[str, Any]) -> None:
        """Append one record; it must have "step". Numbers that are not finite become null."""
        if self._file is None:
            raise RuntimeError("RunFolder.log: call start_metrics first")
        record = finite(record)
        self._metrics.append(record)
        with naming(self.path / "metrics.jsonl"):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        if self._writer is not None:
            for key, value in record.items():
                if isinstance(value, (int, float)) and key not in _BOOKKEEPING:
                    self._writer.add_scalar(_TAG.sub(r"\1/", key), value, record["step"])
            self._writer.flush()

    def finish_metrics(self) -> None:
        """Write the metrics as CSV and their curves as a picture."""
        columns = list(dict.fromkeys(key for record in self._metrics for key in record))
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, columns)
        writer.writeheader()
        writer.writerows(self._metrics)
        write_whole(self.path / "metrics.csv", table.getvalue())
        draw_metrics(self._metrics, self.path / "curves.png")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics.jsonl; a last line cut short by a crash is left out."""
    if not path.exists():
        return []
    records = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            if number + 1 < len(lines):
                raise ValueError(f"{path}, line {number + 1}, is no JSON: {line[:60]!r}; remove it") from None
            continue
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise ValueError(f"{path}, line {number + 1}, is no record with a step: {line[:60]!r}; remove it")
        records.append(record)
    return records


def draw_metrics(records: Iterable[dict[str, Any]], path: Path) -> bool:
    """Draw every metric but the bookkeeping over the epochs, one panel a metric; False without matplotlib."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for record in records:
        for key, value in record.items():
            if isinstance(value, (int, float)) and key not in _BOOKKEEPING:
                split, _, quantity = key.rpartition(" ")  # "test accuracy" is the curve "test" of the panel "accuracy"
                panels.setdefault(quantity, {}).setdefault(split, []).append((record.get("epoch", 0.0), value))
    if not panels:
        return False
    rows, columns = math.ceil(len(panels) / 3), min(len(panels), 3)
    figure = new_figure(4.5 * columns, 3.6 * rows)
    if figure is None:
        return False
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, (quantity, curves) in zip(grid.flat, panels.items()):
        for split, points in curves.items():
            style: dict[str, Any] = {"label": split or quantity, "marker": ".", "linewidth": 1.2}
            if split.startswith("member "):  # a band behind the others; the table says which is which
                label = "each member" if split == "member 0" else None
                style = {"label": label, "color": "0.75", "linewidth": 0.8, "zorder": 1}
            axes.plot(*zip(*points, strict=True), **style)
        axes.set(xlabel="epoch", ylabel=quantity)
        axes.grid(alpha=0.3)
        if len(curves) > 1:
            axes.legend()
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    save_figure(figure, path, dpi=120)
    return True
