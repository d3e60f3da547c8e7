"""CPU time of a linear layer with rank-1 gains, forward and backward, beside what a user would otherwise write.

    python benchmarks/bench_rank1_linear.py [--seconds 20] [--members 10] [--layers "MLP 784 → 512" …]

All are timed in turn, in one run. The ratio is to F.linear on the same stacked rows, the cost of no members at all,
round by round; its quartiles stand in brackets.
"""

import argparse
import json
import os
import platform

import torch
import torch.nn.functional as F
from timing import interleaved, quartiles, ratios

import latephase_kernels as lp

LAYERS = {  # rows a member, in, out; ViT-S: 16 images of 197 tokens; LSTM: one step of 32 sequences
    "MLP 784 → 512": (200, 784, 512),
    "MLP 512 → 512": (200, 512, 512),
    "ViT-S 384 → 1536": (16 * 197, 384, 1536),
    "ViT-S 1536 → 384": (16 * 197, 1536, 384),
    "LSTM 500 → 2000": (32, 500, 2000),
}


def plain(x, weight, s, r, bias):
    return F.linear(x, weight, bias)


def one_member(x, weight, s, r, bias):
    return F.linear(x, weight * r.unsqueeze(1) * s, bias)


def loop_over_members(x, weight, s, r, bias):
    return torch.cat([one_member(x_k, weight, s_k, r_k, bias) for x_k, s_k, r_k in zip(x.chunk(len(s)), s, r)])


def vmap(x, weight, s, r, bias):
    in_dims = (0, None, 0, 0, None)
    return torch.func.vmap(one_member, in_dims)(x.unflatten(0, (len(s), -1)), weight, s, r, bias).flatten(0, 1)


def broadcast_formula(x, weight, s, r, bias):
    by_member = x.unflatten(0, (len(s), -1))
    return (F.linear(by_member * s.unsqueeze(1), weight) * r.unsqueeze(1) + bias).flatten(0, 1)


PLAIN = "plain, no members"
FUNCTIONS = {
    PLAIN: plain,
    "loop over members": loop_over_members,
    "vmap": vmap,
    "broadcast formula": broadcast_formula,
    "ours": lp.functional.rank1_linear,
}


def bench(layer, arguments):
    torch.manual_seed(0)
    (rows, in_features, out_features), num_members = LAYERS[layer], arguments.members
    tensors = [
        torch.randn(num_members * rows, in_features),
        torch.randn(out_features, in_features) / in_features**0.5,
        1 + 0.1 * torch.randn(num_members, in_features),
        1 + 0.1 * torch.randn(num_members, out_features),
        torch.randn(out_features),
    ]
    tensors = [tensor.requires_grad_() for tensor in tensors]
    dy = torch.randn(num_members * rows, out_features)

    def step(function):
        def run():
            for tensor in tensors:
                tensor.grad = None
            function(*tensors).backward(dy)

        return run

    functions = {name: step(function) for name, function in FUNCTIONS.items()}
    times = interleaved(functions, torch.device("cpu"), seconds=arguments.seconds)
    return {
        name: {"ms": [1e3 * t for t in quartiles(t)], "to_plain": ratios(t, times[PLAIN]), "rounds": len(t)}
        for name, t in times.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--members", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each layer")
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), choices=list(LAYERS), metavar="LAYER")
    parser.add_argument("--output", help="write the figures here as JSON")
    arguments = parser.parse_args()
    layers = {}
    for layer in arguments.layers:
        layers[layer] = bench(layer, arguments)
        rows, num_members = LAYERS[layer][0], arguments.members
        print(f"{layer}, {num_members} members × {rows} rows, threads {torch.get_num_threads()}", end=", ")
        print(f"load {os.getloadavg()[0]:.1f}")
        for name, row in layers[layer].items():
            low, median, high = row["to_plain"]
            print(f"  {name:18} {row['ms'][1]:9.1f} ms  × {median:.2f}  [{low:.2f}, {high:.2f}]", flush=True)
    if arguments.output:
        machine = platform.processor() or platform.machine()
        report = {"torch": torch.__version__, "machine": machine, "threads": torch.get_num_threads()}
        with open(arguments.output, "w") as file:
            json.dump(report | {"members": arguments.members, "layers": layers}, file, indent=1)


if __name__ == "__main__":
    main()
