"""Interleaved timing: what is compared is timed in turn, in one run, on the CPU or a GPU."""

import math
import os
import random
import statistics
import time
from collections.abc import Callable

import torch

_FLUSH_BYTES = 256 << 20  # written between two timings on a GPU: more than its L2 cache
_HEAD_START = 1_000_000  # cycles that a GPU waits, half a millisecond, so that launches of what is short are not timed


def huge_pages(whose: str) -> str:
    """The type of HUGE_PAGES: turns pages of 2 MiB on and off for this process, which has made no large tensor yet."""
    if whose != "as installed":
        os.environ["LATEPHASE_HUGE_PAGES"] = str(int(whose != "none"))
        os.environ["THP_MEM_ALLOC_ENABLE"] = str(int(whose == "all"))  # PyTorch's allocator
    return whose


HUGE_PAGES = {
    "type": huge_pages, "default": "as installed", "choices": ["as installed", "ours", "all", "none"],
    "help": "whose results on a CPU come in pages of 2 MiB: our ops', PyTorch's too, or nobody's",
}  # fmt: skip


class Timer:
    """Seconds of one call on a device; clock: of the CPU."""

    def __init__(self, device: torch.device, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.on_gpu = device.type == "cuda"
        self.flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device) if self.on_gpu else None

    def __call__(self, function: Callable[[], object]) -> float:
        if self.flush is None:
            start = self.clock()
            function()
            return self.clock() - start
        self.flush.zero_()
        torch.cuda._sleep(_HEAD_START)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def attempt(check: Callable[[], float], allowed: float, name_of_result: str) -> dict | None:
    """Return None where check() is at most `allowed`, else what it was, or how it failed: for a contender's row."""
    try:
        found = check()
    except Exception as error:  # of any library that is compared: the others are timed all the same
        return {"failed": f"{type(error).__name__}: {error}"[:500]}
    return None if found <= allowed else {name_of_result: found}


def interleaved(
    functions: dict[str, Callable[[], object]],
    device: torch.device,
    *,
    seconds: float,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time each function in turn until `seconds` are over, five rounds at least; return all seconds, by name.

    Each round has an order of its own: none always meets the caches that the same other one leaves.
    """
    timer = Timer(device, clock)
    for function in functions.values():
        for _ in range(warmup):
            function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds
    shuffled = random.Random(0)
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name in shuffled.sample(list(functions), len(functions)):
            times[name].append(timer(functions[name]))
    return times


def quartiles(values: list[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return statistics.quantiles(values, n=4)


def ratios(times: list[float], baseline: list[float]) -> list[float]:
    """Quartiles of the ratio within each round: a slow spell of the machine slows both."""
    return quartiles([a / b for a, b in zip(times, baseline, strict=True)])


def geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written in a second by a copy between two tensors of 256 MiB that stand already."""
    source, target = (torch.zeros(256 << 20, dtype=torch.uint8, device=device) for _ in range(2))
    times = interleaved({"copy": lambda: target.copy_(source)}, device, seconds=0.5)["copy"]
    return 2 * source.nbytes / statistics.median(times)
