"""Where the time of a training step goes, by torch.profiler: shares of each kind of operation, ours beside plain.

    python benchmarks/profile_step.py [--networks ResNet-18] [--device cuda] [--members 4] [--rows 8] [--steps 5]

On a CPU an operation's own time counts, on a GPU its kernels'; "the rest" is what the clock shows beyond these: Python,
autograd and dispatch, on a GPU gaps between launches.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from bench_step import DEFAULTS, ROWS
from step_contenders import FUSED, NETWORKS, PLAIN, STEPS, Setting
from torch.profiler import ProfilerActivity, profile

from latephase_kernels.train.runs import processor

# The first kind with a word in the operation's name counts.
KINDS = {
    "batch norm": ("ensemble_batch_norm", "batch_norm", "resident_forward", "resident_backward", "stream_"),
    "convolutions": ("conv", "gemm", "cudnn", "xmma", "cutlass", "nchw", "nhwc"),
    "linear layer": ("addmm", "aten::mm", "linear"),
    "optimizer": ("_fused_sgd", "foreach", "multi_tensor", "zero_grad", "Optimizer"),
    "ReLU, additions, copies": (
        "relu", "threshold", "add", "mul", "copy_", "clone", "fill", "zero", "cat", "elementwise", "Memcpy", "Memset",
    ),
    "pooling, loss": ("pool", "softmax", "nll", "mean", "sum", "div", "reduce"),
}  # fmt: skip
REST = "the rest"


def kind_of(name: str) -> str:
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), REST)


def shares(step, device: torch.device, steps: int) -> dict[str, float]:
    """Milliseconds a step of every kind of operation, and in all."""
    on_gpu = device.type == "cuda"

    def wait():
        if on_gpu:
            torch.cuda.synchronize()

    for _ in range(3):
        step()
    wait()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    wait()
    wall = 1e3 * (time.perf_counter() - start) / steps
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as trace:
        for _ in range(steps):
            step()
        wait()
    found = dict.fromkeys([*KINDS, REST], 0.0)
    for event in trace.key_averages():
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        found[kind_of(event.key)] += own / 1e3 / steps
    found[REST] = wall - sum(time for kind, time in found.items() if kind != REST)  # without the profiler's own time
    return {**found, "all": wall}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS))
    parser.add_argument("--members", type=int)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/profile_DEVICE.json")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    networks, members, rows, layouts = DEFAULTS[arguments.device]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    machine = torch.cuda.get_device_name() if device.type == "cuda" else processor()
    report = {"torch": torch.__version__, "device": machine, "threads": torch.get_num_threads(), "networks": {}}
    for network in arguments.networks or networks:
        own_rows = arguments.rows or rows.get(network, ROWS)
        setting = Setting(
            network, arguments.members or members[0], own_rows, device, dtype, layouts[-1] == "channels_last"
        )
        found = {name: shares(STEPS[name](setting), device, arguments.steps) for name in (PLAIN, FUSED)}
        report["networks"][network] = {"members": setting.num_members, "rows": own_rows, **found}
        title = f"{network}, K = {setting.num_members}, {own_rows} images a member, {layouts[-1]}"
        print(f"\n| {title} | plain | ours, fused |")
        print("|---|---|---|")
        for kind in found[PLAIN]:
            figures = [f"{found[n][kind]:.1f} ms, {found[n][kind] / found[n]['all']:.0%}" for n in (PLAIN, FUSED)]
            print(f"| {kind} | {' | '.join(figures)} |", flush=True)
    output = arguments.output or Path(__file__).parent / "results" / f"profile_{arguments.device}.json"
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
