"""A run's folder: one writer, one recipe, metrics that survive a crash."""

import csv
import errno
import io
import json
import os
import platform
import re
import struct
import subprocess
import sys
import types
from pathlib import Path
from typing import ClassVar

import pytest

from latephase_kernels.cli import main
from latephase_kernels.train.files import write_whole
from latephase_kernels.train.progress import Progress
from latephase_kernels.train.runs import RunFolder, draw_metrics, environment, read_metrics

try:
    import fcntl
    import pty
    import termios
except ImportError:
    fcntl = None
CONFIG = "name: a\nseed: 0\n"


def test_a_resumed_run_logs_again_what_came_after_its_checkpoint(tmp_path):
    with RunFolder(tmp_path / "run", CONFIG) as run:
        assert run.start_metrics(0) == []
        for step in (10, 20, 30):
            run.log({"step": step, "epoch": step / 10, "train loss": 1.0 / step, "test loss": float("nan")})
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "tr')  # killed while writing
    with RunFolder(tmp_path / "run", CONFIG, resume=True) as run:
        assert [record["step"] for record in run.start_metrics(20)] == [10, 20]
        run.log({"step": 30, "epoch": 3.0, "train loss": 0.5, "test loss": 0.25})
        run.finish_metrics()
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in records] == [10, 20, 30] and records[0]["test loss"] is None
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["train loss"] for row in rows] == ["0.1", "0.05", "0.5"] and rows[0]["test loss"] == ""
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "run" / "environment.json").read_text()).keys() == environment().keys()


def test_one_process_at_a_time(tmp_path):
    code = (
        "import sys; from latephase_kernels.train.runs import RunFolder\n"
        "try:\n    RunFolder(sys.argv[1], 'name: a\\nseed: 0\\n', resume=True)\n"
        "except RuntimeError as error:\n    print(error)\n"
    )
    with RunFolder(tmp_path, CONFIG):
        other = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
        assert f"{tmp_path} is in use by process {os.getpid()}; choose another" in other.stdout
    RunFolder(tmp_path, CONFIG, resume=True).__exit__()


def test_another_run_is_left_alone(tmp_path):
    with RunFolder(tmp_path, CONFIG):
        (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="already holds a run; give --resume"):
        RunFolder(tmp_path, CONFIG)
    with pytest.raises(ValueError, match=r"another recipe \(seed is 0 there and 1 here\)"):
        RunFolder(tmp_path, CONFIG.replace("seed: 0", "seed: 1"), resume=True)
    assert (tmp_path / "config.yaml").read_text() == CONFIG
    swapped = "name: a\noptimizer:\n  lr: 1.0\nlate:\n  lr: 2.0\n"
    (tmp_path / "config.yaml").write_text(swapped)
    with pytest.raises(ValueError, match=r"another recipe \(optimizer.lr is 1.0 there and 2.0 here\)"):
        RunFolder(tmp_path, swapped.translate({ord("1"): "2", ord("2"): "1"}), resume=True)
    (tmp_path / "config.yaml").write_text("foo: [")
    with pytest.raises(ValueError, match="another recipe .its config.yaml cannot be read.; resume"):
        RunFolder(tmp_path, CONFIG, resume=True)
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="another recipe .its config.yaml cannot be read.; resume"):
        RunFolder(tmp_path, CONFIG, resume=True)
    (tmp_path / "config.yaml").write_text(CONFIG)
    with RunFolder(tmp_path, CONFIG, resume=True):  # the failures let go of the lock
        pass


def test_a_run_without_its_recipe_is_left_alone(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="already holds a run; give --resume"):
        RunFolder(tmp_path, CONFIG)
    with pytest.raises(ValueError, match="holds a run, but no config.yaml that says of which recipe; put it back"):
        RunFolder(tmp_path, CONFIG, resume=True)


def test_a_run_killed_in_its_first_checkpoint_leaves_its_folder_free(tmp_path):
    with RunFolder(tmp_path, CONFIG) as run:
        (run.checkpoints.folder / "unfinished.pt").touch()
    with RunFolder(tmp_path, CONFIG.replace("seed: 0", "seed: 1")):
        pass


