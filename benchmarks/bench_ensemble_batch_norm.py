"""CPU time of ensemble batch norm + ReLU, forward and backward, beside what a user would otherwise write.

    python benchmarks/bench_ensemble_batch_norm.py [--seconds 5] [--dtype float32] [--output results.json]

Every row is timed in turn with the others in one run; `ratio` is to plain `F.relu(F.batch_norm)` on the same stacked
tensor, which knows no members: the cost of no ensemble.
"""

import argparse
import json
import platform

import torch
import torch.nn.functional as F
from timing import interleaved, summarize

import latephase_kernels as lp

SHAPES = [([160, 160, 32, 32], 10), ([160, 640, 8, 8], 10), ([80, 64, 56, 56], 10)]  # [K·B, C, H, W], K


def plain(x, weight, bias, num_members):
    return F.relu(F.batch_norm(x, None, None, weight[0], bias[0], True))


def slices(x, weight, bias, num_members):
    parts = [F.batch_norm(p, None, None, w, b, True) for p, w, b in zip(x.chunk(num_members), weight, bias)]
    return F.relu(torch.cat(parts))


def interleaved_view(x, weight, bias, num_members):
    rows, channels = x.shape[:2]
    side_by_side = x.unflatten(0, (num_members, -1)).transpose(0, 1).reshape(rows // num_members, -1, *x.shape[2:])
    y = F.relu(F.batch_norm(side_by_side, None, None, weight.flatten(), bias.flatten(), True))
    return y.unflatten(1, (num_members, channels)).transpose(0, 1).reshape(x.shape)


def ours(x, weight, bias, num_members):
    return lp.functional.ensemble_batch_norm(
        x, None, None, weight, bias, True, num_members=num_members, activation="relu"
    )


def bench(shape, num_members, channels_last, dtype, seconds):
    torch.manual_seed(0)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(shape).to(dtype).contiguous(memory_format=memory_format).requires_grad_()
    dy = torch.randn(shape).to(dtype).contiguous(memory_format=memory_format)
    weight = torch.randn(num_members, shape[1]).requires_grad_()
    bias = torch.randn(num_members, shape[1]).requires_grad_()

    def step(function):
        def run():
            x.grad = weight.grad = bias.grad = None
            function(x, weight, bias, num_members).backward(dy)

        return run

    functions = {"plain batch norm": plain, "slices + cat": slices, "[B, K·C] view": interleaved_view, "ours": ours}
    if channels_last:
        del functions["[B, K·C] view"]
    return summarize(interleaved({n: step(f) for n, f in functions.items()}, seconds=seconds), "plain batch norm")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="for each table")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16", "float64"])
    parser.add_argument("--output", help="write the figures here as JSON")
    arguments = parser.parse_args()
    report = {"torch": torch.__version__, "machine": platform.processor() or platform.machine(),
              "threads": torch.get_num_threads(), "dtype": arguments.dtype, "tables": []}  # fmt: skip
    for shape, num_members in SHAPES:
        for channels_last in (False, True):
            rows = bench(shape, num_members, channels_last, getattr(torch, arguments.dtype), arguments.seconds)
            layout = "channels_last" if channels_last else "contiguous"
            print(f"\n{shape} K={num_members} {layout} {arguments.dtype}")
            for name, row in rows.items():
                spread = f"({row['low_ms']:.2f} … {row['high_ms']:.2f})"
                print(f"  {name:18} {row['median_ms']:9.2f} ms  × {row['ratio']:.2f}  {spread}")
            report["tables"].append({"shape": shape, "members": num_members, "layout": layout, "rows": rows})
    if arguments.output:
        with open(arguments.output, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
