"""Interleaved timing: what is compared is timed in turn, in one run, and reported as ratios of medians."""

import statistics
import time
from collections.abc import Callable


def interleaved(
    functions: dict[str, Callable[[], object]], *, seconds: float = 5.0, warmup: int = 2
) -> dict[str, list[float]]:
    """Time each function in turn until `seconds` are over; return every time in seconds, by name."""
    for function in functions.values():
        for _ in range(warmup):
            function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return times


def summarize(times: dict[str, list[float]], baseline: str) -> dict[str, dict[str, float]]:
    """Median milliseconds, quartiles and the ratio to the baseline's median, by name."""
    base = statistics.median(times[baseline])
    rows = {}
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4)
        rows[name] = {
            "median_ms": 1e3 * median, "low_ms": 1e3 * low, "high_ms": 1e3 * high,
            "ratio": median / base, "samples": len(values),
        }  # fmt: skip
    return rows
