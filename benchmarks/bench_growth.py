"""How the time and memory of a training step grow: with K at constant K·B, with B at constant K, and with the width.

    python benchmarks/bench_growth.py [--device cuda] [--seconds 60] [--output benchmarks/results/growth_cpu.json]

A wide residual network of depth 10 at 32 px, batch norms as late-phase weights, fused; beside it the plain network on
as many images. Writes the figures as JSON and a picture beside them.
"""

import argparse
import gc
import json
from pathlib import Path

import torch
from memory import peak_mib
from step_contenders import FUSED, PLAIN, STEPS, Setting
from timing import interleaved, quartiles, ratios

from latephase_kernels.models import WideResNet
from latephase_kernels.train.runs import processor

# axis: (K, B, width) of every point, and what the picture's axis says
AXES = {
    "cpu": {
        "members": [(k, 32 // k, 2) for k in (1, 2, 4, 8, 16, 32)],
        "rows": [(4, b, 2) for b in (2, 4, 8, 16)],
        "width": [(4, 8, w) for w in (1, 2, 4)],
    },
    "cuda": {
        "members": [(k, 1024 // k, 10) for k in (1, 2, 4, 8, 16, 32)],
        "rows": [(8, b, 10) for b in (16, 32, 64, 128)],
        "width": [(8, 64, w) for w in (2, 4, 8, 12)],
    },
}
LABELS = {"members": "members K, at constant K·B", "rows": "images a member B, at constant K", "width": "width"}


def setting_of(point: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> Setting:
    members, rows, width = point
    channels_last = device.type == "cuda"
    return Setting(
        f"WRN-10-{width}", members, rows, device, dtype, channels_last, lambda: WideResNet(10, width, 100), 32
    )


def bench(points: list, device: torch.device, dtype: torch.dtype, seconds: float) -> list[dict]:
    """Time every point of an axis in turn with all the others; return a row of figures for each."""
    settings = {point: setting_of(point, device, dtype) for point in points}
    steps = {(name, p): STEPS[name](s) for p, s in settings.items() for name in (PLAIN, FUSED)}
    for step in steps.values():
        step()
    kept = {key: peak_mib(step, device) for key, step in steps.items()}
    gc.collect()
    times = interleaved(steps, device, seconds=seconds, warmup=2)
    rows = []
    for point in points:
        ours, plain = times[FUSED, point], times[PLAIN, point]
        rows.append(
            {
                "members": point[0], "rows": point[1], "width": point[2], "rounds": len(ours),
                "ms": [1e3 * t for t in quartiles(ours)], "plain ms": [1e3 * t for t in quartiles(plain)],
                "to plain": ratios(ours, plain), "to the first point": ratios(ours, times[FUSED, points[0]]),
                "plain, to the first point": ratios(plain, times[PLAIN, points[0]]),
                "MiB": kept[FUSED, point], "plain MiB": kept[PLAIN, point],
            }
        )  # fmt: skip
    return rows


def picture(report: dict, path: Path) -> None:
    """Draw time and memory along every axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(2, 3, figsize=(9, 5), dpi=90)
    for column, (axis, rows) in enumerate(report["axes"].items()):
        x = [row[axis] for row in rows]
        for line, key in ((("late-phase members", "o-"), "ms"), (("plain network", "s--"), "plain ms")):
            middle = [row[key][1] for row in rows]
            spread = [[row[key][1] - row[key][0] for row in rows], [row[key][2] - row[key][1] for row in rows]]
            grid[0, column].errorbar(x, middle, yerr=spread, fmt=line[1], label=line[0], markersize=4, capsize=2)
        grid[1, column].plot(x, [row["MiB"] for row in rows], "o-", markersize=4)
        grid[1, column].plot(x, [row["plain MiB"] for row in rows], "s--", markersize=4)
        for row in range(2):
            grid[row, column].set_xscale("log", base=2)
            grid[row, column].set_xticks(x, [str(v) for v in x])
            grid[row, column].set_ylim(bottom=0)
            grid[row, column].set_xlabel(LABELS[axis], fontsize=8)
    grid[0, 0].set_ylabel("ms a step")
    grid[1, 0].set_ylabel("MiB a step at its peak")
    grid[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--axes", nargs="+", choices=list(LABELS), default=list(LABELS))
    parser.add_argument("--seconds", type=float, default=60.0, help="for each axis")
    parser.add_argument(
        "--output", type=Path, help="default: benchmarks/results/growth_DEVICE.json, the picture beside it"
    )
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    report = {
        "torch": torch.__version__, "device": torch.cuda.get_device_name() if on_gpu else processor(),
        "on": arguments.device, "threads": torch.get_num_threads(), "dtype": str(dtype).removeprefix("torch."),
        "axes": {},
    }  # fmt: skip
    output = arguments.output or Path(__file__).parent / "results" / f"growth_{arguments.device}.json"
    output.parent.mkdir(exist_ok=True)
    print(
        "| K | B | width | ms | to the first | plain, to the first | to plain | MiB | plain MiB |\n" + "|---" * 9 + "|"
    )
    for axis in arguments.axes:
        rows = report["axes"][axis] = bench(AXES[arguments.device][axis], device, dtype, arguments.seconds)
        for row in rows:
            figures = [row["ms"], row["to the first point"], row["plain, to the first point"], row["to plain"]]
            medians = " | ".join(f"{f[1]:.2f}" for f in figures)
            point = f"{row['members']} | {row['rows']} | {row['width']}"
            print(f"| {point} | {medians} | {row['MiB']:.1f} | {row['plain MiB']:.1f} |", flush=True)
        output.write_text(json.dumps(report, indent=1) + "\n")
    picture(report, output.with_suffix(".png"))


if __name__ == "__main__":
    main()
