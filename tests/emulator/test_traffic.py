"""What the CUDA kernels move to and from memory, counted: each tier reads and writes no more than its floor.

Whether a GPU does that at the speed of its memory, only a GPU can tell; that nothing is moved twice, no time can.
"""

import ctypes
import math
import os

import pytest
import torch
from cuda_norm_cases import LAYOUTS, case_of, normal, op_arguments

from latephase_kernels import backend
from latephase_kernels.ops import registry

pytestmark = pytest.mark.skipif("LATEPHASE_EMULATOR_LIBRARY" not in os.environ, reason="tests/emulator/run.py runs it")

SECTOR_BYTES = 32
DTYPES = (torch.bfloat16, torch.float32)
ONE_PASS = {  # shape (K, B, C, spatial), shared memory of a block in KiB, largest cluster
    "several groups a block": ((2, 3, 16, (36, 36)), "227", "16"),
    "one group a block": ((2, 13, 8, (36, 36)), "227", "16"),
    "clusters": ((2, 16, 8, (48, 48)), "32", "16"),
    "packed planes": ((2, 32, 16, (16, 16)), "227", "16"),
    "packed planes in clusters": ((2, 32, 8, (32, 32)), "32", "16"),
    "rows of 98 bytes, packed": ((2, 32, 64, (7, 7)), "227", "16"),
    "rows of 98 bytes": ((2, 32, 13, (7, 7)), "227", "16"),
    "virtual clusters": ((2, 32, 8, (32, 32)), "12", "1"),
}


@pytest.fixture(autouse=True)
def _native():
    backend.set_backend("native")
    yield
    backend.set_backend("auto")


class Traffic(ctypes.Structure):
    """As in machine.h: sectors that instructions moved, different ones among them, wavefronts of shared memory."""

    _names = "loaded stored different_loaded different_stored wavefronts least_wavefronts instructions"
    _fields_ = tuple((name, ctypes.c_int64) for name in _names.split())


def counted(call):
    """Return call()'s result and the traffic of its kernels."""
    library, traffic = ctypes.CDLL(os.environ["LATEPHASE_EMULATOR_LIBRARY"]), Traffic()
    library.emulator_count_traffic()
    result = call()
    library.emulator_traffic(ctypes.byref(traffic))
    return result, traffic


def sectors(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors) / SECTOR_BYTES