def test_a_run_may_go_on_with_what_changes_no_result(tmp_path):
    config = (
        "name: a\ndata:\n  name: b\n  folder: here\ncheckpoint_minutes: 1.0\nkeep_checkpoints: 2\n"
        "images:\n  size: 8\n  workers: 2\n"
    )
    with RunFolder(tmp_path, config):
        (tmp_path / "model.safetensors").touch()
    moved = config.replace("here", "there")
    with RunFolder(tmp_path, moved.replace("1.0", "5.0").replace(": 2", ": null"), resume=True):
        pass
    with pytest.raises(ValueError, match="images.size is 8 there and 9 here"):
        RunFolder(tmp_path, config.replace("size: 8", "size: 9"), resume=True)


@pytest.mark.skipif(fcntl is None, reason="no locks here")
def test_a_file_system_without_locks_is_no_other_run(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.warns(UserWarning, match="without locks .No locks available.: nothing keeps a second run out"):
        RunFolder(tmp_path, CONFIG).__exit__()


def test_a_full_disk_is_named_before_anything_is_written(tmp_path):
    os.symlink("/dev/full", tmp_path / "lock")
    with pytest.raises(OSError) as caught:
        RunFolder(tmp_path, CONFIG)
    assert caught.value.filename == str(tmp_path / "lock")


def test_the_environment_is_of_the_runs_device(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: f"the name of {device}")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert environment("cuda:1")["device"] == "the name of cuda:1" and environment()["devices"] == 8
    assert "the name of" not in environment("cpu")["device"] and environment("cpu")["devices"] == 1
    assert environment("mps")["device"] == "mps"


@pytest.mark.skipif(platform.system() != "Linux" or platform.machine() != "x86_64", reason="has /proc/cpuinfo's names")
def test_the_environment_names_the_processor():
    assert f"model name\t: {environment('cpu')['device']}\n" in Path("/proc/cpuinfo").read_text()


def test_damaged_metrics_are_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2, is no JSON"):
        read_metrics(tmp_path / "metrics.jsonl")
    for line in (b'{"a": 1}', b"[1]", b"null"):
        (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line + b"\n")
        with pytest.raises(ValueError, match=r"metrics.jsonl, line 2, is no record with a step"):
            read_metrics(tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\xfe\n{}\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 1, is no JSON"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    done = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr("os.fsync", lambda file: (done.append("sync"), sync(file)))
    monkeypatch.setattr("os.replace", lambda *names: (done.append("rename"), replace(*names)))
    write_whole(tmp_path / "file", "content")
    assert done == ["sync", "rename"] and (tmp_path / "file").read_text() == "content"


def test_a_full_disk_is_named_and_leaves_what_was_there(tmp_path, monkeypatch):
    with RunFolder(tmp_path, CONFIG) as run:
        run.start_metrics(0)
        run._file.close()
        run._file = open("/dev/full", "w")
        with pytest.raises(OSError) as caught:
            run.log({"step": 1})
        assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(tmp_path / "metrics.jsonl")
    path, picture = tmp_path / "results.json", tmp_path / "curves.png"
    write_whole(path, "old"), write_whole(picture, "old")

    def full(file, content):
        with open(file, "wb") as stream:
            stream.write(content[:1])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError) as caught:
        write_whole(path, "new")
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(path) and path.read_text() == "old"
    pytest.importorskip("matplotlib")
    with pytest.raises(OSError, match=r"No space left on device: .*curves\.png"):
        draw_metrics([{"epoch": 1, "test accuracy": 9.0}], picture)
    assert picture.read_text() == "old"
    assert not list(tmp_path.glob("*unfinished*"))


@pytest.mark.parametrize("terminal", [False, True])
def test_progress(terminal):
    """A bar with the time left on a terminal, plain lines elsewhere."""
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    progress = Progress(10, stream)
    progress.begin("epoch 1")
    progress.advance(4)
    progress.begin("epoch 2, 1,000 images/s")
    progress.advance(1)
    text = stream.getvalue()
    if terminal:
        assert (
            re.search(r"\r\[#{15}\.{15}\]  50 % +\d+ s left  epoch 2, 1,000 images/s\x1b\[K$", text)
            and "\n" not in text
        )
        with progress:
            pass
        assert stream.getvalue().endswith("\r\x1b[K")
    else:
        assert text == "[  0 %] epoch 1\n[ 40 %] epoch 2, 1,000 images/s\n"


@pytest.mark.skipif(fcntl is None, reason="no terminals of this kind here")
def test_progress_fits_into_a_narrow_terminal():
    """A line that wraps would be written anew at every step."""
    primary, secondary = pty.openpty()
    fcntl.ioctl(secondary, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    with open(secondary, "w", encoding="utf-8") as stream:
        progress = Progress(10, stream)
        progress.begin("digits: epoch 2 of 4, loss 1.5261, test accuracy 40.61 %")
        progress.advance(5)
        line = os.read(primary, 1000).decode()
    os.close(primary)
    assert re.fullmatch(r"\r(\[#{5}\.{5}\]  50 % +\d+ s left  digits: epoch 2 of 4.*)\x1b\[K", line)
    assert len(line) - len("\r\x1b[K") == 59


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_that_nobody_reads_ends_no_work(terminal):
    def gone(text):
        raise OSError(errno.EIO, "Input/output error")

    stream = io.StringIO()
    stream.isatty, stream.write = lambda: terminal, gone
    with Progress(10, stream) as progress:
        progress.begin("epoch 1")
        progress.advance(10)
    assert progress.done == 10


def test_nothing_to_draw(tmp_path):
    assert not draw_metrics([], tmp_path / "curves.png") and not list(tmp_path.iterdir())


class Writer:
    """What a run uses of torch.utils.tensorboard.SummaryWriter."""

    made: ClassVar[list] = []

    def __init__(self, folder, purge_step):
        self.folder, self.purge_step, self.scalars, self.closed = folder, purge_step, [], False
        self.made.append(self)

    def add_scalar(self, tag, value, step):
        self.scalars.append((tag, value, step))

    def flush(self):
        self.flushed = len(self.scalars)

    def close(self):
        self.closed = True


def test_tensorboard(tmp_path, monkeypatch):
    """Every metric goes there as it is logged; a resumed run takes back what came after its checkpoint."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    monkeypatch.setattr(Writer, "made", [])
    with RunFolder(tmp_path / "run", CONFIG, tensorboard=True) as run:
        run.start_metrics(0)
        run.log({"step": 10, "epoch": 1.0, "seconds": 3.0, "train loss": 0.5, "learning rate": 0.1})
        run.log({"step": 20, "train loss": float("nan"), "test accuracy": 50.0, "members": 3})
        assert Writer.made[0].flushed == 4 and not Writer.made[0].closed
    with RunFolder(tmp_path / "run", CONFIG, resume=True, tensorboard=True) as run:
        run.start_metrics(10)
    first, second = Writer.made
    assert first.folder == str(tmp_path / "run" / "tensorboard") and first.closed and second.purge_step == 11
    assert first.scalars == [
        *(("train/loss", 0.5, 10), ("learning rate", 0.1, 10), ("test/accuracy", 50.0, 20), ("members", 3, 20)),
    ]
    with RunFolder(tmp_path / "other", CONFIG) as run:
        run.start_metrics(0)
        run.log({"step": 10, "train loss": 0.5})
    assert len(Writer.made) == 2


def test_tensorboard_is_missing(tmp_path, monkeypatch, capsys):
    pytest.importorskip("jsonargparse")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # importing it fails, as where it is missing
    monkeypatch.chdir(tmp_path)
    assert main(["train", "digits", "--tensorboard", "--device=cpu", "--output=run"]) == 2
    assert "train: --tensorboard needs TensorBoard; pip install tensorboard" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
