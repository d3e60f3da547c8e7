"""Time of a linear layer with rank-1 gains, forward and backward, beside what a user would otherwise write.

    python benchmarks/bench_rank1_linear.py [--device cuda] [--dtype bfloat16] [--layers "MLP 784 → 512" …]

benchmarks/README.md says how to read the figures. The plain layer is F.linear on the same stacked rows: no members.
"""

import torch
import torch.nn.functional as F
from comparison import OURS, compare, compiled, make_parser, run

import latephase_kernels as lp

LAYERS = {  # rows a member, in, out; ViT-S: images of 197 tokens; LSTM: one step of 32 sequences
    "MLP 784 → 512": (200, 784, 512),
    "MLP 512 → 512": (200, 512, 512),
    "ViT-S 384 → 1536": (16 * 197, 384, 1536),
    "ViT-S 1536 → 384": (16 * 197, 1536, 384),
    "LSTM 500 → 2000": (32, 500, 2000),
}
GPU_IMAGES = 4  # times as many images a member on a GPU
PLAIN = "plain layer"


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


def torch_uncertainty():
    """Its BatchLinear as a function, where it is installed."""
    try:
        from torch_uncertainty.layers.batch_ensemble import BatchLinear
    except ImportError:
        return {}

    def batch_linear(x, weight, s, r, bias):
        layer = BatchLinear(*reversed(weight.shape), len(s), device="meta")
        tensors = {"linear.weight": weight, "r_group": s, "s_group": r, "bias": bias.expand(len(s), -1)}
        return torch.func.functional_call(layer, tensors, x)

    return {"torch-uncertainty's BatchLinear": batch_linear}


def contenders(arguments):
    peers = {"loop over members": loop_over_members, "vmap": vmap, "broadcast formula": broadcast_formula}
    return {
        PLAIN: plain,
        **peers,
        **compiled({"broadcast formula": broadcast_formula, "loop over members": loop_over_members}, arguments),
        **torch_uncertainty(),
        OURS: lp.functional.rank1_linear,
    }


def cases(arguments):
    options = {"device": arguments.device, "dtype": getattr(torch, arguments.dtype)}
    for layer in arguments.layers:
        torch.manual_seed(0)
        (rows, in_features, out_features), num_members = LAYERS[layer], arguments.members
        if arguments.device == "cuda" and layer.startswith("ViT"):
            rows *= GPU_IMAGES
        x, dy = (torch.randn(num_members * rows, size) for size in (in_features, out_features))
        weight = torch.randn(out_features, in_features) / in_features**0.5
        s, r = (1 + 0.1 * torch.randn(num_members, size) for size in (in_features, out_features))
        leaves = [t.to(**options).requires_grad_() for t in (x, weight, s, r, torch.randn(out_features))]
        torch._dynamo.reset()
        useful = 6 * num_members * rows * in_features * out_features
        yield f"{layer}, {num_members} × {rows} rows", compare(
            contenders(arguments), leaves, dy.to(**options), broadcast_formula, arguments,
            plain=(PLAIN,), work=useful,
        )  # fmt: skip


def main():
    parser = make_parser(__doc__, seconds=10.0)
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), choices=list(LAYERS), metavar="LAYER")
    arguments = parser.parse_args()
    run("rank1_linear", arguments, cases(arguments), PLAIN)


if __name__ == "__main__":
    main()
