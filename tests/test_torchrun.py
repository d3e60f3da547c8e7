"""`torchrun … latephase train` and `--resume` by one process, from the outside."""

import json
import os
import subprocess
import sys

import pytest
import torch

from latephase_kernels.cli import main

pytest.importorskip("jsonargparse")
pytest.importorskip("torchmetrics")
pytest.importorskip("safetensors")

SMALL = [
    "digits", "--model.options={widths: [4, 4]}", "--epochs=2", "--late.start=1", "--late.members=2", "--batch_size=60",
    "--evaluate_every=1", "--schedule.anneal_start=1", "--schedule.anneal_end=2", "--device=cpu",
]  # fmt: skip


def run(*command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)


def test_two_processes_write_one_run_that_one_process_goes_on_with(tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "latephase_kernels", "train"]
    folder = tmp_path / "run"
    first = run(*torchrun, *SMALL, f"--output={folder}", "--parallel.member_ranks=2")
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("written to") == 1 and first.stderr.count("epoch 2 of 2") == 1
    results = json.loads((folder / "results.json").read_text())
    assert {"averaged", "ensemble", "member 0", "member 1"} <= results["metrics"].keys()
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    torch.set_num_threads(1)
    assert main(["train", *SMALL, f"--output={folder}", "--resume"]) == 0
    resumed = json.loads((folder / "results.json").read_text())
    assert resumed["metrics"]["averaged"]["nll"] == pytest.approx(results["metrics"]["averaged"]["nll"], rel=1e-4)
