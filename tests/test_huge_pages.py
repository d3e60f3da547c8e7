"""Large results of the CPU ops ask for pages of 2 MiB where that pays, or where it is asked for."""

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


def free_memory_goes_back_to_a_host() -> bool:
    order = Path("/sys/module/page_reporting/parameters/page_reporting_order")
    return order.exists() and 0 <= int(order.read_text()) <= 62


@pytest.mark.parametrize("setting", ["1", "0", None])
def test_large_results_ask_for_huge_pages(setting):
    """In a process of its own: the first large result decides. PyTorch's own tensors do not ask."""
    asked = not free_memory_goes_back_to_a_host() if setting is None else setting == "1"
    script = (
        f"import test_huge_pages as t; assert {{t.in_huge_pages(x) for x in t.results_of_a_step()}} == {{{asked}}}; "
        "assert not t.in_huge_pages(t.torch.empty(16, 64, 100, 100))"
    )
    environment = {key: value for key, value in os.environ.items() if key != "LATEPHASE_HUGE_PAGES"}
    environment["PYTHONPATH"] = os.pathsep.join([*sys.path, str(Path(__file__).parent)])
    if setting is not None:
        environment["LATEPHASE_HUGE_PAGES"] = setting
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
