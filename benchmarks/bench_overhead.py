"""Overhead of one call on a tensor so small that its arithmetic takes no time: forward and backward, all in Python.

    python benchmarks/bench_overhead.py [--rounds 400] [--output benchmarks/results/overhead_cpu.json]

Calls take turns, 50 at a time; the thread's own processor time counts, so that other work on the machine counts less.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import quartiles, ratios
from torch import nn

import latephase_kernels as lp
from latephase_kernels.train.runs import processor

K, B, C, SIZE = 2, 2, 4, 2
CALLS = 50


class PassThrough(torch.autograd.Function):
    """Saves its inputs, allocates its results, computes nothing: the least that any op written so can take."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight, bias)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, dy):
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors)


def cases():
    """Return {case: ({name: function}, name of the plain one)}: each function is one call forward and backward."""
    torch.manual_seed(0)
    x = torch.randn(K * B, C, SIZE, SIZE, requires_grad=True)
    dy = torch.randn_like(x)
    weight, bias, output_gain = (torch.randn(K, C, requires_grad=True) for _ in range(3))
    plain_weight, plain_bias = (torch.randn(C, requires_grad=True) for _ in range(2))
    running, plain_running = (torch.zeros(K, C), torch.ones(K, C)), (torch.zeros(C), torch.ones(C))
    rows, matrix = torch.randn(K * B, C, requires_grad=True), torch.randn(C, C, requires_grad=True)
    drows = torch.randn(K * B, C)
    module = lp.nn.EnsembleBatchNorm2d(C, K, activation="relu")
    plain_norm, relu = nn.BatchNorm2d(C), nn.ReLU()
    leaves = [x, weight, bias, output_gain, plain_weight, plain_bias, rows, matrix]
    leaves += [*module.parameters(), *plain_norm.parameters()]

    def call(function, gradient=dy):
        def run():
            for leaf in leaves:
                leaf.grad = None
            function().backward(gradient)

        return run

    mean, var = running
    plain_mean, plain_var = plain_running
    ensemble_batch_norm = lp.functional.ensemble_batch_norm

    def ensemble():
        return ensemble_batch_norm(x, mean, var, weight, bias, True, 0.1, 1e-5, num_members=K, activation="relu")

    def separate():
        return F.relu(F.batch_norm(x, plain_mean, plain_var, plain_weight, plain_bias, True, 0.1, 1e-5))

    def broadcast_gain():
        return F.relu((x.unflatten(0, (K, B)) * weight[:, None, :, None, None]).flatten(0, 1))

    def broadcast_linear():
        scaled = (rows.unflatten(0, (K, B)) * weight[:, None]).flatten(0, 1)
        return (F.linear(scaled, matrix).unflatten(0, (K, B)) * output_gain[:, None]).flatten(0, 1)

    plain = "F.relu(F.batch_norm)"
    return {
        "ensemble_batch_norm, ReLU": (
            {
                plain: call(separate),
                "ours": call(ensemble),
                "an autograd.Function that computes nothing": call(lambda: PassThrough.apply(x, weight, bias)),
            },
            plain,
        ),
        "EnsembleBatchNorm2d, ReLU": (
            {"nn.BatchNorm2d, nn.ReLU": call(lambda: relu(plain_norm(x))), "ours": call(lambda: module(x))},
            "nn.BatchNorm2d, nn.ReLU",
        ),
        "member_gain, ReLU": (
            {
                "broadcast formula": call(broadcast_gain),
                "ours": call(lambda: lp.functional.member_gain(x, weight, activation="relu")),
            },
            "broadcast formula",
        ),
        "rank1_linear": (
            {
                "broadcast formula": call(broadcast_linear, drows),
                "ours": call(lambda: lp.functional.rank1_linear(rows, matrix, weight, output_gain), drows),
            },
            "broadcast formula",
        ),
    }


def bench(functions, rounds):
    """Return {name: microseconds of each round}."""
    times = {name: [] for name in functions}
    for round in range(rounds + 5):
        for name, function in functions.items():
            start = time.thread_time()
            for _ in range(CALLS):
                function()
            if round >= 5:
                times[name].append(1e6 * (time.thread_time() - start) / CALLS)
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "overhead_cpu.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report = {"torch": torch.__version__, "device": processor(), "input": [K * B, C, SIZE, SIZE], "cases": {}}
    print("| forward and backward | µs | ratio |\n|---|---|---|")
    for case, (functions, plain) in cases().items():
        times = bench(functions, arguments.rounds)
        rows = report["cases"][case] = {}
        for name, values in times.items():
            rows[name] = {"us": quartiles(values), f"to {plain}": ratios(values, times[plain])}
            low, median, high = rows[name][f"to {plain}"]
            print(f"| {case}: {name} | {rows[name]['us'][1]:.1f} | {median:.2f} ({low:.2f} … {high:.2f}) |")
    arguments.output.parent.mkdir(exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
