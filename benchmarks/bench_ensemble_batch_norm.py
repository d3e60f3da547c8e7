"""Time of ensemble batch norm + ReLU, forward and backward, beside what a user would otherwise write.

    python benchmarks/bench_ensemble_batch_norm.py [--device cuda] [--dtype bfloat16] [--networks WRN-28-10]
    pytest benchmarks/bench_ensemble_batch_norm.py --benchmark-only          (with pytest-benchmark)

benchmarks/README.md says how to read the figures. K members, B rows a member, C channels, size² positions.
"""

import argparse
import json
import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import copy_bandwidth, geometric_mean, interleaved, quartiles, ratios

import latephase_kernels as lp

NUM_MEMBERS = 10
ROWS = {"cpu": {"WRN-28-10": 16, "ResNet-50": 4, "DenseNet-161": 4},
        "cuda": {"WRN-28-10": 128, "ResNet-50": 32, "DenseNet-161": 32}}  # fmt: skip
# (C, size, batch norms of this shape). Of the batch norms that open the layers of a dense block, which all have
# different widths, one of the mean width stands for all.
NETWORKS = {
    "WRN-28-10": [(16, 32, 1), (160, 32, 8), (320, 16, 8), (640, 8, 8)],
    "ResNet-50": [
        (64, 112, 1), (64, 56, 6), (256, 56, 4), (128, 56, 1), (128, 28, 7), (512, 28, 5), (256, 28, 1), (256, 14, 11),
        (1024, 14, 7), (512, 14, 1), (512, 7, 5), (2048, 7, 4),
    ],
    "DenseNet-161": [
        (96, 112, 1), (216, 56, 6), (192, 56, 6), (384, 56, 1), (456, 28, 12), (192, 28, 12), (768, 28, 1),
        (1224, 14, 36), (192, 14, 36), (2112, 14, 1), (1608, 7, 24), (192, 7, 24), (2208, 7, 1),
    ],
}  # fmt: skip
PLAIN, OURS, FLOOR = "plain batch norm", "ours", "floor"


def plain(x, weight, bias):
    return F.relu(F.batch_norm(x, None, None, weight[0], bias[0], True))


def slices(x, weight, bias):
    members = zip(x.chunk(len(weight)), weight, bias, strict=True)
    return F.relu(torch.cat([F.batch_norm(rows, None, None, w, b, True) for rows, w, b in members]))


def side_by_side(x, weight, bias):
    members, channels = weight.shape
    view = x.unflatten(0, (members, -1)).transpose(0, 1).flatten(1, 2)  # [B, K·C, H, W]
    y = F.relu(F.batch_norm(view, None, None, weight.flatten(), bias.flatten(), True))
    return y.unflatten(1, (members, channels)).transpose(0, 1).reshape(x.shape)


def ours(x, weight, bias):
    return lp.functional.ensemble_batch_norm(
        x, None, None, weight, bias, True, num_members=len(weight), activation="relu"
    )


def floor(x, weight, bias):
    """The ReLU alone: two results, 2e bytes forward and 3e backward, nothing read twice."""
    return F.relu(x)


def contenders(device, channels_last):
    """Return every contender by name; those whose values must be the ensemble's are all but `plain` and `floor`."""
    found = {PLAIN: plain, "slices + cat": slices}
    if not channels_last:
        found["[B, K·C] view"] = side_by_side
    if device.type == "cuda":
        found |= {f"compiled {name}": torch.compile(f, dynamic=False) for name, f in found.items()}
    return {**found, OURS: ours, FLOOR: floor}


class Case:
    """One shape: its tensors, a training step of a contender, and the check of its values."""

    def __init__(self, rows, channels, size, *, device, dtype, channels_last, num_members=NUM_MEMBERS):
        torch.manual_seed(0)
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        shape = (num_members * rows, channels, size, size)
        self.x, self.dy = (
            torch.randn(shape, device=device).to(dtype).contiguous(memory_format=memory_format) for _ in range(2)
        )
        self.weight, self.bias = (torch.randn(num_members, channels, device=device) for _ in range(2))
        self.leaves = [t.requires_grad_() for t in (self.x, self.weight, self.bias)]
        self.bytes = 5 * self.x.numel() * self.x.element_size()

    def step(self, function):
        for leaf in self.leaves:
            leaf.grad = None
        y = function(*self.leaves)
        y.backward(self.dy)
        return y

    def wrong_share(self, function):
        """Share of the values and gradients of the first and last member that are off, by the formula in float64."""
        y = self.step(function)
        rows = len(self.x) // len(self.weight)
        tolerance = 2 * torch.finfo(self.x.dtype).eps + 1e-5
        wrong = 0.0
        for k in (0, len(self.weight) - 1):
            own = slice(k * rows, (k + 1) * rows)
            x = self.x.detach()[own].double().requires_grad_()
            weight, bias = (p.detach()[k].double() for p in (self.weight, self.bias))
            expected = F.relu(F.batch_norm(x, None, None, weight, bias, True))
            expected.backward(self.dy[own].double())
            for value, truth in ((y.detach()[own], expected.detach()), (self.x.grad[own], x.grad)):
                # Relative to the largest value: where rounding decides the sign before the ReLU, a gradient is off.
                off = (value.double() - truth).abs() > tolerance * truth.abs().max()
                wrong = max(wrong, (off | value.isnan()).double().mean().item())
        return wrong


