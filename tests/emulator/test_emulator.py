"""The emulator itself: right results of a kernel without a fault, and each fault of faulty.cu found."""

import ctypes
import os

import pytest
import torch

pytestmark = pytest.mark.skipif("LATEPHASE_EMULATOR_LIBRARY" not in os.environ, reason="tests/emulator/run.py runs it")

FAULTS = {
    "beyond_the_end": "is outside",
    "misaligned": "misaligned global address",
    "no_barrier": "race in shared memory",
    "no_warp_barrier": "race in shared memory",
    "written_while_read": "race in shared memory",
    "never_written": "that nothing has written",
    "half_at_the_barrier": "after threads of the block have ended",
    "waits_for_ever": "no end in sight",
    "copy_not_awaited": "before its copies",
    "not_released": "race in shared memory",
    "ended_too_early": "of a block that has ended",
}
BLOCKS, THREADS, CLUSTER = 4, 64, 2


def run(kernel: str) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Return what the kernel was given, what it wrote, and what was found."""
    emulate = ctypes.CDLL(os.environ["LATEPHASE_EMULATOR_LIBRARY"]).emulator_run
    emulate.restype = ctypes.c_char_p
    given, written = torch.rand(BLOCKS * THREADS), torch.empty(BLOCKS * THREADS)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (given, written)]
    arguments = (ctypes.c_void_p * 2)(*(ctypes.addressof(p) for p in pointers))
    return given, written, emulate(kernel.encode(), BLOCKS, THREADS, CLUSTER, arguments).decode()


def test_a_sound_kernel():
    given, written, found = run("sound")
    assert found == ""
    torch.testing.assert_close(written[:BLOCKS], given.view(BLOCKS, THREADS).sum(1))
    assert written[BLOCKS:].isnan().all(), "memory is not filled with NaNs"


@pytest.mark.parametrize("kernel", FAULTS)
def test_a_fault_is_found(kernel):
    *_, found = run(kernel)
    assert FAULTS[kernel] in found, found
