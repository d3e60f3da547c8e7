"""Time of ensemble batch norm + activation, forward and backward, beside what a user would otherwise write.

    python benchmarks/bench_ensemble_batch_norm.py [--device cuda] [--dtype bfloat16] [--residual] [--activation silu]
    python benchmarks/bench_ensemble_batch_norm.py --floors                  (no timing: the bytes of each layer)
    pytest benchmarks/bench_ensemble_batch_norm.py --benchmark-only          (with pytest-benchmark)

benchmarks/README.md says how to read the figures. K members, B rows a member, C channels, size² positions.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import HUGE_PAGES, attempt, copy_bandwidth, geometric_mean, interleaved, quartiles, ratios

import latephase_kernels as lp
from latephase_kernels.train.runs import processor

NUM_MEMBERS = 10
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
    "MobileNetV2": [  # those with a ReLU6
        (32, 112, 2), (96, 112, 1), (96, 56, 1), (144, 56, 3), (144, 28, 1), (192, 28, 5), (192, 14, 1), (384, 14, 8),
        (576, 14, 5), (576, 7, 1), (960, 7, 6), (1280, 7, 1),
    ],
    "MobileNetV3-Large": [  # those with a Hardswish
        (16, 112, 1), (240, 28, 1), (240, 14, 1), (200, 14, 2), (184, 14, 4), (480, 14, 2), (672, 14, 3), (672, 7, 1),
        (960, 7, 5),
    ],
    "EfficientNet-B0": [  # those with a SiLU
        (32, 112, 2), (96, 112, 1), (96, 56, 1), (144, 56, 3), (144, 28, 1), (240, 28, 3), (240, 14, 1), (480, 14, 6),
        (672, 14, 5), (672, 7, 1), (1152, 7, 8), (1280, 7, 1),
    ],
}  # fmt: skip
ROWS = {  # a member's
    "cpu": dict.fromkeys(NETWORKS, 4) | {"WRN-28-10": 16},
    "cuda": dict.fromkeys(NETWORKS, 32) | {"WRN-28-10": 128},
}
ACTIVATIONS = {"relu": F.relu, "relu6": F.relu6, "silu": F.silu, "hardswish": F.hardswish}
NETWORKS_WITH = {
    "relu": ["WRN-28-10", "ResNet-50", "DenseNet-161"],
    "relu6": ["MobileNetV2"],
    "silu": ["EfficientNet-B0"],
    "hardswish": ["MobileNetV3-Large"],
}
PLAIN, OURS, FLOOR = "plain batch norm", "ours", "floor"


def activate(y, residual, activation):
    return ACTIVATIONS[activation](y if residual is None else y + residual)


def plain(x, weight, bias, residual=None, activation="relu"):
    return activate(F.batch_norm(x, None, None, weight[0], bias[0], True), residual, activation)


def slices(x, weight, bias, residual=None, activation="relu"):
    members = zip(x.chunk(len(weight)), weight, bias, strict=True)
    return activate(
        torch.cat([F.batch_norm(rows, None, None, w, b, True) for rows, w, b in members]), residual, activation
    )


def mapped(x, weight, bias, residual=None, activation="relu"):
    def member(rows, w, b):
        return F.batch_norm(rows, None, None, w, b, True)

    return activate(
        torch.vmap(member)(x.unflatten(0, (len(weight), -1)), weight, bias).flatten(0, 1), residual, activation
    )


def formula(x, weight, bias, residual=None, activation="relu"):
    rows = x.unflatten(0, (len(weight), -1))
    var, mean = torch.var_mean(rows.float(), (1, 3, 4), correction=0, keepdim=True)
    scale = (var + 1e-5).rsqrt() * weight[:, None, :, None, None]
    y = (rows - mean) * scale + bias[:, None, :, None, None]
    return activate(y.to(x.dtype).flatten(0, 1), residual, activation)


def side_by_side(x, weight, bias, residual=None, activation="relu"):
    members, channels = weight.shape
    view = x.unflatten(0, (members, -1)).transpose(0, 1).flatten(1, 2)  # [B, K·C, H, W]
    y = F.batch_norm(view, None, None, weight.flatten(), bias.flatten(), True)
    return activate(y.unflatten(1, (members, channels)).transpose(0, 1).reshape(x.shape), residual, activation)


def ours(x, weight, bias, residual=None, activation="relu"):
    return lp.functional.ensemble_batch_norm(
        x, None, None, weight, bias, True, num_members=len(weight), residual=residual, activation=activation
    )


def floor(x, weight, bias, residual=None, activation="relu"):
    """The activation alone: 2e bytes forward and 3e backward, nothing read twice; with a residual 3e and 4e."""
    return activate(x, residual, activation)


PEERS = {
    PLAIN: plain, "slices + cat": slices, "vmap": mapped, "formula": formula, "[B, K·C] view": side_by_side,
}  # fmt: skip


def contenders(device, channels_last, compiled=tuple(PEERS), activation="relu"):
    """Return every contender by name; those whose values must be the ensemble's are all but `plain` and `floor`.

    compiled: the peers that are compiled as well, on a GPU.
    """
    found = {name: f for name, f in PEERS.items() if not (channels_last and f is side_by_side)}
    if device.type == "cuda":
        found |= {f"compiled {n}": torch.compile(f, dynamic=False) for n, f in found.items() if n in compiled}
    found |= {OURS: ours, FLOOR: floor}
    return {name: partial(f, activation=activation) for name, f in found.items()}


def floor_bytes(tensor_bytes, residual=False):
    """Return the bytes that must move, forward and backward, for tensors of so many bytes."""
    return (7 if residual else 5) * tensor_bytes


class Case:
    """One shape: its tensors, a training step of a contender, and the check of its values."""

    def __init__(self, rows, channels, size, *, device, dtype, channels_last, residual=False, activation="relu"):
        torch.manual_seed(0)
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        shape = (NUM_MEMBERS * rows, channels, size, size)
        self.x, self.dy, z = (
            torch.randn(shape, device=device).to(dtype).contiguous(memory_format=memory_format) if needed else None
            for needed in (True, True, residual)
        )
        self.weight, self.bias = (torch.randn(NUM_MEMBERS, channels, device=device) for _ in range(2))
        self.activation = activation
        self.leaves = [t.requires_grad_() for t in (self.x, self.weight, self.bias, z) if t is not None]
        self.bytes = floor_bytes(self.x.numel() * self.x.element_size(), residual)

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
            x, *residual = (t.detach()[own].double().requires_grad_() for t in (self.x, *self.leaves[3:]))
            weight, bias = (p.detach()[k].double() for p in (self.weight, self.bias))
            expected = plain(x, weight[None], bias[None], *residual, activation=self.activation)
            expected.backward(self.dy[own].double())
            for value, truth in ((y.detach()[own], expected.detach()), (self.x.grad[own], x.grad)):
                # Relative to the largest value: where rounding decides the sign before the ReLU, a gradient is off.
                off = (value.double() - truth).abs() > tolerance * truth.abs().max()
                wrong = max(wrong, (off | value.isnan()).double().mean().item())
        return wrong


def peak_memory(case, function):
    """Return the MiB that a step has allocated at once beside the case's own tensors, or None: not on a GPU."""
    if case.x.device.type != "cuda":
        return None
    for leaf in case.leaves:
        leaf.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    case.step(function)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def bench(case, functions, seconds, copy=None):
    """Return {contender: figures}; one with wrong values is not timed. copy: bytes a second of a copy."""

    def wrong_share(name, function):
        if name != FLOOR and "plain" not in name:
            return case.wrong_share(function)
        case.step(function)
        return 0.0

    tried = {n: attempt(lambda n=n, f=f: wrong_share(n, f), 1e-3, "wrong_share") for n, f in functions.items()}
    rows = {name: failure for name, failure in tried.items() if failure is not None}
    timed = {name: f for name, f in functions.items() if name not in rows}
    times = interleaved({name: lambda f=f: case.step(f) for name, f in timed.items()}, case.x.device, seconds=seconds)
    for name, values in times.items():
        low, median, high = quartiles(values)
        rows[name] = {
            "ms": 1e3 * median, "ms_quartiles": [1e3 * low, 1e3 * high], "rounds": len(values),
            "GB/s": case.bytes / median / 1e9, "to_plain": ratios(values, times[PLAIN]),
            "% of copy": None if copy is None else 100 * case.bytes / median / copy,
            "peak MiB": peak_memory(case, timed[name]),
        }  # fmt: skip
    if OURS in timed:
        peers = [name for name in timed if name not in (OURS, FLOOR)]
        fastest = min(peers, key=lambda name: rows[name]["ms"])
        rows[OURS] |= {"fastest_peer": fastest, "to_fastest_peer": ratios(times[OURS], times[fastest])}
    return rows