def bench(case, functions, seconds):
    """Return {contender: figures}; a contender with wrong values is not timed."""
    wrong = {name: case.wrong_share(f) for name, f in functions.items() if name not in (FLOOR,) and "plain" not in name}
    timed = {name: f for name, f in functions.items() if wrong.get(name, 0.0) < 1e-3}
    times = interleaved({name: lambda f=f: case.step(f) for name, f in timed.items()}, case.x.device, seconds=seconds)
    rows = {name: {"wrong_share": share} for name, share in wrong.items() if name not in timed}
    for name, values in times.items():
        low, median, high = quartiles(values)
        rows[name] = {
            "ms": 1e3 * median, "ms_quartiles": [1e3 * low, 1e3 * high], "rounds": len(values),
            "GB/s": case.bytes / median / 1e9, "to_plain": ratios(values, times[PLAIN]),
        }  # fmt: skip
    if OURS in timed:
        peers = [name for name in timed if name not in (OURS, FLOOR)]
        fastest = min(peers, key=lambda name: rows[name]["ms"])
        rows[OURS] |= {"fastest_peer": fastest, "to_fastest_peer": ratios(times[OURS], times[fastest])}
    return rows


def describe(name, row):
    if "ms" not in row:
        return f"  {name:26} wrong values ({row['wrong_share']:.1%}), not timed"
    low, median, high = row["to_plain"]
    return f"  {name:26} {row['ms']:9.2f} ms {row['GB/s']:8.1f} GB/s   × {median:.2f} ({low:.2f} … {high:.2f})"


def summarize(tables):
    """Return, for each layout, the geometric means over all shapes and each network's total milliseconds."""
    summary = {}
    for layout in dict.fromkeys(table["layout"] for table in tables):
        here = [t for t in tables if t["layout"] == layout and OURS in t["rows"] and "ms" in t["rows"][OURS]]
        summary[layout] = {
            "ours to fastest peer": geometric_mean([t["rows"][OURS]["to_fastest_peer"][1] for t in here]),
            "ours to plain": geometric_mean([t["rows"][OURS]["to_plain"][1] for t in here]),
            "floor to plain": geometric_mean([t["rows"][FLOOR]["to_plain"][1] for t in here]),
            "network ms": {
                network: {
                    name: sum(t["count"] * t["rows"][name]["ms"] for t in here if t["network"] == network)
                    for name in (PLAIN, OURS, FLOOR)
                }
                for network in dict.fromkeys(t["network"] for t in here)
            },
        }
    return summary


def markdown(tables):
    lines = [
        "| network | [K·B, C, H, W] | layout | fastest peer ms | ours ms | GB/s | ratio | floor |",
        "|" + "---|" * 8,
    ]
    for t in tables:
        row = t["rows"][OURS]
        low, ratio, high = row["to_fastest_peer"]
        peer, floor_ratio = t["rows"][row["fastest_peer"]]["ms"], t["rows"][FLOOR]["ms"]
        lines.append(
            f"| {t['network']} | {t['shape']} | {t['layout']} | {peer:.1f} ({row['fastest_peer']}) | {row['ms']:.1f} "
            f"| {row['GB/s']:.1f} | {ratio:.2f} ({low:.2f} … {high:.2f}) | {floor_ratio / peer:.2f} |"
        )
    return "\n".join(lines)


def processor():
    """The processor's name, as the system has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def cases(device, networks=tuple(NETWORKS)):
    for network in networks:
        for channels, size, count in NETWORKS[network]:
            for layout in ("contiguous", "channels_last"):
                yield network, ROWS[device.type][network], channels, size, count, layout


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--rows", type=int, help="per member; default: by network and device")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each shape and layout")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/ensemble_batch_norm_DEVICE_DTYPE.json")
    arguments = parser.parse_args()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    on_gpu = device.type == "cuda"
    report = {
        "torch": torch.__version__, "device": torch.cuda.get_device_name() if on_gpu else processor(),
        "threads": torch.get_num_threads(), "dtype": arguments.dtype, "members": NUM_MEMBERS,
        "copy GB/s": copy_bandwidth(device) / 1e9, "tables": [],
    }  # fmt: skip
    output = arguments.output or (
        Path(__file__).parent / "results" / f"ensemble_batch_norm_{arguments.device}_{arguments.dtype}.json"
    )
    print({name: value for name, value in report.items() if name != "tables"})
    for network, rows, channels, size, count, layout in cases(device, arguments.networks):
        rows = arguments.rows or rows
        case = Case(rows, channels, size, device=device, dtype=dtype, channels_last=layout == "channels_last")
        table = bench(case, contenders(device, layout == "channels_last"), arguments.seconds)
        shape = list(case.x.shape)
        print(f"\n{network} {shape} {layout}, {count} in the network", flush=True)
        print("\n".join(describe(name, row) for name, row in table.items()), flush=True)
        report["tables"].append({"network": network, "shape": shape, "layout": layout, "count": count, "rows": table})
        report["summary"] = summarize(report["tables"])
        output.parent.mkdir(exist_ok=True)
        output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\n{markdown(report['tables'])}\n\n{json.dumps(report['summary'], indent=1)}")


def pytest_generate_tests(metafunc):
    shapes = [(network, *NETWORKS[network][1][:2]) for network in NETWORKS]
    layouts = ["contiguous", "channels_last"]
    metafunc.parametrize("name", [PLAIN, "slices + cat", OURS, FLOOR])
    metafunc.parametrize("layout", layouts)
    metafunc.parametrize("shape", shapes, ids=lambda shape: shape[0])


def test_ensemble_batch_norm(benchmark, shape, layout, name):
    """One shape of each network, for pytest-benchmark."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network, channels, size = shape
    channels_last = layout == "channels_last"
    rows = ROWS[device.type][network]
    case = Case(rows, channels, size, device=device, dtype=torch.float32, channels_last=channels_last)
    function = contenders(device, channels_last)[name]
    assert name in (PLAIN, FLOOR) or case.wrong_share(function) < 1e-3

    def step():
        case.step(function)
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{network} {layout}"
    benchmark(step)


if __name__ == "__main__":
    main()
