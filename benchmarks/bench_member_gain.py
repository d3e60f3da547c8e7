"""Time of member gain with bias and ReLU, forward and backward, beside what a user would otherwise write.

    python benchmarks/bench_member_gain.py [--device cuda] [--dtype bfloat16] [--seconds 3] [--output results.json]

Every contender is timed in turn with the others in one run. `floor` is the ReLU alone: the bytes that must move.
"""

import argparse
import json
import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import copy_bandwidth, interleaved, quartiles, ratios

import latephase_kernels as lp

CASES = [  # [K·B, …], K, channel_dim, channels_last
    ([160, 160, 32, 32], 10, 1, False),
    ([160, 160, 32, 32], 10, 1, True),
    ([160, 640, 8, 8], 10, 1, False),
    ([160, 512, 7, 7], 10, 1, False),
    ([320, 197, 384], 10, 2, False),
    ([2000, 500], 10, 1, False),
]
OURS, FLOOR = "ours", "floor"


def along_channels(parameter, input, channel_dim):
    """[K, C] → [K, 1, …, C, …, 1], beside input [K, B, …]."""
    return parameter.reshape(-1, *[1] * channel_dim, parameter.size(1), *[1] * (input.dim() - channel_dim - 1))


def broadcast(x, gain, bias, channel_dim):
    gain, bias = (along_channels(p, x, channel_dim) for p in (gain, bias))
    return F.relu(x.unflatten(0, (gain.size(0), -1)) * gain + bias).flatten(0, 1)


def slices(x, gain, bias, channel_dim):
    gain, bias = (along_channels(p, x, channel_dim) for p in (gain, bias))
    members = zip(x.chunk(len(gain)), gain, bias, strict=True)
    return torch.cat([F.relu(rows * g + b) for rows, g, b in members])


def ours(x, gain, bias, channel_dim):
    return lp.functional.member_gain(x, gain, bias, channel_dim=channel_dim, activation="relu")


def floor(x, gain, bias, channel_dim):
    return F.relu(x)


def contenders(device):
    found = {"broadcast formula": broadcast, "slices + cat": slices}
    if device.type == "cuda":
        found |= {f"compiled {name}": torch.compile(f, dynamic=False) for name, f in found.items()}
    return {**found, OURS: ours, FLOOR: floor}


class Case:
    """One shape: its tensors, and a training step of a contender."""

    def __init__(self, shape, num_members, channel_dim, channels_last, device, dtype):
        torch.manual_seed(0)
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.x, self.dy = (
            torch.randn(shape, device=device).to(dtype).contiguous(memory_format=memory_format) for _ in range(2)
        )
        # In x's type: the formula in plain PyTorch would otherwise turn to float32.
        self.gain, self.bias = (torch.randn(num_members, shape[channel_dim], device=device).to(dtype) for _ in range(2))
        self.leaves = [t.requires_grad_() for t in (self.x, self.gain, self.bias)]
        self.channel_dim = channel_dim
        self.bytes = 5 * self.x.numel() * self.x.element_size()

    def step(self, function):
        for leaf in self.leaves:
            leaf.grad = None
        y = function(*self.leaves, self.channel_dim)
        y.backward(self.dy)
        return y

    def check(self):
        """Raise where the op and the broadcast formula disagree on the output: what is wrong is not timed."""
        with torch.no_grad():
            values = (f(*self.leaves, self.channel_dim) for f in (ours, broadcast))
            torch.testing.assert_close(*values, atol=1e-5 + 8 * torch.finfo(self.x.dtype).eps, rtol=2e-2)


def bench(case, functions, seconds):
    """Return {contender: figures}."""
    case.check()
    steps = {name: lambda f=f: case.step(f) for name, f in functions.items()}
    times = interleaved(steps, case.x.device, seconds=seconds)
    rows = {}
    for name, values in times.items():
        low, median, high = quartiles(values)
        rows[name] = {"ms": 1e3 * median, "ms_quartiles": [1e3 * low, 1e3 * high], "GB/s": case.bytes / median / 1e9}
    fastest = min((name for name in rows if name not in (OURS, FLOOR)), key=lambda name: rows[name]["ms"])
    for name, row in rows.items():
        row["to_fastest_peer"] = ratios(times[name], times[fastest])
    return rows


def describe(name, row):
    low, median, high = row["to_fastest_peer"]
    return f"  {name:26} {row['ms']:9.2f} ms {row['GB/s']:8.1f} GB/s   × {median:.2f} ({low:.2f} … {high:.2f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--seconds", type=float, default=3.0, help="for each table")
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    report = {
        "torch": torch.__version__, "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(), "device": arguments.device, "dtype": arguments.dtype,
        "copy GB/s": copy_bandwidth(device) / 1e9, "tables": [],
    }  # fmt: skip
    for shape, num_members, channel_dim, channels_last in CASES:
        case = Case(shape, num_members, channel_dim, channels_last, device, getattr(torch, arguments.dtype))
        rows = bench(case, contenders(device), arguments.seconds)
        layout = "channels_last" if channels_last else "contiguous"
        print(f"\n{shape} K={num_members} channel_dim={channel_dim} {layout} {arguments.dtype}")
        print("\n".join(describe(name, row) for name, row in rows.items()), flush=True)
        report["tables"].append(
            {"shape": shape, "members": num_members, "channel_dim": channel_dim, "layout": layout, "rows": rows}
        )
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