def norm_traffic(shape, dtype, layout):
    """Return the traffic of norm, add and ReLU with its floor (loads, stores), and the same of the backward."""
    case = case_of(shape, dtype, layout, residual=True)
    forward = registry.op(registry.NATIVE, "ensemble_batch_norm")
    backward = registry.op(registry.NATIVE, "ensemble_batch_norm_backward")
    (y, mean, rstd, _, mask), there = counted(lambda: forward(*op_arguments(case, shape[0], "relu")))
    saved = (case["dy"], case["input"], mean, rstd, case["weight"], case["bias"], mask)
    _, back = counted(lambda: backward(*saved, True, shape[0], "relu", True))
    return (there, (sectors(y, y), sectors(y, mask))), (back, (sectors(y, y, mask), sectors(y, y)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tier", ONE_PASS)
def test_on_chip_tiers_move_each_byte_once(tier, layout, dtype, monkeypatch):
    shape, shared_kib, cluster = ONE_PASS[tier]
    monkeypatch.setenv("LATEPHASE_CUDA_SHARED_KIB", shared_kib)
    monkeypatch.setenv("LATEPHASE_CUDA_CLUSTER", cluster)
    for traffic, (loads, stores) in norm_traffic(shape, dtype, layout):
        assert loads <= traffic.different_loaded <= 1.02 * loads
        assert stores <= traffic.different_stored <= 1.02 * stores
        # Pieces narrower than a vector, in slots of a vector or two, meet in the banks.
        narrow = shape[3] == (7, 7) and shape[2] % 8 != 0
        assert traffic.wavefronts <= (1.6 if narrow else 1.2) * traffic.least_wavefronts


@pytest.mark.parametrize(
    "layout, shape, most",
    (
        ("contiguous", (1, 32, 8, (56, 56)), (34, 37)),
        ("contiguous", (1, 13, 64, (32, 32)), (37, 36)),
        ("contiguous", (1, 13, 64, (8, 8)), (37, 36)),
        ("contiguous", (1, 32, 64, (14, 14)), (43, 43)),
        ("contiguous", (1, 32, 64, (7, 7)), (43, 43)),
        ("channels_last", (1, 13, 64, (32, 32)), (32, 36)),
    ),
    ids=str,
)
def test_instructions_leave_room_for_the_memory(layout, shape, most):
    """Of PTX, nearly twice those of machine code, for a value in bfloat16 with residual and ReLU.

    A multiprocessor issues 128 a cycle (32 lanes, 4 schedulers) while 20 bytes come and go on an H200: for the 6 bytes
    of a value forward and its 8 backward there are 38 and 51.
    """
    values = math.prod((*shape[:3], *shape[3]))
    for (traffic, _), limit in zip(norm_traffic(shape, torch.bfloat16, layout), most, strict=True):
        assert traffic.instructions * 32 / values <= limit


@pytest.mark.parametrize("layout", LAYOUTS)
def test_streaming_reads_twice_and_writes_once(layout, monkeypatch):
    monkeypatch.setenv("LATEPHASE_CUDA_SHARED_KIB", "0")
    shape = (2, 64, 16, (32, 32))
    (there, (loads, stores)), (back, (loads_back, stores_back)) = norm_traffic(shape, torch.bfloat16, layout)
    # x twice and the residual once; dy and x twice; and each thread's parameters, by vectors
    assert 1.5 * loads <= there.loaded <= 1.7 * loads
    assert 2 * loads_back <= back.loaded <= 2.4 * loads_back
    assert there.stored <= 1.06 * stores and back.stored <= 1.06 * stores_back


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ((16, 32, 32, 32), (16, 64, 8, 8), (32, 64, 7, 7)), ids=str)
def test_gains_move_each_byte_once(shape, layout, dtype):
    x, dy = (normal(shape, dtype, layout, seed=seed) for seed in (1, 2))
    gain, bias = (normal((1, shape[1]), torch.float32, seed=seed) for seed in (3, 4))
    y, there = counted(lambda: registry.op(registry.NATIVE, "member_gain")(x, gain, bias, 1, "relu"))
    assert there.different_loaded <= 1.02 * sectors(x) and there.different_stored <= 1.02 * sectors(y)
    backward = registry.op(registry.NATIVE, "member_gain_backward")
    _, back = counted(lambda: backward(dy, x, gain, bias, 1, "relu"))
    assert back.different_loaded <= 1.04 * sectors(x, dy)  # partial sums beside
    assert back.different_stored <= 1.04 * sectors(x)
    assert back.wavefronts <= 1.3 * back.least_wavefronts
    assert max(there.instructions / 22, back.instructions / 42) * 32 <= x.numel()  # of PTX for a value


def test_folded_weights_are_written_once_and_their_products_read_once():
    K, out, inputs = 4, 96, 512
    weight, s, r = (
        normal((out, inputs), torch.bfloat16),
        normal((K, inputs), torch.float32),
        normal((K, out), torch.float32),
    )
    folded = torch.empty(K, out, inputs, dtype=torch.bfloat16, device="cuda")
    _, there = counted(lambda: registry.op(registry.NATIVE, "rank1_fold")(weight, s, r, folded))
    assert there.different_stored == sectors(folded) and there.different_loaded <= 1.02 * sectors(weight, s, r)
    assert there.loaded <= 2.5 * sectors(folded)  # a member's gains for every second row, from L1
    backward = registry.op(registry.NATIVE, "rank1_fold_backward")
    dweight = torch.zeros(out, inputs, device="cuda")
    _, back = counted(lambda: backward(folded, weight, s, r, dweight))
    assert back.different_loaded <= 1.1 * sectors(folded, weight, s, r, dweight)  # partial sums beside
    assert back.wavefronts <= 1.1 * back.least_wavefronts
