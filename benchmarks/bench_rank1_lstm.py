"""CPU time of an LSTM layer with rank-1 gains, forward and backward, beside what a user would otherwise write.

    python benchmarks/bench_rank1_lstm.py [--seconds 60] [--members 10] [--batch 32] [--steps 100] [--units 500]

Every row is timed in turn with the others in one run; `ratio` is to the loop over members, each an nn.LSTM call with
that member's folded weights W ∘ (r_k s_kᵀ).
"""

import argparse
import json
import os
import platform

import torch
from timing import interleaved, summarize
from torch import nn

import latephase_kernels as lp


def loop_over_members(x, h, c, weight_ih, weight_hh, s_ih, r_ih, s_hh, r_hh, bias):
    outputs = []
    for k, (x_k, h_k, c_k) in enumerate(zip(*(t.chunk(len(s_ih), -2) for t in (x, h, c)))):
        folded = [
            weight_ih * r_ih[k].unsqueeze(1) * s_ih[k],
            weight_hh * r_hh[k].unsqueeze(1) * s_hh[k],
            bias,
            torch.zeros_like(bias),
        ]
        state = (h_k.unsqueeze(0), c_k.unsqueeze(0))
        outputs.append(torch.lstm(x_k, state, folded, True, 1, 0.0, True, False, False)[0])
    return torch.cat(outputs, 1)


def one_plain_lstm(x, h, c, weight_ih, weight_hh, s_ih, r_ih, s_hh, r_hh, bias):
    weights = [weight_ih, weight_hh, bias, torch.zeros_like(bias)]
    return torch.lstm(x, (h.unsqueeze(0), c.unsqueeze(0)), weights, True, 1, 0.0, True, False, False)[0]


def plain_formula(x, h, c, weight_ih, weight_hh, s_ih, r_ih, s_hh, r_hh, bias):
    batch = x.size(1) // len(s_ih)
    s_ih, r_ih, s_hh, r_hh = (gain.repeat_interleave(batch, 0) for gain in (s_ih, r_ih, s_hh, r_hh))
    outputs = []
    for x_t in x:
        z = ((x_t * s_ih) @ weight_ih.T) * r_ih + ((h * s_hh) @ weight_hh.T) * r_hh + bias
        i, f, g, o = z.chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    return torch.stack(outputs)


FUNCTIONS = {
    "loop over members": loop_over_members,
    "plain, no members": one_plain_lstm,
    "plain formula": plain_formula,
    "ours": lambda *arguments: lp.functional.rank1_lstm(*arguments)[0],
}


def bench(arguments):
    torch.manual_seed(0)
    rows, units, num_members = arguments.members * arguments.batch, arguments.units, arguments.members
    template = nn.LSTM(arguments.inputs, units)
    tensors = [
        torch.randn(arguments.steps, rows, arguments.inputs),
        torch.zeros(rows, units),
        torch.zeros(rows, units),
        template.weight_ih_l0.detach(),
        template.weight_hh_l0.detach(),
        *(1 + 0.1 * torch.randn(num_members, size) for size in (arguments.inputs, 4 * units, units, 4 * units)),
        template.bias_ih_l0.detach(),
    ]
    tensors = [tensor.requires_grad_() for tensor in tensors]
    dy = torch.randn(arguments.steps, rows, units)

    def step(function):
        def run():
            for tensor in tensors:
                tensor.grad = None
            function(*tensors).backward(dy)

        return run

    functions = {name: step(function) for name, function in FUNCTIONS.items() if name not in arguments.skip}
    return summarize(interleaved(functions, seconds=arguments.seconds, warmup=1), "loop over members")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("members", 10), ("batch", 32), ("steps", 100), ("units", 500), ("inputs", 205)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--skip", nargs="*", default=[], choices=["plain formula", "plain, no members"])
    parser.add_argument("--output", help="write the figures here as JSON")
    arguments = parser.parse_args()
    rows = bench(arguments)
    shape = {name: getattr(arguments, name) for name in ("members", "batch", "steps", "units", "inputs")}
    print(", ".join(f"{name} {value}" for name, value in shape.items()))
    print(f"threads {torch.get_num_threads()}, load {os.getloadavg()[0]:.1f}")
    for name, row in rows.items():
        spread = f"({row['low_ms']:.1f} … {row['high_ms']:.1f})"
        print(f"  {name:18} {row['median_ms']:9.1f} ms  × {row['ratio']:.2f}  {spread}")
    if arguments.output:
        machine = platform.processor() or platform.machine()
        report = {"torch": torch.__version__, "machine": machine, "threads": torch.get_num_threads(), **shape}
        with open(arguments.output, "w") as file:
            json.dump(report | {"rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
