"""What the compiler made of the CUDA kernels, and what launches plan for them, from the built library: needs no GPU."""

import ctypes
import itertools
import math
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from cuda_norm_cases import ONE_CASE

import latephase_kernels

LIBRARY = Path(latephase_kernels.__file__).parent / "lib" / "liblatephase_cuda.so"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
DTYPES = {"float": "f", "half": "6__half", "bfloat16": "13__nv_bfloat16"}
WIDTHS = {None: "", "1": ", wide", "2": ", narrow"}  # enum Width of unit.cuh
GAIN_KERNELS = ("gain_kernel", "gain_backward_kernel")
FOLD_KERNELS = ("fold_kernel", "fold_backward_kernel")
LSTM_KERNELS = ("lstm_scale_kernel", "lstm_forward_kernel", "lstm_backward_kernel")
STREAMING_KERNELS = ("statistics_kernel", "apply_kernel", "backward_reduce_kernel", "backward_apply_kernel")
RESIDENT_KERNELS = ("resident_forward_kernel", "resident_backward_kernel")
VIRTUAL_KERNELS = ("virtual_forward_kernel", "virtual_backward_kernel")
ON_CHIP_KERNELS = (*RESIDENT_KERNELS, *VIRTUAL_KERNELS)
# Of each kernel, by its template's last flag or layout: for norms (packed planes: resident kernels alone), for gains.
VARIANTS = {False: ("contiguous", "channels_last", "packed"), True: ("short runs", "long runs")}
WEIGHTS = ("float weight", "own weight")  # of folds: the flag says whether the weight has the data's type
# Threads that a multiprocessor must have registers for: blocks of them together (see ensemble_batch_norm_plan.cuh).
THREADS = 512
RESIDENT_CONTIGUOUS_THREADS = 1024
# Bytes of static shared memory: what block_reduce needs, and none where a plan counts the bytes of a block.
STREAMING_SHARED_BYTES = 8 * 8 * 17 * 4
GAIN_BACKWARD_SHARED_BYTES = 8 * 1024 + 2 * 8 * 36 * 4
FOLD_BACKWARD_SHARED_BYTES = 2 * 8 * 8 * 36 * 4
RESERVED_SHARED_BYTES = 1024  # of every block, by the system
# Of a device: shared memory of a multiprocessor and of a block at most, the system's share of a block, the largest
# cluster, multiprocessors; and the threads of a multiprocessor (CUDA C++ Programming Guide, compute capabilities).
LIMITS = {
    "sm_80": ((164 << 10, 163 << 10, 1024, 1, 108), 2048),
    "sm_86": ((100 << 10, 99 << 10, 1024, 1, 84), 1536),
    "sm_90": ((228 << 10, 227 << 10, 1024, 16, 132), 2048),
    "sm_100": ((228 << 10, 227 << 10, 1024, 16, 148), 2048),
    "sm_120": ((100 << 10, 99 << 10, 1024, 8, 170), 1536),
}
RUNS_ON = {"sm_86": "sm_80", "sm_120": "sm_100"}  # whose machine code, or PTX, it runs
KERNELS = {1: "forward_kernel", 2: "backward_kernel"}  # by the operands that are kept on chip
UNIT = 8  # values of a thread's access
LAYERS = (  # of ResNet-50 and WRN-28-10: rows of a member, channels, height and width
    (32, 64, 56), (32, 128, 28), (32, 256, 14), (32, 512, 7), (128, 160, 32), (128, 320, 16), (128, 640, 8),
)  # fmt: skip


