"""Time of member gain with bias and ReLU, forward and backward, beside what a user would otherwise write.

    python benchmarks/bench_member_gain.py [--device cuda] [--dtype bfloat16] [--seconds 3] [--output results.json]

benchmarks/README.md says how to read the figures. `floor` is the ReLU alone: the bytes that must move.
"""

import torch
import torch.nn.functional as F
from comparison import OURS, compare, compiled, make_parser, run

import latephase_kernels as lp

CASES = [  # rows a member, and the rest of the shape; channel_dim; channels_last
    (16, (160, 32, 32), 1, False),
    (16, (160, 32, 32), 1, True),
    (16, (640, 8, 8), 1, False),
    (16, (512, 7, 7), 1, False),
    (32, (197, 384), 2, False),
    (200, (500,), 1, False),
]
FLOOR = "floor"


def along_channels(parameter, shape, channel_dim):
    """[…, C] → […, C, 1, …, 1], beside one of shape `shape`."""
    trailing = [1] * (len(shape) - channel_dim - 1)
    return parameter.reshape(*parameter.shape[:-1], *[1] * channel_dim, parameter.size(-1), *trailing)


def contenders(channel_dim, arguments):
    def broadcast(x, gain, bias):
        gain, bias = (along_channels(p, x.shape, channel_dim) for p in (gain, bias))  # [K, 1, C, …] beside [K, B, C, …]
        return F.relu(x.unflatten(0, (gain.size(0), -1)) * gain + bias).flatten(0, 1)

    def one_member(x, gain, bias):
        shape = x.shape[channel_dim + 1 :]
        gain, bias = (p.view(-1, *[1] * len(shape)) for p in (gain, bias))
        return F.relu(x * gain + bias)

    def slices(x, gain, bias):
        return torch.cat([one_member(*member) for member in zip(x.chunk(len(gain)), gain, bias, strict=True)])

    def vmap(x, gain, bias):
        return torch.func.vmap(one_member)(x.unflatten(0, (len(gain), -1)), gain, bias).flatten(0, 1)

    def ours(x, gain, bias):
        return lp.functional.member_gain(x, gain, bias, channel_dim=channel_dim, activation="relu")

    def floor(x, gain, bias):
        return F.relu(x)

    peers = {"broadcast formula": broadcast, "slices + cat": slices, "vmap": vmap}
    return broadcast, {**peers, **compiled({"broadcast formula": broadcast}, arguments), OURS: ours, FLOOR: floor}


def cases(arguments):
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    for batch, rest, channel_dim, channels_last in CASES:
        torch.manual_seed(0)
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        shape = (arguments.members * batch, *rest)
        x, dy = (torch.randn(shape, device=device).to(dtype).contiguous(memory_format=memory_format) for _ in range(2))
        # In x's type: the formula in plain PyTorch would otherwise turn to float32.
        gain, bias = (torch.randn(arguments.members, shape[channel_dim], device=device).to(dtype) for _ in range(2))
        leaves = [t.requires_grad_() for t in (x, gain, bias)]
        formula, functions = contenders(channel_dim, arguments)
        useful = 5 * x.numel() * x.element_size()
        rows = compare(functions, leaves, dy, formula, arguments, plain=(FLOOR,), work=useful)
        layout = "channels_last" if channels_last else "contiguous"
        yield f"{list(shape)} channel_dim={channel_dim} {layout}", rows


def main():
    arguments = make_parser(__doc__, seconds=3.0).parse_args()
    run("member_gain", arguments, cases(arguments), FLOOR, FLOOR)


if __name__ == "__main__":
    main()
