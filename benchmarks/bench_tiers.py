"""Whether the dispatch of the CUDA batch norm takes the fastest tier: every layer as planned, and sent elsewhere.

    python benchmarks/bench_tiers.py [--dtype bfloat16] [--residual] [--networks …]    (a GPU)

Forward and backward apart, with ReLU. What sends a layer elsewhere are the variables that lower the shared memory of a
block and the size of a cluster (csrc/cuda/ensemble_batch_norm_plan.cuh); where they change nothing, they measure noise.
benchmarks/README.md says how to read the figures.
"""

import argparse
import json
import os
from pathlib import Path

import torch
from bench_ensemble_batch_norm import NETWORKS, NETWORKS_WITH, Case, cases, ours
from timing import attempt, copy_bandwidth, geometric_mean, interleaved, quartiles, ratios

from latephase_kernels.train.runs import processor

PLANNED = "as planned"
SETTINGS = {
    PLANNED: {},
    **{f"clusters of {n} at most": {"LATEPHASE_CUDA_CLUSTER": str(n)} for n in (8, 4, 2)},
    "no clusters": {"LATEPHASE_CUDA_CLUSTER": "1"},
    # A half, a third and a quarter of the 228 KiB that a multiprocessor of an H100 has, less what the system takes.
    **{f"{kib} KiB a block": {"LATEPHASE_CUDA_SHARED_KIB": str(kib)} for kib in (113, 75, 56)},
    "streaming": {"LATEPHASE_CUDA_SHARED_KIB": "0"},
}


def under(variables, function):
    """Return function, called with these environment variables."""

    def call():
        os.environ.update(variables)
        try:
            return function()
        finally:
            for name in variables:
                del os.environ[name]

    return call


def directions(case):
    """Return {direction: (a call, its useful bytes)}; the results are allocated anew each time."""
    y = ours(*case.leaves)
    each_way = case.x.numel() * case.x.element_size()

    def forward():
        with torch.no_grad():
            return ours(*case.leaves)

    def backward():
        return torch.autograd.grad(y, case.leaves, case.dy, retain_graph=True)

    tensors = 3 if len(case.leaves) == 4 else 2  # x, y and a residual
    return {"forward": (forward, tensors * each_way), "backward": (backward, (tensors + 1) * each_way)}


def bench(case, seconds, copy):
    """Return {direction: {setting: figures}}; a setting with wrong values is named and not timed."""
    tried = {
        name: attempt(under(variables, lambda: case.wrong_share(ours)), 1e-3, "wrong_share")
        for name, variables in SETTINGS.items()
    }
    failed = {name: failure for name, failure in tried.items() if failure is not None}
    rows = {}
    for direction, (call, useful) in directions(case).items():
        calls = {name: under(variables, call) for name, variables in SETTINGS.items() if name not in failed}
        times = interleaved(calls, case.x.device, seconds=seconds) if calls else {}
        rows[direction] = dict(failed)
        for name, values in times.items():
            median = quartiles(values)[1]
            rows[direction][name] = {
                "ms": 1e3 * median, "rounds": len(values), "% of copy": 100 * useful / median / copy,
                "planned_to_it": ratios(times[PLANNED], values) if PLANNED in times else None,
            }  # fmt: skip
    return rows


def fastest(rows):
    """Return the name of the setting with the least time, of one direction of a layer."""
    return min((name for name, row in rows.items() if "ms" in row), key=lambda name: rows[name]["ms"])


def describe(table):
    """Return the table's lines of a Markdown table, one for each direction."""
    lines = []
    for direction, rows in table["rows"].items():
        line = f"| {table['network']} | {table['shape']} | {table['layout']} | {direction} |"
        failed = [name for name, row in rows.items() if "ms" not in row]
        if PLANNED in failed:
            lines.append(f"{line} {rows[PLANNED].get('failed') or 'wrong values'} | | |")
            continue
        best, planned = fastest(rows), rows[PLANNED]
        low, ratio, high = rows[best]["planned_to_it"]
        line += f" {planned['ms']:.3f} | {planned['% of copy']:.0f} | {best} {ratio:.2f} ({low:.2f} … {high:.2f})"
        lines.append(line + (f"; wrong: {', '.join(failed)} |" if failed else " |"))
    return lines


def summarize(tables):
    """Return, for each layout and direction, geometric means over the layers whose plan has the right values."""
    found = {}
    for table in tables:
        for direction, rows in table["rows"].items():
            if "ms" in rows[PLANNED]:
                planned_to_fastest = rows[fastest(rows)]["planned_to_it"][1]
                found.setdefault(f"{table['layout']}, {direction}", []).append(
                    (rows[PLANNED]["% of copy"], planned_to_fastest)
                )
    names = ("% of copy", "planned to fastest")
    return {place: dict(zip(names, map(geometric_mean, zip(*values)))) for place, values in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--device", default="cuda", choices=["cpu", "cuda"], help="cpu: a rehearsal, where no setting changes a thing"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--networks", nargs="+", default=NETWORKS_WITH["relu"], choices=list(NETWORKS))
    parser.add_argument("--rows", type=int, help="per member; default: by network and device")
    parser.add_argument("--seconds", type=float, default=0.1, help="for each layer and direction")
    parser.add_argument("--residual", action="store_true", help="add a residual before the ReLU")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/tiers_DEVICE_DTYPE.json")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    report = {
        "torch": torch.__version__, "device": torch.cuda.get_device_name() if device.type == "cuda" else processor(),
        "dtype": arguments.dtype, "residual": arguments.residual, "copy GB/s": copy_bandwidth(device) / 1e9,
        "settings": SETTINGS, "tables": [],
    }  # fmt: skip
    suffix = "_residual" if arguments.residual else ""
    output = arguments.output or (
        Path(__file__).parent / "results" / f"tiers_{arguments.device}_{arguments.dtype}{suffix}.json"
    )
    output.parent.mkdir(exist_ok=True)
    lines = [
        "| network | [K·B, C, H, W] | layout | direction | as planned, ms | % of copy | fastest, as planned to it |",
        "|" + "---|" * 7,
    ]
    print(*lines, sep="\n")
    for network, rows, channels, size, count, layout in cases(device, arguments.networks):
        case = Case(
            arguments.rows or rows, channels, size, device=device, dtype=getattr(torch, arguments.dtype),
            channels_last=layout == "channels_last", residual=arguments.residual,
        )  # fmt: skip
        table = {"network": network, "shape": list(case.x.shape), "layout": layout, "count": count}
        table["rows"] = bench(case, arguments.seconds, 1e9 * report["copy GB/s"])
        report["tables"].append(table)
        report["summary"] = summarize(report["tables"])
        lines += describe(table)
        print(*describe(table), sep="\n", flush=True)
        output.write_text(json.dumps(report, indent=1) + "\n")
        output.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print(json.dumps(report["summary"], indent=1))


if __name__ == "__main__":
    main()
