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
VECTOR_KERNELS = ("statistics_kernel", "apply_kernel", "backward_reduce_kernel", "backward_apply_kernel")


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
    """backward_apply_kernel<bfloat16, channels_last> from its mangled name."""
    kernel = re.search(r"\d([a-z][a-z_]*_kernel)(?:I(.*?)Lb([01])E)?", mangled)
    if kernel is None:
        return mangled
    name, code, channels_last = kernel.groups()
    dtype = {mangled: dtype for dtype, mangled in DTYPES.items()}.get(code)
    if dtype is not None:
        return f"{name}<{dtype}, {'channels_last' if channels_last == '1' else 'contiguous'}>"
    partial = re.search(r"_kernelI\w*?(Moments|Sums)", mangled)
    return f"{name}<{partial.group(1)}>" if partial else name


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
    kernels = {architecture: {name for at, name, _ in rows if at == architecture} for architecture in ARCHITECTURES}
    assert {architecture for architecture, *_ in rows} == set(ARCHITECTURES)
    assert kernels["sm_80"] == kernels["sm_90"] == kernels["sm_100"]
    for kernel in VECTOR_KERNELS:
        for dtype in DTYPES:
            for layout in ("contiguous", "channels_last"):
                assert f"{kernel}<{dtype}, {layout}>" in kernels["sm_90"]
    assert [row for row in rows if row[2]["STACK"] or row[2]["LOCAL"]] == []


def test_vector_paths_use_128_bit_accesses():
    loads: dict[str, int] = {}
    stores: dict[str, int] = {}
    name = ""
    for line in _cuobjdump("--dump-sass", "--gpu-architecture", "sm_90").splitlines():
        if found := re.search(r"Function : (\S+)", line):
            name = _short_name(found.group(1))
        loads[name] = loads.get(name, 0) + bool(re.search(r"\bLDG\.E\.128", line))
        stores[name] = stores.get(name, 0) + bool(re.search(r"\bSTG\.E\.128", line))
    vector_kernels = [name for name in loads if name.startswith(VECTOR_KERNELS)]
    assert len(vector_kernels) == len(VECTOR_KERNELS) * len(DTYPES) * 2
    assert [name for name in vector_kernels if loads[name] < 2] == []
    assert [name for name in vector_kernels if "apply_kernel" in name and stores[name] < 1] == []
