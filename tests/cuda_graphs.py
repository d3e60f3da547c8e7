"""A step captured in a CUDA graph and replayed on changed data."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def check_replay(step: Callable[[], Sequence[Tensor]], change: Callable[[], object]) -> None:
    """Assert that step(), captured, gives on replay behind change() the bits that it gives when called."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    change()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(*pair) for pair in zip(captured, step(), strict=True))
