"""Everything that needs a GPU, in one command and without a network: build, test, sanitize, time.

    python -m benchmarks.gpu [--parts build test sanitize norm gain linear lstm input] [--output FOLDER]
    python -m benchmarks.gpu --parts step_resnet      # whole training steps; step_wrn, step_densenet, growth, profile

Each part is a process with a share of the time limit; one that fails or runs out of time does not stop the others, but
nothing is timed whose tests fail. gpu.json says what ran where; each part's output lies beside it. Whole steps compile
whole networks: each of these parts has the limit to itself, and none runs unless it is named.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTEST = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
KERNEL_TESTS = [
    "tests/test_cuda_ensemble_batch_norm.py",
    "tests/test_cuda_ensemble_batch_norm_tiers.py",
    "tests/test_cuda_member_gain.py",
    "tests/test_cuda_rank1_linear.py",
    "tests/test_cuda_rank1_lstm.py",
    "tests/test_ensemble_batch_norm_robustness.py",
]
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")


def commands(part: str, output: Path) -> list[list[str]]:
    """Return what a part runs, one after the other."""
    if part == "build":
        return [[sys.executable, "setup.py", "-q", "build_ext", "--inplace"]]
    if part == "test":
        return [[*PYTEST, *KERNEL_TESTS]]
    if part == "sanitize":  # one small case of each kernel: the tools slow them down by orders of magnitude
        some = "(one_case_of_every_tier or parameters_in_either or (not batch_norm and off_alignment)) and not triton"
        few = ["-k", some]
        return [
            ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *PYTEST, *KERNEL_TESTS, *few]
            for tool in SANITIZERS
        ]
    if part == "input":
        bench = [sys.executable, "benchmarks/bench_input.py", "--seconds", "3", "--distinct", "64"]
        return [
            [*PYTEST, "tests/test_image_batches.py", "-k", "on_a_gpu"],
            [*bench, "--output", str(output / "input_cuda.json")],
            [*PYTEST, "tests/test_trainer_passes.py", "-k", "on_a_gpu"],
        ]
    if part in STEPS:
        return step_commands(part, output)
    name = BENCHMARKS[part]

    def timed(dtype: str, *options: str, suffix: str = "") -> list[str]:
        where = ["--device", "cuda", "--dtype", dtype, "--output", str(output / f"{name}_cuda_{dtype}{suffix}.json")]
        return [sys.executable, f"benchmarks/bench_{name}.py", *where, "--seconds", "0.3", *options]

    if part == "norm":  # compiled: the peers that the targets name, for the largest shape of each network
        some = ("--compiled-shapes", "1", "--compiled", "plain batch norm", "formula")
        return [
            timed("bfloat16", *some),
            timed("bfloat16", "--residual", *some, suffix="_residual"),
            timed("float32", "--compiled"),
        ]
    return [
        timed(dtype, *(["--no-compile"] if part == "lstm" or (part == "linear" and dtype == "float32") else []))
        for dtype in ("bfloat16", "float32")  # compiling takes minutes
    ]


def step_commands(part: str, output: Path) -> list[list[str]]:
    """Return what a part that times whole training steps runs."""

    def timed(script: str, name: str, *options: str) -> list[str]:
        return [sys.executable, f"benchmarks/{script}.py", "--device", "cuda", "--output", str(output / name), *options]

    if part == "growth":
        return [timed("bench_growth", "growth_cuda.json", "--seconds", "60")]
    if part == "profile":
        return [timed("profile_step", "profile_cuda.json")]
    network = STEP_NETWORKS[part]
    name, options = f"step_cuda_bfloat16_{network}", ["--networks", network, "--members"]
    # Compiling takes minutes: once for each network, and not for a DenseNet, which would not be done in time.
    eager = ["--contenders", "plain", "members in turn", "ours, fused", "ours, CUDA graph", "floor: no norm, no ReLU"]
    if part == "step_densenet":
        return [timed("bench_step", f"{name}.json", *options, "10", "4", "1", "--seconds", "30", *eager)]
    return [
        timed("bench_step", f"{name}.json", *options, "10", "--seconds", "40"),
        timed("bench_step", f"{name}_members.json", *options, "4", "1", "--seconds", "20", *eager),
    ]


STEP_NETWORKS = {"step_wrn": "WRN-28-10", "step_resnet": "ResNet-50", "step_densenet": "DenseNet-161"}
STEPS = (*STEP_NETWORKS, "growth", "profile")
BENCHMARKS = {"norm": "ensemble_batch_norm", "gain": "member_gain", "linear": "rank1_linear", "lstm": "rank1_lstm"}
# Shares of the limit. Nothing is timed without the build and the tests.
PARTS = {
    **{"build": 0.18, "test": 0.17, "sanitize": 0.08},
    **{"norm": 0.25, "gain": 0.07, "linear": 0.09, "lstm": 0.06, "input": 0.1},
}
ALL_PARTS = {**PARTS, **dict.fromkeys(STEPS, 1.0)}  # those of STEPS only where they are named


def facts() -> dict:
    """Return where this runs, for a reader of the figures."""
    import torch

    def first_line(*command: str) -> str | None:
        try:
            return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.split("\n")[0]
        except (OSError, subprocess.CalledProcessError):
            return None

    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "driver": first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "triton": first_line(sys.executable, "-c", "import triton; print(triton.__version__)"),
        "python": platform.python_version(),
        "commit": first_line("git", "rev-parse", "HEAD"),
    }


def run_part(part: str, output: Path, seconds: float) -> dict:
    """Run a part's commands; return how it ended."""
    start, log = time.monotonic(), output / f"gpu_{part}.log"
    ended = "passed"
    with open(log, "w", encoding="utf-8") as file:
        for command in commands(part, output):
            if shutil.which(command[0]) is None:
                ended = f"failed: {command[0]} is not installed"
                break
            left = seconds - (time.monotonic() - start)
            try:
                code = subprocess.run(
                    command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=max(left, 1.0)
                ).returncode
            except subprocess.TimeoutExpired:
                ended = f"ran out of its {seconds:.0f} s"
                break
            if code:
                ended = f"failed with exit code {code}; see {log.name}"
                break
    return {"ended": ended, "seconds": round(time.monotonic() - start, 1)}


def main() -> int:
    """Run the parts, print one line each, write gpu.json; return 0 if all passed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=list(ALL_PARTS), default=list(PARTS))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--limit", type=float, default=590.0, help="seconds in all (default 590)")
    arguments = parser.parse_args()
    found = facts()
    if found["device"] is None:
        parser.error("torch sees no CUDA device here")
    arguments.output.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    total = sum(ALL_PARTS[part] for part in arguments.parts)
    ended: dict[str, dict] = {}
    for part in ALL_PARTS:
        if part not in arguments.parts:
            continue
        broken = [name for name in ("build", "test") if ended.get(name, {}).get("ended", "passed") != "passed"]
        if part in (*BENCHMARKS, *STEPS, "input") and broken:
            ended[part] = {"ended": f"not timed: {broken[0]} did not pass", "seconds": 0.0}
        else:
            ended[part] = run_part(part, arguments.output, arguments.limit * ALL_PARTS[part] / total)
        print(f"{part:13} {ended[part]['seconds']:7.1f} s  {ended[part]['ended']}", flush=True)
        (arguments.output / "gpu.json").write_text(json.dumps({**found, "parts": ended}, indent=2) + "\n")
    return 0 if all(part["ended"] == "passed" for part in ended.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
