"""Large results of the CPU ops come in pages of 2 MiB, unless that is turned off."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import latephase_kernels as lp

pytestmark = pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists() or lp.backend_for(torch.zeros(1)) != "native",
    reason="needs a Linux with transparent huge pages, and the native kernels",
)


def in_huge_pages(tensor: torch.Tensor) -> bool:
    """Whether the system was asked for huge pages in the middle of a tensor."""
    middle = tensor.data_ptr() + tensor.nbytes // 2
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= middle < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError("a tensor lies outside the memory of the process")


def results_of_a_step() -> list[torch.Tensor]:
    K = 2
    x = torch.randn(16, 64, 100, 100, requires_grad=True)  # 39 MiB, more than the C library keeps from before
    weight, bias = torch.ones(K, 64), torch.zeros(K, 64)
    y = lp.functional.ensemble_batch_norm(x, None, None, weight, bias, training=True, num_members=K, activation="relu")
    z = lp.functional.member_gain(y, weight, bias, activation="relu")
    return [y, z, *torch.autograd.grad(z.sum(), [x, y])]


@pytest.mark.skipif(os.environ.get("LATEPHASE_HUGE_PAGES") == "0", reason="huge pages are turned off")
def test_large_results_ask_for_huge_pages():
    assert all(map(in_huge_pages, results_of_a_step()))
    assert not in_huge_pages(torch.empty(16, 64, 100, 100))  # PyTorch's own do not: the measure tells them apart


def test_they_can_be_turned_off():
    script = "import test_huge_pages as t; assert not any(map(t.in_huge_pages, t.results_of_a_step()))"
    environment = os.environ | {"LATEPHASE_HUGE_PAGES": "0", "PYTHONPATH": os.pathsep.join([*sys.path, "tests"])}
    subprocess.run([sys.executable, "-c", script], env=environment, cwd=Path(__file__).parents[1], check=True)
