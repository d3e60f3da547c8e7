"""Time of a batch norm with the gains of rank-1 layers beside it, forward and backward: in it, or passes of their own.

    python benchmarks/bench_norm_gains.py [--device cuda] [--dtype bfloat16] [--seconds 3] [--output results.json]

benchmarks/README.md says how to read the figures. `floor` is batch norm and ReLU without a gain.
"""

import torch
import torch.nn.functional as F
from comparison import OURS, compare, make_parser, run

import latephase_kernels as lp
from latephase_kernels.ops.ensemble_batch_norm_gain import normalize_with_gain

SHAPES = [(8, 160, 32), (8, 320, 16), (8, 640, 8)]  # rows a member, channels, size: the stages of WRN-28-10
FLOOR = "floor"
# The second in float32 alone: where a pass rounds x · gain to a short type, other values pass the ReLU.
PATTERNS = ("BN → ReLU → gain", "gain → BN → ReLU → gain")


def norm(x, weight, bias, **options):
    options |= {"num_members": len(weight), "activation": "relu"}
    return lp.functional.ensemble_batch_norm(x, None, None, weight, bias, True, **options)


def formula(x, weight, bias, after, before=None):
    x, weight, bias, after = (
        x.unflatten(0, (len(weight), -1)),
        *(t[:, None, :, None, None] for t in (weight, bias, after)),
    )
    x = x if before is None else x * before[:, None, :, None, None]
    var, mean = torch.var_mean(x, (1, 3, 4), correction=0, keepdim=True)
    return (F.relu((x - mean) * (var + 1e-5).rsqrt() * weight + bias) * after).flatten(0, 1)


def passes(x, weight, bias, after, before=None):
    x = x if before is None else lp.functional.member_gain(x, before)
    return lp.functional.member_gain(norm(x, weight, bias), after)


def ours(x, weight, bias, after, before=None):
    if before is None:
        return norm(x, weight, bias, output_gain=after)
    return normalize_with_gain(x, before, None, weight, bias, None, 1e-5, len(weight), "relu", after)[0]


def floor(x, weight, bias, after, before=None):
    return norm(x, weight, bias)


def cases(arguments):
    device, dtype, members = arguments.device, getattr(torch, arguments.dtype), arguments.members
    for rows, channels, size in SHAPES:
        for layout in (torch.contiguous_format, torch.channels_last):
            for pattern in PATTERNS if dtype == torch.float32 else PATTERNS[:1]:
                torch.manual_seed(0)
                shape = (members * rows, channels, size, size)
                x, dy = (torch.randn(shape, device=device).to(dtype).contiguous(memory_format=layout) for _ in range(2))
                parameters = [torch.randn(members, channels, device=device) for _ in range(pattern.count("gain") + 2)]
                leaves = [t.requires_grad_() for t in (x, *parameters)]
                functions = {"norm and passes": passes, OURS: ours, FLOOR: floor}
                work = 5 * x.numel() * x.element_size()
                table = compare(functions, leaves, dy, formula, arguments, plain=(FLOOR,), work=work)
                yield f"{pattern} {list(shape)} {str(layout).removeprefix('torch.')}", table


def main():
    arguments = make_parser(__doc__, seconds=3.0).parse_args()
    run("norm_gains", arguments, cases(arguments), FLOOR, FLOOR)


if __name__ == "__main__":
    main()
