"""Checkpoints survive flipped bits, full disks and killed processes; random states come back."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from latephase_kernels.train.checkpoints import CheckpointFolder, random_state, set_random_state


def state(step):
    generator = torch.Generator().manual_seed(step)
    weights = torch.randn(1000, generator=generator)
    return {
        "model": {"w": weights},
        "optimizer": {"state": {0: {"m": weights.half()}}, "lr": 0.1},
        "names": ["a", step],
    }


def same(loaded, expected):
    return (
        torch.equal(loaded["model"]["w"], expected["model"]["w"])
        and torch.equal(loaded["optimizer"]["state"][0]["m"], expected["optimizer"]["state"][0]["m"])
        and loaded["names"] == expected["names"]
    )


def test_the_newest_ones_are_kept(tmp_path):
    folder = CheckpointFolder(tmp_path / "run" / "checkpoints", keep=2)
    assert folder.load() is None
    for step in (5, 10, 1_000_000_000):
        path = folder.save(state(step), step)
        loaded, loaded_step = folder.load()
        assert loaded_step == step and same(loaded, state(step)) and path.exists()
    assert [step for step, _ in folder.steps()] == [1_000_000_000, 10]
    folder.save(state(11), 10)  # the same step again
    assert len(folder.steps()) == 2
    (tmp_path / "run" / "checkpoints" / "notes.txt").write_text("not a checkpoint")
    assert len(folder.steps()) == 2


@pytest.mark.parametrize("damage", ["flipped bit", "cut short", "emptied"])
def test_a_damaged_one_is_passed_over(tmp_path, damage):
    folder = CheckpointFolder(tmp_path)
    good, bad = folder.save(state(1), 1), folder.save(state(2), 2)
    content = bytearray(bad.read_bytes())
    if damage == "flipped bit":
        content[len(content) // 2] ^= 1  # inside a tensor: torch.load reads it without complaint
    bad.write_bytes(content[:1000] if damage == "cut short" else b"" if damage == "emptied" else content)
    with pytest.warns(UserWarning, match=f"{bad.name}.* is damaged .*; going on from {good.name}"):
        loaded, step = folder.load()
    assert step == 1 and same(loaded, state(1))
    good.write_bytes(b"x")
    with pytest.raises(RuntimeError, match="every checkpoint .* is damaged"):
        folder.load()


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    folder = CheckpointFolder(tmp_path)
    folder.save(state(1), 1)
    with pytest.raises(TypeError, match="loadable with weights_only"):
        folder.save({"model": random.Random()}, 2)
    assert [step for step, _ in folder.steps()] == [1]
    with pytest.raises(ValueError, match="keep must be at least 1"):
        CheckpointFolder(tmp_path, keep=0)


FULL_DISK = """
import resource, signal, sys
from latephase_kernels.train.checkpoints import CheckpointFolder
import torch
folder = CheckpointFolder(sys.argv[1])
folder.save({"w": torch.zeros(10)}, 1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    folder.save({"w": torch.zeros(100_000)}, 2)
except OSError as error:
    print(error.errno, error.filename, error.strerror, sep="|")
"""


def test_a_full_disk_names_path_and_errno_and_keeps_the_last(tmp_path):
    run = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=True)
    number, path, message = run.stdout.strip().split("|")
    assert int(number) == errno.EFBIG and path.startswith(str(tmp_path / "step-000000002-"))
    assert "step 2 not written" in message and "the last good one is step-000000001-" in message
    assert [path.name[:14] for path in tmp_path.iterdir()] == ["step-000000001"]
    assert CheckpointFolder(tmp_path).load()[1] == 1


def test_a_file_is_synced_whole_before_its_rename_and_the_folder_after(tmp_path, monkeypatch):
    folder, calls, fsync, replace = CheckpointFolder(tmp_path), [], os.fsync, os.replace

    def record_fsync(descriptor):
        found = os.fstat(descriptor)
        calls.append(("sync", found.st_ino, found.st_size))
        fsync(descriptor)

    def record_replace(source, target):
        calls.append(("rename", os.stat(source).st_ino))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    file = folder.save({"w": torch.ones(1)}, 1).stat()  # less than a buffer
    assert calls[:2] == [("sync", file.st_ino, file.st_size), ("rename", file.st_ino)]
    assert [call[:2] for call in calls[2:]] == [("sync", tmp_path.stat().st_ino)]


KILLED = """
import sys, torch
from latephase_kernels.train.checkpoints import CheckpointFolder
folder = CheckpointFolder(sys.argv[1])
for step in range(1, 100_000):
    folder.save({"w": torch.full((100_000,), float(step))}, step)
    if step == 3:
        print("started", flush=True)
"""


@pytest.mark.filterwarnings("error:checkpoint")  # of a damaged one
def test_kill_in_the_middle_of_saving(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "started\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    loaded, step = CheckpointFolder(tmp_path).load()
    assert step >= 3 and torch.equal(loaded["w"], torch.full((100_000,), float(step)))
    CheckpointFolder(tmp_path).save({"w": torch.zeros(1)}, step + 1)
    assert not (tmp_path / "unfinished.pt").exists()


KILLED_IN_A_WRITE = """
import resource, signal, sys, torch
from latephase_kernels.train.checkpoints import CheckpointFolder
folder = CheckpointFolder(sys.argv[1])
folder.save({"w": torch.ones(10)}, 1)
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # kills at byte 20000
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
folder.save({"w": torch.zeros(100_000)}, 2)
"""


@pytest.mark.filterwarnings("error:checkpoint")  # of a damaged one
def test_half_a_file_has_no_checkpoints_name(tmp_path):
    run = subprocess.run([sys.executable, "-c", KILLED_IN_A_WRITE, str(tmp_path)])
    assert run.returncode == -signal.SIGXFSZ
    assert max(path.stat().st_size for path in tmp_path.iterdir()) == 20_000
    loaded, step = CheckpointFolder(tmp_path).load()
    assert step == 1 and torch.equal(loaded["w"], torch.ones(10))


def test_a_folder_that_cannot_be_made():
    with pytest.raises(OSError):
        CheckpointFolder("/proc/self/no-such-folder")


def test_random_states_come_back(tmp_path):
    folder = CheckpointFolder(tmp_path)
    random.gauss(0, 1), np.random.randn(), torch.randn(3)  # each generator has drawn, two keep a second value
    folder.save({"random": random_state()}, 1)
    expected = (random.gauss(0, 1), random.random(), np.random.randn(), np.random.rand(), torch.randn(3))
    set_random_state(folder.load()[0]["random"])
    again = (random.gauss(0, 1), random.random(), np.random.randn(), np.random.rand(), torch.randn(3))
    assert again[:4] == expected[:4] and torch.equal(again[4], expected[4])


def test_random_states_of_any_gpu(monkeypatch):
    numbers = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    gpu = SimpleNamespace(
        device_count=lambda: len(numbers),
        get_rng_state=lambda index: numbers[index].get_state(),
        set_rng_state=lambda state, index: numbers[index].set_state(state),
    )
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("xpu"))
    monkeypatch.setattr(torch, "xpu", gpu)
    state = random_state()
    expected = [torch.rand(3, generator=generator) for generator in numbers]
    set_random_state(state)
    assert all(torch.equal(torch.rand(3, generator=g), values) for g, values in zip(numbers, expected))
