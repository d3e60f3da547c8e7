"""Time and memory of one whole training step: forward, loss, backward, optimizer, on synthetic images.

    python benchmarks/bench_step.py [--networks ResNet-18 WRN-16-4] [--members 4] [--rows 8] [--layouts contiguous]
                                    [--device cuda] [--dtype bfloat16] [--contenders plain ours] [--seconds 60]

step_contenders.py holds what is compared. All take turns in one run; each is checked against the members in turn (their
losses and every gradient) before it is timed. benchmarks/README.md says how to read the figures.
"""

import argparse
import gc
import json
from pathlib import Path

import torch
from memory import peak_mib
from step_contenders import CONTENDERS, GRAPHED, IN_TURN, NETWORKS, PLAIN, STEPS, Setting, largest_difference
from step_floor import arithmetic_floor
from timing import HUGE_PAGES, interleaved, quartiles, ratios

from latephase_kernels.train.runs import processor

DEFAULTS = {  # networks, K, images a member (else ROWS), layouts
    "cpu": (["ResNet-18", "WRN-16-4"], [4], {"ResNet-18": 8, "WRN-16-4": 16}, ["contiguous", "channels_last"]),
    "cuda": (
        ["WRN-28-10", "ResNet-50", "DenseNet-161"],
        [10],
        {"WRN-28-10": 64, "DenseNet-161": 8},
        ["channels_last"],
    ),
}
ROWS = 32
ALLOWED = {torch.float32: 0.02, torch.bfloat16: 0.25}  # relative distance of a gradient; a wrong member is beyond 1


def make_step(setting: Setting, name: str, truth: dict):
    """Return a contender ready to run, or None where its gradients are wrong, and its difference and peak memory."""
    on_gpu = setting.device.type == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    step = STEPS[name](setting)
    row = {}
    if "floor" not in name:
        row["gradient difference"] = largest_difference(step.gradients(), truth[step.is_ensemble])
        if not row["gradient difference"] < ALLOWED[setting.dtype]:
            return None, row
    step()
    if name == GRAPHED:  # its memory is taken once, when the step is captured
        row["peak MiB"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    else:
        step.release()
        standing = (torch.cuda.memory_allocated() - before) / 2**20 if on_gpu else 0.0
        row["peak MiB"] = standing + peak_mib(step, setting.device)
    return step, row


def make_steps(setting: Setting, names: list[str]) -> tuple[dict, dict]:
    """Return the contenders that can be timed, and the figures of all: differences, peak memory, why not."""
    truth = {True: STEPS[IN_TURN](setting).gradients(), False: STEPS[PLAIN](setting).gradients()}
    steps, rows = {}, {}
    for name in names:
        try:
            step, rows[name] = make_step(setting, name, truth)
        except torch.OutOfMemoryError:
            step, rows[name] = None, {"failed": "out of memory"}
        if step is not None:
            steps[name] = step
    return steps, rows


def bench(setting: Setting, names: list[str], *, seconds: float) -> dict:
    """Return {contender: figures}; a contender with wrong gradients is not timed."""
    steps, rows = make_steps(setting, names)
    gc.collect()
    for name in list(steps):  # once more, beside what all of them keep
        try:
            steps[name]()
        except torch.OutOfMemoryError:
            rows[name]["failed"] = "out of memory beside the others"
            del steps[name]
    times = interleaved(steps, setting.device, seconds=seconds, warmup=2)
    images = setting.num_members * setting.rows
    for name, values in times.items():
        low, median, high = quartiles(values)
        rows[name] |= {"ms": 1e3 * median, "ms_quartiles": [1e3 * low, 1e3 * high], "rounds": len(values)}
        rows[name]["images/s"] = images / median
        for baseline in (PLAIN, IN_TURN):
            if baseline in times:
                rows[name][f"to {baseline}"] = ratios(values, times[baseline])
    return rows


def spread(row: dict, key: str) -> str:
    if key not in row:
        return "–"
    low, median, high = row[key]
    return f"{median:.2f} ({low:.2f} … {high:.2f})"


def markdown(table: dict) -> str:
    """One table as Markdown."""
    lines = [
        "| {network}, K = {members}, {rows} images a member, {layout}, {dtype} ".format(**table)
        + "| ms | images/s | to plain | to members in turn | peak MiB |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in table["contenders"].items():
        if "ms" not in row:
            why = row.get("failed") or f"wrong gradients ({row['gradient difference']:.1g})"
            lines.append(f"| {name} | not timed: {why} | | | | |")
            continue
        peak = f"{row['peak MiB']:.0f}" if "peak MiB" in row else "–"
        figures = [spread(row, f"to {baseline}") for baseline in (PLAIN, IN_TURN)]
        lines.append(f"| {name} | {row['ms']:.1f} | {row['images/s']:.1f} | {' | '.join(figures)} | {peak} |")
    floor = table["arithmetic floor"]
    lines.append(f"| floor: arithmetic and bytes | {floor['ms']:.1f} | {floor['images/s']:.1f} | | | |")
    return "\n".join(lines)


def settings(arguments: argparse.Namespace):
    """Yield a Setting for every table that is asked for."""
    device = torch.device(arguments.device)
    for network in arguments.networks:
        for members in arguments.members:
            for layout in arguments.layouts:
                rows = arguments.rows or DEFAULTS[arguments.device][2].get(network, ROWS)
                dtype = getattr(torch, arguments.dtype)
                yield Setting(network, members, rows, device, dtype, layout == "channels_last")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS))
    parser.add_argument("--members", nargs="+", type=int, help="K; default: 10 on a GPU, else 4")
    parser.add_argument("--rows", type=int, help="images a member; default: by network and device")
    parser.add_argument("--layouts", nargs="+", choices=["contiguous", "channels_last"])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, help="default: all that run on the device")
    parser.add_argument("--huge-pages", **HUGE_PAGES)
    parser.add_argument("--seconds", type=float, default=40.0, help="for each table")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/step_DEVICE_DTYPE.json")
    arguments = parser.parse_args()
    networks, members, _, layouts = DEFAULTS[arguments.device]
    arguments.networks = arguments.networks or networks
    arguments.members = arguments.members or members
    arguments.layouts = arguments.layouts or layouts
    arguments.dtype = arguments.dtype or ("bfloat16" if arguments.device == "cuda" else "float32")
    if arguments.contenders is None:  # a compiler and graphs are for GPUs
        here = arguments.device == "cuda"
        arguments.contenders = [n for n in CONTENDERS if here or (n != GRAPHED and "compiled" not in n)]
    return arguments


def main() -> None:
    arguments = parse()
    on_gpu = arguments.device == "cuda"
    report = {
        "torch": torch.__version__, "device": torch.cuda.get_device_name() if on_gpu else processor(),
        "threads": torch.get_num_threads(), "huge pages": arguments.huge_pages, "tables": [],
    }  # fmt: skip
    output = arguments.output or Path(__file__).parent / "results" / f"step_{arguments.device}_{arguments.dtype}.json"
    for setting in settings(arguments):
        rows = bench(setting, arguments.contenders, seconds=arguments.seconds)
        table = {
            "network": setting.network, "members": setting.num_members, "rows": setting.rows, "dtype": arguments.dtype,
            "layout": "channels_last" if setting.channels_last else "contiguous", "contenders": rows,
            "arithmetic floor": arithmetic_floor(setting),
        }  # fmt: skip
        report["tables"].append(table)
        print(f"\n{markdown(table)}", flush=True)
        output.parent.mkdir(exist_ok=True)
        output.write_text(json.dumps(report, indent=1) + "\n")
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
