"""Runs tests of the CUDA kernels without a GPU: python tests/emulator/run.py [arguments of pytest].

The library's own object files are linked to an emulated CUDA runtime (runtime.cpp), which interprets the PTX that they
hold, and checks all it runs: bounds and alignment of every access, races and unwritten values in shared memory,
barriers, deadlocks. What it cannot show: speed, the code that ptxas makes of the PTX, several streams, CUDA graphs.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
KERNELS = ROOT / "build" / "kernels"  # where setup.py built the library
BUILD = ROOT / "build" / "emulator"
LIBRARY, ALLOCATIONS, PTX = BUILD / "libemulated.so", BUILD / "liballocations.so", BUILD / "ptx"
FLAGS = "-std=c++20 -O3 -march=native -fPIC -fvisibility=hidden -Wall -Wno-psabi -Wno-restrict".split()


def build() -> None:
    objects = sorted(KERNELS.glob("*.cuda.o"))
    if not objects:
        print(f"run.py: no object files of CUDA kernels in {KERNELS}: install with nvcc on PATH, then run again")
        sys.exit(os.environ.get("LATEPHASE_REQUIRE_CUDA_BUILD") == "1")
    inputs = [*objects, *HERE.glob("*.*")]
    if LIBRARY.exists() and LIBRARY.stat().st_mtime > max(file.stat().st_mtime for file in inputs):
        return
    print("building the emulator …", flush=True)
    shutil.rmtree(PTX, ignore_errors=True)
    PTX.mkdir(parents=True)
    packages = Path(sysconfig.get_path("purelib"))
    cuobjdump = packages / "triton" / "backends" / "nvidia" / "bin" / "cuobjdump"
    for file in objects:
        subprocess.run([cuobjdump, "-xptx", "all", file], cwd=PTX, check=True, stdout=subprocess.DEVNULL)
    cuda = re.search(r"nvcc = (.*)/bin/nvcc", (KERNELS / "build.ninja").read_text())[1]
    to_ptx = [f"{cuda}/bin/nvcc", "-std=c++20", "-ptx", "-arch=compute_90", HERE / "faulty.cu"]
    subprocess.run([*to_ptx, "-o", PTX / "faulty.ptx"], check=True)
    cxx = os.environ.get("CXX", "c++")
    subprocess.run([cxx, *FLAGS, "-shared", HERE / "allocations.cpp", "-o", ALLOCATIONS, "-ldl"], check=True)
    sources = [*FLAGS, f"-I{cuda}/include", HERE / "runtime.cpp", *objects]
    torch = [f"-L{packages / 'torch' / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu", "-ltorch", "-lc10", "-ldl"]
    subprocess.run([cxx, "-shared", "-Wl,-Bsymbolic", *sources, "-o", LIBRARY, *torch], check=True)


if __name__ == "__main__":
    build()
    keep_memory = "glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=4294967296"
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "GLIBC_TUNABLES": keep_memory,
        "LD_PRELOAD": str(ALLOCATIONS),
        "LATEPHASE_EMULATOR_PTX": str(PTX),
        "LATEPHASE_EMULATOR_LIBRARY": str(LIBRARY),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")])),
    }
    arguments = [sys.executable, "-m", "pytest", "-p", "emulated_gpu", *sys.argv[1:]]
    os.execve(sys.executable, arguments, environment)