def _cuobjdump(*arguments: str) -> str:
    triton = pytest.importorskip("triton")
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([program, *arguments, LIBRARY], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module", autouse=True)
def _library_is_built():
    if not LIBRARY.exists():
        if os.environ.get("LATEPHASE_REQUIRE_CUDA_BUILD") == "1":
            pytest.fail(f"{LIBRARY} was not built and LATEPHASE_REQUIRE_CUDA_BUILD=1")
        pytest.skip(f"{LIBRARY.name} was not built")


def _short_name(mangled: str) -> str:
    """backward_apply_kernel<bfloat16, channels_last> from its mangled name; on-chip ones end in wide or narrow."""
    arguments = r"(?:I(.*?)(?:Lb|LNS\d_6LayoutE)([012])E(?:LNS_5WidthE([12])E)?)?"
    kernel = re.search(r"\d([a-z][a-z_]*_kernel)" + arguments, mangled)
    if kernel is None:
        return mangled
    name, code, flag, width = kernel.groups()
    dtype = {mangled: dtype for dtype, mangled in DTYPES.items()}.get(code)
    if name in LSTM_KERNELS:
        of = re.match(r"I(f|6__half|13__nv_bfloat16)E", mangled[kernel.end(1) :])
        return f"{name}<{next(d for d, code in DTYPES.items() if of and code == of.group(1))}>"
    if name in FOLD_KERNELS:
        return f"{name}<{dtype}, {WEIGHTS[int(flag)]}>"
    if dtype is not None:
        return f"{name}<{dtype}, {VARIANTS[name in GAIN_KERNELS][int(flag)]}{WIDTHS[width]}>"
    partial = re.search(r"_kernelI\w*?(Moments|Sums)", mangled)
    return f"{name}<{partial.group(1)}>" if partial else name


def _expected_kernels() -> set[str]:
    names = {"take_statistics_kernel", "finalize_kernel<Moments>", "finalize_kernel<Sums>", "gain_merge_kernel"}
    names.add("fold_merge_kernel")
    for dtype in DTYPES:
        names |= {f"{kernel}<{dtype}>" for kernel in LSTM_KERNELS}
        names |= {f"{k}<{dtype}, {w}>" for k in FOLD_KERNELS for w in WEIGHTS if dtype != "float" or w == WEIGHTS[1]}
        names |= {f"{kernel}<{dtype}, {runs}>" for kernel in GAIN_KERNELS for runs in VARIANTS[True]}
        for layout in VARIANTS[False]:
            on_chip = RESIDENT_KERNELS if layout == "packed" else ON_CHIP_KERNELS
            names |= {f"{k}<{dtype}, {layout}, {width}>" for k in on_chip for width in ("wide", "narrow")}
            names |= {f"{kernel}<{dtype}, {layout}>" for kernel in STREAMING_KERNELS if layout != "packed"}
    return names


def _resources() -> list[tuple[str, str, dict[str, int]]]:
    """(architecture, kernel, {"REG": …, "STACK": …, "LOCAL": …, "SHARED": …}) of every kernel in the library."""
    rows, architecture, name = [], None, None
    for line in _cuobjdump("--dump-resource-usage").splitlines():
        if found := re.match(r"arch = (\w+)", line.strip()):
            architecture = found.group(1)
        elif found := re.match(r"Function (\S+):", line.strip()):
            name = _short_name(found.group(1))
        elif "REG:" in line:
            rows.append((architecture, name, {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", line)}))
    return rows


def test_no_kernel_spills():
    rows = _resources()
    print()
    print(f"{'kernel':60} {'architecture':>12} {'registers':>10} {'shared':>7} {'stack':>6} {'local':>6}")
    for architecture, name, used in sorted(rows, key=lambda row: (row[1], ARCHITECTURES.index(row[0]))):
        print(f"{name:60} {architecture:>12} {used['REG']:10} {used['SHARED']:7} {used['STACK']:6} {used['LOCAL']:6}")
    for architecture in ARCHITECTURES:
        assert {name for at, name, _ in rows if at == architecture} == _expected_kernels(), architecture
    assert len(rows) == len(ARCHITECTURES) * len(_expected_kernels())
    assert [row for row in rows if row[2]["STACK"] or row[2]["LOCAL"]] == []
    for architecture, name, used in rows:
        many = name.startswith(RESIDENT_KERNELS) and "contiguous" in name
        assert used["REG"] <= 65536 // (RESIDENT_CONTIGUOUS_THREADS if many else THREADS), (architecture, name)
        reserved = 0 if architecture == "sm_80" else RESERVED_SHARED_BYTES
        static = 0 if name.startswith(ON_CHIP_KERNELS) else STREAMING_SHARED_BYTES
        static = GAIN_BACKWARD_SHARED_BYTES if name.startswith("gain_backward_kernel") else static
        static = FOLD_BACKWARD_SHARED_BYTES if name.startswith("fold_backward_kernel") else static
        assert used["SHARED"] <= reserved + static, (architecture, name)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_vector_paths_use_128_bit_accesses(architecture):
    """On-chip kernels read straight into shared memory (LDGSTS); wide ones move data in no other width.

    Virtual clusters read four blocks' results before they merge the first: each merge divides, by counts alone.
    """
    accesses: dict[str, list[str]] = {}
    reads: dict[str, list[bool]] = {}  # of results (True) and divisions (False), in order
    name = ""
    for line in _cuobjdump("--dump-sass", "--gpu-architecture", architecture).splitlines():
        if found := re.search(r"Function : (\S+)", line):
            name = _short_name(found.group(1))
        elif found := re.search(r"\b((?:LDG|LDGSTS|STG)\.E\S*)", line):
            accesses.setdefault(name, []).append(found.group(1))
        if found := re.search(r"\b(LDG\.E\.64\.STRONG\.GPU|MUFU\.RCP)\b", line):
            reads.setdefault(name, []).append(found.group(1).startswith("LDG"))

    def count(kernel: str, access: str, width: str) -> int:
        return sum(bool(re.fullmatch(rf"{access}\.E\b(?:\.\w+)*", a)) and width in a for a in accesses[kernel])

    for kernel in _expected_kernels():
        if kernel.startswith(STREAMING_KERNELS):
            assert count(kernel, "LDG", ".128") >= 2, kernel
            assert "apply_kernel" not in kernel or count(kernel, "STG", ".128") >= 1, kernel
        elif kernel.startswith((*GAIN_KERNELS, *FOLD_KERNELS, *LSTM_KERNELS)):
            assert count(kernel, "LDG", ".128") >= 2 and count(kernel, "STG", ".128") >= 1, kernel
        elif kernel.startswith(ON_CHIP_KERNELS):
            wide = kernel.endswith("wide>")
            assert (count(kernel, "LDGSTS", ".128") >= 1) == wide, kernel
            assert (count(kernel, "STG", ".128") >= 1) == wide, kernel
            assert (count(kernel, "LDGSTS", ".64") == 0) == wide, kernel
            if kernel.startswith(VIRTUAL_KERNELS):
                assert max(sum(reads[kernel][i : i + 5]) for i in range(len(reads[kernel]))) >= 4, kernel


PLANNED = "blocks threads shared cluster cooperative splits lanes part_threads slots packed".split()


def _plan(sizes: tuple, element_size: int, operands: int, device: tuple) -> dict[str, int] | None:
    """The plan of sizes (K, B, C, S, channels_last) on a device; None: it streams."""
    planned = (ctypes.c_int64 * len(PLANNED))()
    arrays = [(ctypes.c_int64 * 5)(*numbers) for numbers in (sizes, device)]
    function = ctypes.CDLL(str(LIBRARY)).latephase_ensemble_batch_norm_plan
    return dict(zip(PLANNED, planned)) if function(arrays[0], element_size, operands, arrays[1], planned) else None


@pytest.fixture(scope="module")
def registers() -> dict[tuple[str, str], int]:
    """The registers of a thread by (architecture, kernel)."""
    if torch.version.cuda is None:
        pytest.skip("this torch is built without CUDA: the library does not load")
    return {(architecture, name): used["REG"] for architecture, name, used in _resources()}


@pytest.mark.parametrize("architecture", LIMITS)
@pytest.mark.parametrize("operands", KERNELS)
@pytest.mark.parametrize("channels_last", (False, True), ids=("contiguous", "channels_last"))
def test_plans_fit_the_device(registers, architecture, operands, channels_last):
    """Shared memory, registers and threads of the blocks that share a multiprocessor; all data has a place on chip."""
    device, most_threads = LIMITS[architecture]
    per_multiprocessor, per_block, reserved, max_cluster, multiprocessors = device
    layout, code = ("contiguous", "channels_last")[channels_last], RUNS_ON.get(architecture, architecture)
    tiers = set()
    sizes = (1, 5, 32, 128, 256), (1, 7, 64, 640), (1, 49, 64, 196, 289, 784, 3136, 4500, 50176)
    for B, C, S, dtype in itertools.product(*sizes, DTYPES):
        element_size = 4 if dtype == "float" else 2
        plan, alone = (_plan((K, B, C, S, channels_last), element_size, operands, device) for K in (10, 1))
        group_bytes = B * S * element_size * operands * (min(C, 32 // element_size * UNIT) if channels_last else 1)
        if plan is None:
            assert alone is None and group_bytes > per_block, "what fits one block need not stream"
            tiers.add("streaming")
            continue
        assert {**plan, "blocks": 0} == {**alone, "blocks": 0}, "K has no say"
        assert plan["shared"] <= per_block and plan["cluster"] <= max_cluster
        assert plan["blocks"] % plan["splits"] == 0 and plan["blocks"] < 2**31
        slots, parts = plan["slots"], plan["threads"] // plan["part_threads"]
        packed = plan["packed"] > 0
        gates = operands == 2 or (packed and S % UNIT != 0)
        assert plan["shared"] >= slots * (UNIT * element_size * operands + gates)
        positions = B * S if channels_last else B if packed else B * math.ceil(S / UNIT)
        assert plan["splits"] * (slots // parts // plan["lanes"]) >= positions
        assert not packed or ((S % UNIT or S <= 1024) and C * S % UNIT == 0 and plan["lanes"] * UNIT % S == 0)
        if plan["cooperative"]:
            together, kernel = 1 + (plan["blocks"] > multiprocessors), "virtual"
            assert plan["blocks"] <= together * multiprocessors and plan["cluster"] == 1
            assert plan["shared"] <= per_multiprocessor // together - reserved
        else:
            blocks = [n for n in (3, 2, 1) if n * plan["threads"] <= THREADS] if packed else (4, 2, 1)
            together = next(n for n in blocks if plan["shared"] <= per_multiprocessor // n - reserved)
            assert plan["cluster"] == plan["splits"]
            kernel = "resident"
        tiers.add((kernel, plan["cluster"] > 1, plan["threads"] > plan["part_threads"], packed))
        assert together * plan["threads"] <= most_threads
        for width in ("wide", "narrow"):
            used = registers[code, f"{kernel}_{KERNELS[operands]}<{dtype}, {'packed' if packed else layout}, {width}>"]
            warps = together * plan["threads"] // 32
            assert warps * math.ceil(used / 8) * 8 * 32 <= 65536, "registers are given out by eight"
    assert {"streaming", ("virtual", False, False, False)} <= tiers
    assert ("resident", False, False, False) in tiers or architecture == "sm_120", (
        "its clusters of small blocks are first"
    )
    assert (("resident", True, False, False) in tiers) == (max_cluster > 1)
    assert (("resident", False, True, False) in tiers) == (not channels_last)
    assert (("resident", False, False, True) in tiers) == (not channels_last)
    assert (("resident", True, False, True) in tiers) == (not channels_last and max_cluster > 1)


@pytest.mark.parametrize("element_size", (2, 4))
@pytest.mark.parametrize("operands", KERNELS)
@pytest.mark.parametrize("channels_last", (False, True), ids=("contiguous", "channels_last"))
@pytest.mark.parametrize("rows, channels, size", LAYERS, ids=str)
def test_blocks_share_multiprocessors(registers, rows, channels, size, channels_last, operands, element_size):
    """While one waits for its data, another computes; but where a group is more than half of what the device holds."""
    device, _ = LIMITS["sm_90"]
    per_multiprocessor, _, reserved, _, multiprocessors = device
    plan = _plan((10, rows, channels, size * size, channels_last), element_size, operands, device)
    if 2 * (plan["shared"] + reserved) > per_multiprocessor:
        group = rows * size * size * operands * (64 if channels_last else element_size)
        assert group > 0.45 * multiprocessors * per_multiprocessor


@pytest.mark.parametrize("tier", ONE_CASE)
def test_the_small_cases_go_to_their_tiers(registers, tier, monkeypatch):
    batch, channels, shared_kib, cluster = ONE_CASE[tier]
    monkeypatch.setenv("LATEPHASE_CUDA_SHARED_KIB", shared_kib)
    monkeypatch.setenv("LATEPHASE_CUDA_CLUSTER", cluster)
    for channels_last, operands in itertools.product((False, True), KERNELS):
        plan = _plan((2, batch, channels, 49, channels_last), 2, operands, LIMITS["sm_90"][0])
        assert (plan is None) == (tier == "streaming")
        if plan is not None:
            too_large = tier == "one group a block" and channels_last and operands == 2
            assert plan["cooperative"] == (tier == "virtual clusters" or too_large)
            assert (plan["packed"] > 0) == (tier.startswith("packed planes") and not channels_last)
            assert (plan["cluster"] > 1) == (tier in ("clusters", "packed planes in clusters"))
            assert (plan["threads"] > plan["part_threads"]) == (tier == "several groups a block" and not channels_last)


def test_a_margin_leaves_multiprocessors_out_of_virtual_clusters(registers, monkeypatch):
    device, _ = LIMITS["sm_90"]
    sizes, options = (10, 32, 64, 3136, True), (2, 2, device)
    assert _plan(sizes, *options)["cooperative"] and 240 < _plan(sizes, *options)["blocks"] <= 264
    monkeypatch.setenv("LATEPHASE_CUDA_SM_MARGIN", "16")
    assert _plan(sizes, *options) is None or _plan(sizes, *options)["blocks"] <= 116
    monkeypatch.setenv("LATEPHASE_CUDA_SM_MARGIN", "132")
    assert _plan(sizes, *options) is None
