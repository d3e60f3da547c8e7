"""Bytes handed to collectives, counted: what docs/distributed.md says of them, on a small network."""

import importlib.util
from pathlib import Path

from ranks import run_on_ranks

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "bench_distributed.py"
MEMBERS = 4


def measure():
    spec = importlib.util.spec_from_file_location("bench_distributed", BENCHMARK)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    return benchmark.measure("small", MEMBERS, pixels=8)


def test_one_reduction_for_all_members_minibatches():
    answers = run_on_ranks(2, measure)
    assert not isinstance(answers[0], str), answers[0]
    assert answers[0] == answers[1]
    base, member, signature = 4 * (8 * 27 + 8 + 8 * 10 + 10), 4 * 16, 4 * 2  # convolution and head; batch norm; check
    statistics = 4 * MEMBERS * 16  # two [K, 8]
    found = answers[0]
    assert found["DDP, K steps"]["all_reduce"] == MEMBERS * (base + member)
    assert found["data-parallel"] == {"all_reduce": base + MEMBERS * member + signature}
    assert found["data-parallel, synchronized"] == {
        "all_reduce": base + MEMBERS * member + signature + statistics,
        "all_gather": 2 * (statistics + 4),
    }
    assert found["member-parallel"] == {"all_reduce": base + signature}
