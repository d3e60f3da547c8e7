"""A step's forward and backward passes as one CUDA graph: captured once a phase, then replayed without Python."""

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

WARMUP_STEPS = 3  # libraries choose their algorithms, torch.compile compiles

# Takes a function of no arguments; returns one that does again what it did, and the tensor it returned.
Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], Any], Tensor]]


def capture_on_gpu(function: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
    """Record what a function launches, without running it."""
    graph = torch.cuda.CUDAGraph()
    # Other threads (the image loader's) go on allocating and waiting meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = function()
    return graph.replay, result


class GraphedPasses:
    """Runs the passes of a step: the first steps of a phase as they are, the others as one graph.

    A graph reads and writes the same memory each time: inputs are copied into it, gradients are found where they
    always are, and are overwritten, not added to. Weights and statistics must stay the same tensors within a phase.

    Args:
        capture: see Capture.
    """

    def __init__(self, capture: Capture = capture_on_gpu):
        self._capture = capture
        self._stream: torch.cuda.Stream | None = None  # of the first steps
        self._phase: Hashable = None
        self._begin(None)

    def _begin(self, phase: Hashable) -> None:
        self._phase, self._steps = phase, 0
        self._replay: Callable[[], Any] | None = None
        self._static: list[Tensor] = []
        self._loss: Tensor | None = None
        self._gradients: list[tuple[nn.Parameter, Tensor | None]] = []

    def __call__(
        self,
        phase: Hashable,
        passes: Callable[..., Tensor],
        inputs: Iterable[Tensor],
        parameters: Callable[[], Iterable[nn.Parameter]],
    ) -> Tensor:
        """Return the loss of passes(*inputs), with the parameters' gradients set.

        Args:
            phase: what, when it changes, makes a graph invalid: the number of members, say.
            passes: forward and backward; must launch the same work each time within a phase.
            inputs: tensors, of the same shapes within a phase.
            parameters: returns those whose gradients are wanted.
        """
        inputs = list(inputs)
        if phase != self._phase or (self._static and [x.shape for x in inputs] != [x.shape for x in self._static]):
            self._begin(phase)
        if self._replay is None:
            for parameter in parameters():
                parameter.grad = None
            if self._steps < WARMUP_STEPS:
                self._steps += 1
                return self._beside(lambda: passes(*inputs))
            self._static = [tensor.clone(memory_format=torch.preserve_format) for tensor in inputs]
            self._replay, self._loss = self._capture(lambda: passes(*self._static))
            self._gradients = [(parameter, parameter.grad) for parameter in parameters()]
        else:
            for target, tensor in zip(self._static, inputs, strict=True):
                target.copy_(tensor)
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        self._replay()
        assert self._loss is not None
        return self._loss.clone()

    def _beside(self, function: Callable[[], Tensor]) -> Tensor:
        """Run a function on a stream of its own, as capturing will: backward must not know the default stream."""
        if not torch.cuda.is_available():
            return function()
        if self._stream is None:  # one for all: memory that the last step freed on it serves the next
            self._stream = torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            result = function()
        torch.cuda.current_stream().wait_stream(self._stream)
        return result
