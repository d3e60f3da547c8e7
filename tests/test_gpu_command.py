"""`python -m benchmarks.gpu` on a machine without one: what it would run exists, and it says what it needs."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return pytest.importorskip("benchmarks.gpu")


def test_what_it_runs_exists(gpu, tmp_path):
    for part in gpu.ALL_PARTS:
        for command in gpu.commands(part, tmp_path):
            files = [ROOT / argument for argument in command if argument.endswith(".py")]
            assert files and all(file.is_file() for file in files), command
    for part in gpu.STEPS:
        for _, script, *options in gpu.commands(part, tmp_path):
            known = (ROOT / script).read_text()
            assert all(f'"{option}"' in known for option in options if option.startswith("--")), part
    sanitize = gpu.commands("sanitize", tmp_path)[0]
    pytest_command = sanitize[sanitize.index(sys.executable) :]
    found = subprocess.run([*pytest_command, "--collect-only"], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0 and "one_case_of_every_tier" in found.stdout and "member_gain" in found.stdout
    assert sum(gpu.PARTS.values()) == pytest.approx(1.0)


def test_a_part_that_fails_or_hangs_is_named(gpu, tmp_path, monkeypatch):
    slow = [[sys.executable, "-c", "print('begun', flush=True); import time; time.sleep(60)"]]
    for command, ended in (
        ([[sys.executable, "-c", "raise SystemExit(3)"]], "failed with exit code 3; see gpu_test.log"),
        ([["no-such-program"]], "failed: no-such-program is not installed"),
        (slow, "ran out of its 2 s"),
        ([[sys.executable, "-c", "print(1)"]], "passed"),
    ):
        monkeypatch.setattr(gpu, "commands", lambda part, output, command=command: command)
        assert gpu.run_part("test", tmp_path, 2)["ended"] == ended
        if command is slow:
            assert (tmp_path / "gpu_test.log").read_text() == "begun\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so():
    run = subprocess.run([sys.executable, "-m", "benchmarks.gpu"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and "torch sees no CUDA device here" in run.stderr
