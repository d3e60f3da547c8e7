"""What the compiler made of the CUDA kernels, read from the built library: needs no GPU."""

import os
import re
import subprocess
from pathlib import Path

import pytest

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
# Of each kernel, by its template's last flag: for norms, for gains.
VARIANTS = {False: ("contiguous", "channels_last"), True: ("short runs", "long runs")}
WEIGHTS = ("float weight", "own weight")  # of folds: the flag says whether the weight has the data's type
# Threads that a multiprocessor must have registers for: blocks of them together (see ensemble_batch_norm_plan.cuh).
THREADS = 512
RESIDENT_CONTIGUOUS_THREADS = 1024
# Bytes of static shared memory: what block_reduce needs, and none where a plan counts the bytes of a block.
STREAMING_SHARED_BYTES = 8 * 8 * 17 * 4
GAIN_BACKWARD_SHARED_BYTES = 18 * 1024
FOLD_BACKWARD_SHARED_BYTES = 16 * 1024
RESERVED_SHARED_BYTES = 1024  # of every block, by the system


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
    kernel = re.search(r"\d([a-z][a-z_]*_kernel)(?:I(.*?)Lb([01])E(?:LNS_5WidthE([12])E)?)?", mangled)
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
    names = {"inverse_deviation_kernel", "finalize_kernel<Moments>", "finalize_kernel<Sums>", "gain_merge_kernel"}
    names.add("fold_merge_kernel")
    for dtype in DTYPES:
        names |= {f"{kernel}<{dtype}>" for kernel in LSTM_KERNELS}
        names |= {f"{k}<{dtype}, {w}>" for k in FOLD_KERNELS for w in WEIGHTS if dtype != "float" or w == WEIGHTS[1]}
        names |= {f"{kernel}<{dtype}, {runs}>" for kernel in GAIN_KERNELS for runs in VARIANTS[True]}
        for layout in VARIANTS[False]:
            names |= {f"{kernel}<{dtype}, {layout}>" for kernel in STREAMING_KERNELS}
            names |= {f"{k}<{dtype}, {layout}, {width}>" for k in ON_CHIP_KERNELS for width in ("wide", "narrow")}
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
    """On-chip kernels read straight into shared memory (LDGSTS); wide ones move data in no other width."""
    accesses: dict[str, list[str]] = {}
    name = ""
    for line in _cuobjdump("--dump-sass", "--gpu-architecture", architecture).splitlines():
        if found := re.search(r"Function : (\S+)", line):
            name = _short_name(found.group(1))
        elif found := re.search(r"\b((?:LDG|LDGSTS|STG)\.E\S*)", line):
            accesses.setdefault(name, []).append(found.group(1))

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
