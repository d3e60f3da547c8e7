"""What minibatches of every kind have in common: seeds that follow from a place in the run, and ranks' shares."""

import hashlib


def derived_seed(*parts: int | str) -> int:
    """Return a seed for torch.Generator that depends on all parts, and is unrelated where one of them differs."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


def rank_share(where: str, batch_size: int, rank: int, num_ranks: int, samples: str = "samples") -> range:
    """Return the rows of a minibatch that are this rank's, of num_ranks equal shares.

    Raises:
        ValueError: batch_size is not divisible, or there is no such rank; the message begins with `where`.
    """
    if num_ranks < 1 or batch_size % num_ranks or not 0 <= rank < num_ranks:
        raise ValueError(
            f"{where}: batch_size={batch_size} must be divisible by num_ranks={num_ranks}, and rank={rank} "
            f"smaller than that; batch_size counts the {samples} of all ranks"
        )
    share = batch_size // num_ranks
    return range(rank * share, (rank + 1) * share)
