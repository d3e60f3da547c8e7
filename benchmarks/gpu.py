"""Everything that needs a GPU, in one command and without a network: build, test, sanitize, time.

    python -m benchmarks.gpu [--parts build test sanitize norm tiers gain norm_gains linear lstm input] [--output DIR]
    python -m benchmarks.gpu --parts step_resnet      # whole training steps; step_wrn, step_densenet, growth, profile
    python -m benchmarks.gpu --device cpu --limit 60  # a rehearsal without a GPU: tests skip, figures are a CPU's

Parts run in this order, each in its share of the time, and what matters most comes first in each. gpu.json is written
after every step: what ran where, how each step ended, and the tests that failed. A step that fails or hangs stops no
other; only a failed build does. Benchmarks check the values of what they time themselves. Whole steps compile whole
networks: each of these parts has the limit to itself, and none runs unless it is named.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tarfile
import time
from pathlib import Path

from benchmarks.steps import PASSED, ROOT, Step, run_together

PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "-p", "benchmarks.outcomes"]
HANGS = 45.0  # seconds of a test
HANGS_COMPILING = 120.0
TIERS = "tests/test_cuda_ensemble_batch_norm_tiers.py"
TESTS = {  # name: files, and what of them; all at the same time
    "norm": (["tests/test_cuda_ensemble_batch_norm.py"], ""),
    "norm tiers": ([TIERS], "not every_cut"),
    "norm cuts": ([TIERS], "every_cut"),
    "norm robustness": (["tests/test_ensemble_batch_norm_robustness.py", "tests/test_backend.py"], ""),
    "gain": (["tests/test_cuda_member_gain.py"], ""),
    "linear": (["tests/test_cuda_rank1_linear.py"], "not triton"),
    "lstm": (["tests/test_cuda_rank1_lstm.py"], "not triton"),
    "graphs": (["tests/test_trainer_passes.py", "tests/test_image_batches.py"], "on_a_gpu"),
    "triton norm float32": (["tests/test_cuda_triton.py"], "norm and float32"),
    "triton norm bfloat16": (["tests/test_cuda_triton.py"], "norm and not float32"),
    "triton gain": (["tests/test_cuda_triton.py"], "gain"),
    "triton linear": (["tests/test_cuda_rank1_linear.py"], "triton"),
    "triton lstm": (["tests/test_cuda_rank1_lstm.py"], "triton"),
}
# One small case of each kernel: the tools slow them down by orders of magnitude.
SANITIZED = "(one_case_of_every_tier or parameters_in_either or (not batch_norm and off_alignment)) and not triton"
SANITIZED_FILES = [TIERS, *(f"tests/test_cuda_{op}.py" for op in ("member_gain", "rank1_linear", "rank1_lstm"))]
OUR_KERNELS = ["--kernel-name", "kns=latephase"]
SANITIZERS = {  # what a tool sees of other kernels it needs only for initcheck: they write what ours read
    "memcheck": [*OUR_KERNELS, "--report-api-errors", "no"],
    "racecheck": OUR_KERNELS,
    "synccheck": OUR_KERNELS,
    "initcheck": [],
}
LIBRARIES_LOAD = (
    "from latephase_kernels import backend; "
    "assert not backend._load_failures.keys() & {{'cpu', '{device}'}}, backend._load_failures"
)
# Seconds of CPU time that the build took on a core of a 2020s server: all of it, and its longest file for one GPU.
BUILD_SECONDS, LONGEST_FILE_SECONDS = 270, 60

BENCHMARKS = {
    **{"norm": "ensemble_batch_norm", "tiers": "tiers", "gain": "member_gain", "norm_gains": "norm_gains"},
    **{"linear": "rank1_linear", "lstm": "rank1_lstm"},
}
STEP_NETWORKS = {"step_wrn": "WRN-28-10", "step_resnet": "ResNet-50", "step_densenet": "DenseNet-161"}
STEPS = (*STEP_NETWORKS, "growth", "profile")
# The most seconds of each part. What one leaves, others may use.
PARTS = {
    **{"build": 240.0, "test": 200.0, "sanitize": 90.0},
    **{"norm": 300.0, "tiers": 60.0, "gain": 60.0, "norm_gains": 60.0, "linear": 90.0, "lstm": 60.0, "input": 90.0},
}
ALL_PARTS = {**PARTS, **dict.fromkeys(STEPS, 590.0)}  # those of STEPS only where they are named


def steps(part: str, output: Path, device: str = "cuda", prebuilt: bool = False) -> list[list[Step]]:
    """Return what a part runs: lists of steps, one list after the other, the steps of a list at the same time."""
    limit = ALL_PARTS[part]
    if part == "build":
        build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        script = '"${@:2}" && "$0" -c "$1"'  # without nvcc a build passes, too, but has no CUDA library
        if prebuilt:
            script = f'"$0" -c "$1" || {{ {script}; }}'
        command = ["bash", "-c", script, sys.executable, LIBRARIES_LOAD.format(device=device), *build]
        return [[Step(part, command, limit)]]
    if part in ("test", "sanitize"):
        return [test_steps(limit) if part == "test" else sanitize_steps(limit)]
    if part == "input":
        bench = [sys.executable, "benchmarks/bench_input.py", "--device", device, "--seconds", "3", "--distinct", "64"]
        bench += ["--chunk", "2", "--output", str(output / f"input_{device}.json")]
        return [[Step(part, bench, limit, needs=("PIL", "torchvision"))]]
    return [[step] for step in (step_steps if part in STEPS else kernel_steps)(part, output, device)]


def test_steps(limit: float) -> list[Step]:
    """Return the tests of every kernel; a few threads each, for they run at the same time."""
    environment = {"OMP_NUM_THREADS": "2"}
    return [
        Step(
            f"test {name}", [*PYTEST, *files, "-k", chosen], limit, environment,
            hangs=HANGS_COMPILING if "triton" in name else HANGS,
        )
        for name, (files, chosen) in TESTS.items()
    ]  # fmt: skip


def sanitize_steps(limit: float) -> list[Step]:
    """Return small cases of every kernel under compute-sanitizer, each tensor an allocation of its own."""
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "2"}
    return [
        Step(
            f"sanitize {tool}",
            ["compute-sanitizer", "--tool", tool, *options, "--error-exitcode", "9", *PYTEST, *SANITIZED_FILES,
             "-k", SANITIZED, "--outcomes", ""],
            limit, environment,
        )
        for tool, options in SANITIZERS.items()
    ]  # fmt: skip


def kernel_steps(part: str, output: Path, device: str) -> list[Step]:
    """Return the benchmarks of one op, in the order of their weight."""
    name = BENCHMARKS[part]

    def timed(dtype: str, *options: str, suffix: str = "") -> Step:
        result = output / f"{name}_{device}_{dtype}{suffix}.json"
        where = ["--device", device, "--dtype", dtype, "--seconds", "0.3", "--output", str(result)]
        command = [sys.executable, f"benchmarks/bench_{name}.py", *where, *options]
        return Step(f"{part} {dtype}{suffix.replace('_', ' ')}", command, ALL_PARTS[part])

    if part == "norm":  # compiled: the peers that the targets name, for the largest shape of each network
        some = ("--compiled-shapes", "1", "--compiled", "plain batch norm", "formula")
        others = ("silu", "hardswish", "relu6")  # activations
        return [
            timed("bfloat16", *some),
            timed("bfloat16", "--residual", *some, "--networks", "ResNet-50", suffix="_residual"),
            timed("float32", "--compiled", "--networks", "WRN-28-10", "ResNet-50"),
            *(timed("bfloat16", "--activation", name, *some, suffix=f"_{name}") for name in others),
        ]
    if part == "tiers":  # so many settings that each has little time
        return [timed("bfloat16", "--seconds", "0.1")]
    return [
        timed(dtype, *(["--no-compile"] if part == "lstm" or (part == "linear" and dtype == "float32") else []))
        for dtype in ("bfloat16", "float32")  # compiling takes minutes
    ]


def step_steps(part: str, output: Path, device: str) -> list[Step]:
    """Return the benchmarks of whole training steps of one network."""

    def timed(script: str, name: str, *options: str) -> Step:
        where = ["--device", device, "--output", str(output / f"{name}.json")]
        command = [sys.executable, f"benchmarks/{script}.py", *where, *options]
        needs = {"growth": ("matplotlib",), "step_wrn": ()}.get(part, ("torchvision",))
        return Step(name.replace("_", " "), command, 590.0, needs=needs)

    if part == "growth":
        return [timed("bench_growth", f"growth_{device}", "--seconds", "60")]
    if part == "profile":
        return [timed("profile_step", f"profile_{device}")]
    network = STEP_NETWORKS[part]
    name, options = f"step_{device}_bfloat16_{network}", ["--networks", network, "--dtype", "bfloat16", "--members"]
    # Compiling takes minutes: once for each network, and not for a DenseNet, which would not be done in time.
    eager = ["--contenders", "plain", "members in turn", "ours, fused", "ours, CUDA graph", "floor: no norm, no ReLU"]
    if part == "step_densenet":
        return [timed("bench_step", name, *options, "10", "4", "1", "--seconds", "30", *eager)]
    return [
        timed("bench_step", name, *options, "10", "--seconds", "40"),
        timed("bench_step", f"{name}_members", *options, "4", "1", "--seconds", "20", *eager),
    ]


def facts(commit: str | None) -> dict:
    """Return where this runs, for a reader of the figures."""
    import torch

    def first_line(*command: str) -> str | None:
        try:
            return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.split("\n")[0]
        except (OSError, subprocess.CalledProcessError):
            return None

    device = torch.cuda.get_device_properties() if torch.cuda.is_available() else None
    return {
        "device": device and device.name,
        "multiprocessors": device and device.multi_processor_count,
        "memory GiB": device and round(device.total_memory / 2**30, 1),
        "driver": first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "triton": first_line(sys.executable, "-c", "import triton; print(triton.__version__)"),
        "python": platform.python_version(),
        "nvcc": (first_line("bash", "-c", "nvcc --version | grep release") or "").strip() or None,
        "commit": commit or first_line("git", "rev-parse", "HEAD"),
    }


def write(report: dict, output: Path, archive: Path | None) -> None:
    """Write gpu.json, and everything in one file if that is asked for."""
    (output / "gpu.json").write_text(json.dumps(report, indent=2) + "\n")
    if archive is not None:
        part = archive.with_name(f"{archive.name}.part")
        try:
            with tarfile.open(part, "w:gz") as tar:
                tar.add(output, output.name)
            part.replace(archive)
        except OSError as error:  # a file changed meanwhile: the next step's archive will have it
            print(f"archive: {error}", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=list(ALL_PARTS), default=list(PARTS))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--archive", type=Path, help="a .tar.gz of all that is in the output, written after every step")
    parser.add_argument("--limit", type=float, default=590.0, help="seconds in all (default 590)")
    parser.add_argument("--prebuilt", action="store_true", help="build only if the libraries there do not load")
    parser.add_argument("--commit", help="of the sources, where git cannot tell")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: a rehearsal")
    return parser.parse_args()


def main() -> int:
    """Run the parts, print one line each, write gpu.json; return 0 if all passed."""
    arguments = parse()
    end = time.monotonic() + arguments.limit
    # Behind what is on PATH: where CUDA's installers put nvcc and compute-sanitizer without putting them there.
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"])
    report = {**facts(arguments.commit), "parts": {}}
    if report["device"] is None and arguments.device == "cuda":
        sys.exit("benchmarks.gpu: torch sees no CUDA device here; `--device cpu` rehearses without one")
    print(json.dumps(report), flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    for part in (part for part in ALL_PARTS if part in arguments.parts):
        if part == "build" and not arguments.prebuilt:
            expected = max(LONGEST_FILE_SECONDS, BUILD_SECONDS / (os.cpu_count() or 1))
            print(f"build: about {expected:.0f} s on {os.cpu_count()} cores", flush=True)
        found: dict[str, dict] = {}
        report["parts"][part] = found

        def ended(name: str, step: dict, found: dict[str, dict] = found) -> None:
            found[name] = step
            write(report, arguments.output, arguments.archive)
            print(f"{name:24} {step['seconds']:7.1f} s  {step['ended']}", flush=True)

        part_end = min(end, time.monotonic() + ALL_PARTS[part])
        for together in steps(part, arguments.output, arguments.device, arguments.prebuilt):
            run_together(together, arguments.output, part_end, ended)
        if part == "build" and found["build"]["ended"] != PASSED:
            print("nothing else is run", flush=True)
            break
    return 0 if all(step["ended"] == PASSED for part in report["parts"].values() for step in part.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
