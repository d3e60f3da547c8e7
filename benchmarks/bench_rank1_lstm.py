"""Time of an LSTM layer with rank-1 gains, forward and backward, beside what a user would otherwise write.

    python benchmarks/bench_rank1_lstm.py [--device cuda] [--dtype bfloat16] [--members 10] [--batch 32] [--steps 100]

Every row is timed in turn with the others in one run. Ratios are taken round by round, to the loop over members: an
nn.LSTM call each, with the member's folded weights W ∘ (r_k s_kᵀ). Their quartiles stand in brackets.
"""

import argparse
import json
import os
import platform

import torch
from timing import interleaved, quartiles, ratios
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


LOOP = "loop over members"
FUNCTIONS = {
    LOOP: loop_over_members,
    "one LSTM, no members": one_plain_lstm,
    "plain formula": plain_formula,
    "ours": lambda *arguments: lp.functional.rank1_lstm(*arguments)[0],
}


def make_tensors(arguments):
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
    options = {"device": arguments.device, "dtype": getattr(torch, arguments.dtype)}
    return [tensor.to(**options).requires_grad_() for tensor in tensors]


def bench(arguments):
    """Return {contender: figures}."""
    tensors = make_tensors(arguments)
    expected = loop_over_members(*tensors)
    dy = torch.randn_like(expected)
    for name in ("plain formula", "ours"):
        torch.testing.assert_close(FUNCTIONS[name](*tensors), expected, rtol=0.02, atol=0.02)
    del expected

    def step(function):
        for tensor in tensors:
            tensor.grad = None
        function(*tensors).backward(dy)

    functions = {name: lambda f=f: step(f) for name, f in FUNCTIONS.items()}
    times = interleaved(functions, torch.device(arguments.device), seconds=arguments.seconds)
    return {
        name: {"ms": [1e3 * t for t in quartiles(t)], "to_loop": ratios(t, times[LOOP]), "rounds": len(t)}
        for name, t in times.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    shape = {"members": 10, "batch": 32, "steps": 100, "units": 500, "inputs": 205}
    for name, default in shape.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--output", help="write the figures here as JSON")
    arguments = parser.parse_args()
    rows = bench(arguments)
    settings = {name: getattr(arguments, name) for name in ("device", "dtype", *shape)}
    settings |= {"torch": torch.__version__, "threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
    print(", ".join(f"{name} {value}" for name, value in settings.items()))
    for name, row in rows.items():
        low, ratio, high = row["to_loop"]
        print(f"  {name:22} {row['ms'][1]:9.1f} ms   × {ratio:.2f} ({low:.2f} … {high:.2f})")
    if arguments.output:
        machine = platform.processor() or platform.machine()
        with open(arguments.output, "w") as file:
            json.dump({**settings, "machine": machine, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