def describe(name, row):
    if "ms" not in row:
        return f"  {name:26} {row.get('failed') or 'wrong values ({:.1%})'.format(row['wrong_share'])}, not timed"
    low, median, high = row["to_plain"]
    return f"  {name:26} {row['ms']:9.2f} ms {row['GB/s']:8.1f} GB/s   × {median:.2f} ({low:.2f} … {high:.2f})"


def summarize(tables):
    """Return, for each layout, the geometric means over all shapes and each network's total milliseconds."""
    summary = {}
    for layout in dict.fromkeys(table["layout"] for table in tables):
        here = [t for t in tables if t["layout"] == layout and "ms" in t["rows"][OURS]]
        if not here:
            continue
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
        "| network | [K·B, C, H, W] | layout | fastest peer ms | ours ms | GB/s | % of copy | peak MiB | ratio "
        "| floor |",
        "|" + "---|" * 10,
    ]
    for t in (t for t in tables if "ms" in t["rows"][OURS]):
        row = t["rows"][OURS]
        low, ratio, high = row["to_fastest_peer"]
        peer, floor_ratio = t["rows"][row["fastest_peer"]]["ms"], t["rows"][FLOOR]["ms"]
        lines.append(
            f"| {t['network']} | {t['shape']} | {t['layout']} | {peer:.1f} ({row['fastest_peer']}) | {row['ms']:.1f} "
            f"| {row['GB/s']:.1f} | {cell(row['% of copy'])} | {cell(row['peak MiB'])} "
            f"| {ratio:.2f} ({low:.2f} … {high:.2f}) | {floor_ratio / peer:.2f} |"
        )
    return "\n".join(lines)


