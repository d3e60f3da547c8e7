"""Time of an LSTM layer with rank-1 gains, forward and backward, beside what a user would otherwise write.

    python benchmarks/bench_rank1_lstm.py [--device cuda] [--dtype bfloat16] [--members 10] [--batch 32] [--steps 100]

benchmarks/README.md says how to read the figures. The loop over members is an nn.LSTM call each, with the member's
folded weights W ∘ (r_k s_kᵀ); one LSTM has one weight for all rows: no members.
"""

import torch
from comparison import OURS, compare, compiled, make_parser, run
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


def vmap(x, h, c, weight_ih, weight_hh, s_ih, r_ih, s_hh, r_hh, bias):
    def one_member(x, h, c, s_ih, r_ih, s_hh, r_hh):
        gains = (gain.unsqueeze(0) for gain in (s_ih, r_ih, s_hh, r_hh))
        return plain_formula(x, h, c, weight_ih, weight_hh, *gains, bias)

    x, h, c = (t.unflatten(-2, (len(s_ih), -1)) for t in (x, h, c))
    return torch.func.vmap(one_member, (1, 0, 0, 0, 0, 0, 0), 1)(x, h, c, s_ih, r_ih, s_hh, r_hh).flatten(1, 2)


LOOP, PLAIN = "loop over members", "one LSTM, no members"


def contenders(arguments):
    peers = {LOOP: loop_over_members, "plain formula": plain_formula, "vmap of the formula": vmap}
    # A hundred unrolled steps take a C++ compiler many minutes.
    under_compile = compiled({"plain formula": plain_formula}, arguments) if arguments.device == "cuda" else {}
    ours = {OURS: lambda *leaves: lp.functional.rank1_lstm(*leaves)[0]}
    return {PLAIN: one_plain_lstm, **peers, **under_compile, **ours}


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


def cases(arguments):
    leaves = make_tensors(arguments)
    dy = torch.randn(arguments.steps, leaves[1].size(0), arguments.units).to(leaves[0])
    in_both, out = arguments.inputs + arguments.units, 4 * arguments.units
    useful = 6 * arguments.steps * leaves[1].size(0) * in_both * out
    shape = f"{arguments.members} × {arguments.batch} sequences, {arguments.steps} steps, {arguments.units} units"
    yield (
        shape,
        compare(contenders(arguments), leaves, dy, plain_formula, arguments, plain=(PLAIN,), work=useful),
    )


def main():
    parser = make_parser(__doc__, seconds=60.0)
    for name, default in {"batch": 32, "steps": 100, "units": 500, "inputs": 205}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    run("rank1_lstm", arguments, cases(arguments), PLAIN)


if __name__ == "__main__":
    main()
