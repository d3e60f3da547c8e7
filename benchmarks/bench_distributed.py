"""Bytes that one rank hands to collectives, for the same images: plain DDP, data-parallel and member-parallel.

    torchrun --standalone --nproc_per_node=2 -m benchmarks.bench_distributed [--model resnet50] [--members 10]

Counted, not computed: every call of a collective adds the size of its tensors. DDP takes K steps of one minibatch each,
the others one stacked step of K minibatches. What a collective puts on the wire depends on its algorithm and on the
number of ranks: a ring of R sends 2·(R − 1)/R times the size of what it sums.
"""

import argparse
import contextlib
import json
from collections import Counter
from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import latephase_kernels as lp


def _size(tensors) -> int:
    tensors = [tensors] if isinstance(tensors, torch.Tensor) else tensors
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@contextlib.contextmanager
def counted() -> Iterator[Counter]:
    """Inside the with block, add up the bytes of this rank's tensors by collective."""
    found: Counter = Counter()
    originals = {name: getattr(dist, name) for name in ("all_reduce", "all_gather", "_broadcast_coalesced")}

    def all_reduce(tensor, *arguments, **options):
        found["all_reduce"] += _size(tensor)
        return originals["all_reduce"](tensor, *arguments, **options)

    def all_gather(gathered, tensor, *arguments, **options):
        found["all_gather"] += _size(gathered)
        return originals["all_gather"](gathered, tensor, *arguments, **options)

    def broadcast(group, tensors, *arguments):
        found["broadcast"] += _size(tensors)
        return originals["_broadcast_coalesced"](group, tensors, *arguments)

    dist.all_reduce, dist.all_gather, dist._broadcast_coalesced = all_reduce, all_gather, broadcast
    try:
        yield found
    finally:
        for name, function in originals.items():
            setattr(dist, name, function)


def plain_ddp(model: nn.Module, num_members: int, images: torch.Tensor, labels: torch.Tensor) -> Counter:
    """K steps, each of a rank's rows of one minibatch."""
    wrapped = DistributedDataParallel(model)
    sums: Counter = Counter()

    def count(group, bucket):
        sums["all_reduce"] += _size(bucket.buffer())
        work = dist.distributed_c10d.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    wrapped.register_comm_hook(None, count)
    with counted() as found:
        for _ in range(num_members):
            F.cross_entropy(wrapped(images), labels).backward()
    return found + sums


def late_phase(
    model: nn.Module, num_members: int, member_ranks: int, batch_norm: str, images: torch.Tensor, labels: torch.Tensor
) -> Counter:
    """One step of K minibatches, of which rank (m, d) has K/M members' rows."""
    data_ranks = dist.get_world_size() // member_ranks
    mesh = dist.init_device_mesh("cpu", (member_ranks, data_ranks), mesh_dim_names=("member", "data"))
    distributed = lp.Distributed(model, mesh, batch_norm=batch_norm)
    distributed.expand(num_members)
    own = len(distributed.members)
    rows = len(images) * dist.get_world_size() // data_ranks  # a minibatch is as large as DDP's
    images, labels = images.repeat(own * rows // len(images), 1, 1, 1), labels.repeat(own * rows // len(labels))
    with counted() as found:
        distributed.backward(lp.member_loss(F.cross_entropy, model(images), labels, num_members=own))
    return found


def build(name: str) -> nn.Module:
    """Return a freshly initialized model, the same on every rank."""
    torch.manual_seed(0)
    if name == "small":
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
        )
    import torchvision

    return torchvision.models.get_model(name, weights=None)


def measure(name: str, num_members: int, pixels: int = 32) -> dict[str, dict[str, int]]:
    """Return the bytes a rank hands to each collective, for the K·B images of one stacked step, by way of training."""
    images, labels = torch.randn(2, 3, pixels, pixels), torch.zeros(2, dtype=torch.long)
    ranks, batch = dist.get_world_size(), (images, labels)
    found = {
        "DDP, K steps": plain_ddp(build(name), num_members, *batch),
        "data-parallel": late_phase(build(name), num_members, 1, "local", *batch),
        "data-parallel, synchronized": late_phase(build(name), num_members, 1, "synchronized", *batch),
        "member-parallel": late_phase(build(name), num_members, ranks, "local", *batch),
    }
    return {way: dict(counts) for way, counts in found.items()}


def main() -> None:
    """Print the table, and the same as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="resnet50", help='of torchvision, or "small"')
    parser.add_argument("--members", type=int, default=10)
    given = parser.parse_args()
    dist.init_process_group("gloo")
    found = measure(given.model, given.members)
    if dist.get_rank() == 0:
        print(f"{given.model}, K = {given.members}, {dist.get_world_size()} ranks: MB that one rank hands over")
        for way, counts in found.items():
            parts = ", ".join(f"{kind} {size / 1e6:.2f}" for kind, size in sorted(counts.items()))
            print(f"  {way:28s} {sum(counts.values()) / 1e6:10.2f}   ({parts})")
        print(json.dumps({"model": given.model, "members": given.members, "bytes": found}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
