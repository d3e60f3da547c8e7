"""Builds the kernel libraries with ninja; everything else is in pyproject.toml.

latephase_kernels/lib/liblatephase_cpu.so   on Linux and macOS, wherever there is a C++ compiler
latephase_kernels/lib/liblatephase_cuda.so  wherever there is nvcc as well, GPU or none, CUDA torch or not

Both use the LibTorch stable ABI only, so one wheel serves every Python and every torch >= 2.10.
Run on Linux, x86-64 and (emulated) aarch64; for macOS it was compiled and linked only.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.extension import Extension

ROOT = Path(__file__).parent.resolve()
CPU_FLAGS = (
    "-std=c++20 -O3 -fPIC -fvisibility=hidden -ffp-contract=off "
    "-Wall -Wno-psabi -Wno-maybe-uninitialized -Wno-unknown-warning-option"
)
# The namespaces of csrc/cpu/instruction_set.h. Baseline is v2 (2009): without SSE4.1 GCC 12 fails on vector selects.
ISA_FLAGS = (
    {"baseline": "-march=x86-64-v2", "x86_64_v3": "-march=x86-64-v3", "x86_64_v4": "-march=x86-64-v4"}
    if platform.machine() in ("x86_64", "AMD64")
    else {"baseline": ""}
)
OLDEST_NVCC = (12, 8)  # the first that compiles for compute capability 10.0
NVCC_FLAGS = (
    "-std=c++20 -O3 -Xcompiler -fPIC -Xcompiler -fvisibility=hidden -DUSE_CUDA --threads 0 --compress-mode=size "
    "-gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90 "
    "-gencode arch=compute_100,code=[sm_100,compute_100]"
)


def nvcc() -> str | None:
    """CUDA_HOME's nvcc, that on PATH, or that where CUDA's installers put it; None if there is none."""
    home = os.environ.get("CUDA_HOME")
    folders = [*([f"{home}/bin"] if home else []), os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
    return shutil.which("nvcc", path=os.pathsep.join(folders))


def cuda_toolkit() -> tuple[str, str] | None:
    """The toolkit that nvcc belongs to, and -L for its libraries; nvcc may be a wrapper, so ask it."""
    if (program := nvcc()) is None:
        return None
    plan = subprocess.run([program, "--dryrun", "x.cu"], capture_output=True, text=True).stderr
    top, libraries = (re.search(rf"\b{name}=(.*)", plan) for name in ("TOP", "LIBRARIES"))
    if top is None:
        return None
    folder = os.path.realpath(top[1].strip())
    return folder, f"-L{folder}/lib64 {libraries[1].strip() if libraries else ''}"


def compiler() -> str | None:
    """The C++ compiler: CXX, or the first that runs; what macOS has in place of one that is not installed does not."""
    if os.environ.get("CXX"):
        return os.environ["CXX"]
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name) and subprocess.run([name, "--version"], capture_output=True).returncode == 0:
            return name
    return None


def release_of(cuda: str) -> tuple[int, ...]:
    text = subprocess.run([f"{cuda}/bin/nvcc", "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", text)
    return tuple(map(int, found.groups())) if found else OLDEST_NVCC


def torch_folder() -> Path:
    try:
        import torch
    except ImportError:
        sys.exit(
            "latephase_kernels: building the kernels needs torch >= 2.10 in the environment that builds.\n"
            "Install it there and build without isolation:\n"
            "    pip install torch ninja setuptools && pip install --no-build-isolation ."
        )
    return Path(torch.__file__).parent


def ninja_file(torch: Path, cxx: str, cuda: tuple[str, str] | None) -> str:
    """The whole build as a ninja file for build/kernels; paths in the checkout are relative to that."""
    lines = [
        "rule cxx\n command = $cxx_compiler $flags -MMD -MF $out.d -c $in -o $out\n depfile = $out.d",
        "rule nvcc\n command = $nvcc $flags -MD -MF $out.d -c $in -o $out\n depfile = $out.d",
        "rule link\n command = $cxx_compiler -shared $in -o $out $libs",
        f"cxx_compiler = {cxx}",
    ]
    include = shlex.quote(f"-I{torch / 'include'}")
    # Error messages have __FILE__: csrc/…, not where this checkout and its torch happen to lie.
    no_paths = [shlex.quote(f"-ffile-prefix-map={folder}/=") for folder in ("../..", torch / "include")]
    objects = []
    for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
        is_kernel = source.name.endswith(".kernel.cpp")
        for isa, flags in ISA_FLAGS.items() if is_kernel else [("", include)]:
            objects.append(f"{source.stem}{'.' * bool(isa)}{isa}.o")
            define = f"-DLATEPHASE_ISA={isa}" if isa else ""
            lines.append(
                f"build {objects[-1]}: cxx ../../csrc/cpu/{source.name}\n"
                f" flags = {CPU_FLAGS} {' '.join(no_paths)} {flags} {define}"
            )
    all_needed = "" if sys.platform == "darwin" else "-Wl,--no-as-needed"  # there every library named is kept
    torch_libraries = shlex.quote(f"-L{torch / 'lib'}")
    libs = f"{torch_libraries} {all_needed} -ltorch_cpu -ltorch -lc10"
    lines.append(f"build lib/liblatephase_cpu.so: link {' '.join(objects)}\n libs = {libs}")
    if cuda is not None:
        folder, cuda_libraries = cuda
        lines.append(f"nvcc = {folder}/bin/nvcc")
        objects = []
        for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
            objects.append(f"{source.stem}.cuda.o")
            flags = " ".join([NVCC_FLAGS, *(f"-Xcompiler {flag}" for flag in no_paths)])
            lines.append(f"build {objects[-1]}: nvcc ../../csrc/cuda/{source.name}\n flags = {flags} {include}")
        stub = ""
        if not (torch / "lib" / "libtorch_cuda.so").exists():
            # A torch without CUDA: an empty library of that name leaves the right entry for the torch that loads it.
            stub = "stub/libtorch_cuda.so"
            lines.append(
                "rule stub\n command = $cxx_compiler -shared -Wl,-soname,libtorch_cuda.so -x c++ /dev/null -o $out"
            )
            lines.append(f"build {stub}: stub")
        lines.append(
            f"build lib/liblatephase_cuda.so: link {' '.join(objects)}{' | ' * bool(stub)}{stub}\n"
            f" libs = {'-Lstub' * bool(stub)} {libs} -ltorch_cuda {cuda_libraries} -lcudart_static -ldl -lrt -lpthread"
        )
    return "\n".join(lines) + "\n"


def without_kernels(why: str) -> None:
    print(f"latephase_kernels: {why}: installing without kernels (slower, plain PyTorch)", file=sys.stderr)


class BuildKernels(build_ext):
    """Build both libraries into build/kernels and copy them beside the package."""

    def run(self) -> None:
        if not (ROOT / "csrc").is_dir():
            sys.exit(
                f"latephase_kernels: {ROOT} has no csrc, the kernels' sources; build from the repository or an sdist"
            )
        if sys.platform == "win32":
            return without_kernels("they are for Linux and macOS (on Windows, WSL has them)")
        if os.environ.get("LATEPHASE_WITHOUT_KERNELS"):
            return without_kernels("LATEPHASE_WITHOUT_KERNELS is set")
        if (cxx := compiler()) is None:
            return without_kernels("no C++ compiler")
        import ninja

        cuda = cuda_toolkit()
        if cuda is not None and (release := release_of(cuda[0])) < OLDEST_NVCC:
            print(
                f"latephase_kernels: {cuda[0]} has nvcc {'.'.join(map(str, release))}, and the CUDA kernels need "
                f"{'.'.join(map(str, OLDEST_NVCC))}: installing without them (GPUs use Triton)",
                file=sys.stderr,
            )
            cuda = None
        elif cuda is None and sys.platform == "linux":
            print(
                "latephase_kernels: no nvcc in CUDA_HOME, on PATH or in /usr/local/cuda: installing without the CUDA "
                "kernels (GPUs use Triton)",
                file=sys.stderr,
            )
        folder = ROOT / "build" / "kernels"
        lib = folder / "lib"
        lib.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_file(torch_folder(), cxx, cuda))
        if subprocess.run([os.path.join(ninja.BIN_DIR, "ninja"), "-C", str(folder)]).returncode != 0:
            sys.exit(
                "latephase_kernels: the kernels did not compile (the compiler's messages are above). They need g++ 11, "
                "clang++ 14 or newer; CXX=… names another compiler, LATEPHASE_WITHOUT_KERNELS=1 installs without "
                "kernels (slower, plain PyTorch)"
            )
        target = (ROOT if self.editable_mode or self.inplace else Path(self.build_lib)) / "latephase_kernels" / "lib"
        target.mkdir(parents=True, exist_ok=True)
        for library in lib.glob("*.so"):
            copy = target / f"{library.name}.new"
            shutil.copy2(library, copy)
            copy.replace(target / library.name)  # a process that has the old one loaded keeps it

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class AnyPythonWheel(bdist_wheel):
    """The libraries are tied to a platform, not to a Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class WithKernels(Distribution):
    def has_ext_modules(self) -> bool:
        return True


setup(
    distclass=WithKernels,
    ext_modules=[Extension("latephase_kernels.lib", [])],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": AnyPythonWheel},
)
