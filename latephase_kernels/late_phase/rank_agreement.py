"""Whether the ranks hold the same model: data-parallel training of different ones would go unnoticed."""

import hashlib
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


def _digest(tensor: Tensor) -> bytes:
    """Return a digest of a tensor's type, shape and bits."""
    content = tensor.detach().cpu().contiguous()
    digest = hashlib.blake2b(f"{content.dtype}{list(content.shape)}".encode(), digest_size=16)
    digest.update(content.reshape(-1).view(torch.uint8).numpy())
    return digest.digest()


def check_same_on_ranks(where: str, tensors: Iterable[tuple[str, Tensor]], group: "dist.ProcessGroup | None") -> None:
    """Raise, on every rank of group, unless all have the same names, shapes, types and values.

    Raises:
        ValueError: names the first tensor that differs, and the rank that has another.
    """
    digests = {name: _digest(tensor) for name, tensor in tensors}
    whole = hashlib.blake2b(repr(digests).encode(), digest_size=16).digest()
    ranks = dist.get_world_size(group)
    wholes: list = [None] * ranks
    dist.all_gather_object(wholes, whole, group=group)
    if all(other == wholes[0] for other in wholes):
        return
    found: list = [None] * ranks
    dist.all_gather_object(found, digests, group=group)
    for other, theirs in enumerate(found):
        for name in (*found[0], *theirs):
            if theirs.get(name) != found[0].get(name):
                kind = "values" if name in theirs and name in found[0] else "tensors"
                raise ValueError(
                    f"{where}: every rank must have the same model, but ranks 0 and {other} have other {kind}: {name}; "
                    "build it from the same code and options, after the same torch.manual_seed, or load one checkpoint"
                )
    raise ValueError(f"{where}: every rank must have the same model, but their tensors are in another order")