def cell(value):
    return "–" if value is None else f"{value:.0f}"


def floors():
    """Return a table of the bytes that each layer must move on a GPU, in bfloat16, by the rows that are timed there."""
    lines = [
        "| network | C, H × W | in it | values a member and channel | KiB of them | MiB a tensor | floor MiB, ReLU "
        "| floor MiB, add + ReLU |",
        "|" + "---|" * 8,
    ]
    for network, layers in NETWORKS.items():
        for channels, size, count in layers:
            n = ROWS["cuda"][network] * size * size
            tensor = 2 * NUM_MEMBERS * n * channels
            lines.append(
                f"| {network} | {channels}, {size} × {size} | {count} | {n:,} | {2 * n / 1024:,.0f} "
                f"| {tensor / 2**20:,.0f} | {floor_bytes(tensor) / 2**20:,.0f} "
                f"| {floor_bytes(tensor, residual=True) / 2**20:,.0f} |"
            )
    return "\n".join(lines)


def cases(device, networks=NETWORKS_WITH["relu"]):
    for network in networks:
        for channels, size, count in NETWORKS[network]:
            for layout in ("contiguous", "channels_last"):
                yield network, ROWS[device.type][network], channels, size, count, layout


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), help="default: those with the activation")
    parser.add_argument("--rows", type=int, help="per member; default: by network and device")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each shape and layout")
    parser.add_argument("--huge-pages", **HUGE_PAGES)
    parser.add_argument("--residual", action="store_true", help="add a residual before the ReLU")
    parser.add_argument("--activation", default="relu", choices=list(ACTIVATIONS))
    parser.add_argument(
        "--compiled", nargs="*", default=list(PEERS), choices=list(PEERS), metavar="PEER", help="peers to compile (GPU)"
    )
    parser.add_argument(
        "--compiled-shapes", type=int, default=99, help="compile for so many shapes of each network only, the largest"
    )
    parser.add_argument("--floors", action="store_true", help="print the bytes of each layer; time nothing")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/ensemble_batch_norm_DEVICE_DTYPE.json")
    arguments = parser.parse_args()
    activation = arguments.activation
    if arguments.residual and activation != "relu":
        parser.error("--residual: only with --activation relu")
    if arguments.floors:
        print(floors())
        return
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    on_gpu = device.type == "cuda"
    report = {
        "torch": torch.__version__, "device": torch.cuda.get_device_name() if on_gpu else processor(),
        "threads": torch.get_num_threads(), "dtype": arguments.dtype, "members": NUM_MEMBERS,
        "residual": arguments.residual, "activation": activation, "huge pages": arguments.huge_pages,
        "copy GB/s": copy_bandwidth(device) / 1e9, "tables": [],
    }  # fmt: skip
    suffix = "_residual" if arguments.residual else "" if activation == "relu" else f"_{activation}"
    output = arguments.output or (
        Path(__file__).parent / "results" / f"ensemble_batch_norm_{arguments.device}_{arguments.dtype}{suffix}.json"
    )
    print({name: value for name, value in report.items() if name != "tables"})
    for network, rows, channels, size, count, layout in cases(device, arguments.networks or NETWORKS_WITH[activation]):
        rows = arguments.rows or rows
        channels_last = layout == "channels_last"
        case = Case(
            rows, channels, size, device=device, dtype=dtype, channels_last=channels_last, residual=arguments.residual,
            activation=activation,
        )  # fmt: skip
        largest = sorted(NETWORKS[network], key=lambda layer: -layer[0] * layer[1] ** 2 * layer[2])
        compile_here = (channels, size, count) in largest[: arguments.compiled_shapes]
        functions = contenders(device, channels_last, arguments.compiled if compile_here else (), activation)
        table = bench(case, functions, arguments.seconds, 1e9 * report["copy GB/s"])
        shape = list(case.x.shape)
        print(f"\n{network} {shape} {layout}, {count} in the network", flush=True)
        print("\n".join(describe(name, row) for name, row in table.items()), flush=True)
        report["tables"].append({"network": network, "shape": shape, "layout": layout, "count": count, "rows": table})
        report["summary"] = summarize(report["tables"])
        output.parent.mkdir(exist_ok=True)
        output.write_text(json.dumps(report, indent=1) + "\n")
    table = markdown(report["tables"])
    output.with_suffix(".md").write_text(table + "\n")
    print(f"\n{table}\n\n{json.dumps(report['summary'], indent=1)}")


def pytest_generate_tests(metafunc):
    shapes = [(network, *NETWORKS[network][1][:2]) for network in NETWORKS_WITH["relu"]]
    layouts = ["contiguous", "channels_last"]
    metafunc.parametrize("name", [*PEERS, OURS, FLOOR])
    metafunc.parametrize("layout", layouts)
    metafunc.parametrize("shape", shapes, ids=lambda shape: shape[0])


def test_ensemble_batch_norm(benchmark, shape, layout, name):
    """One shape of each network, for pytest-benchmark."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network, channels, size = shape
    channels_last = layout == "channels_last"
    functions = contenders(device, channels_last, ())
    if name not in functions:
        import pytest  # not needed as a script

        pytest.skip("has no form of its own in this layout")
    rows = ROWS[device.type][network]
    case = Case(rows, channels, size, device=device, dtype=torch.float32, channels_last=channels_last)
    function = functions[name]
    assert name in (PLAIN, FLOOR) or case.wrong_share(function) < 1e-3

    def step():
        case.step(function)
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{network} {layout}"
    benchmark(step)


if __name__ == "__main__":
    main()
