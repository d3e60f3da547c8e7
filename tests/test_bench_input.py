"""`benchmarks/bench_input.py`: its images, its verdict, one short run."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("PIL")

ROOT = Path(__file__).parents[1]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return pytest.importorskip("benchmarks.bench_input")


def test_images(bench, tmp_path):
    from PIL import Image

    content = bench.make_jpeg(1)
    assert content == bench.make_jpeg(1) != bench.make_jpeg(2)
    image = Image.open(io.BytesIO(content))
    assert (image.size, image.format) == ((500, 375), "JPEG") and 40_000 < len(content) < 120_000
    assert bench.make_images(tmp_path, 20, 2) == pytest.approx((len(bench.make_jpeg(0)) + len(content)) / 2, abs=1)
    assert len(list(tmp_path.glob("class*/*.JPEG"))) == 20


@pytest.mark.parametrize(
    "rates, limit",
    [((50, 100, 49), "input"), ((300, 100, 99), "step"), ((120, 100, 55), "both share the cores")],
)
def test_what_limits(bench, rates, limit):
    loaded, step, training = rates
    assert bench.limit({"input": loaded, "step": step, "training": training, "share": training / step}) == limit


def test_a_short_run(tmp_path):
    options = ["--seconds=0.1", "--distinct=4", "--batch=4", "--size=32", "--workers", "0", "1", "--device=cpu"]
    options += ["--model=small_resnet", "--precision=float32", "--members=2", "--decoders", "cpu"]
    command = [sys.executable, "benchmarks/bench_input.py", *options, "--output", str(tmp_path / "input.json")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    content = json.loads((tmp_path / "input.json").read_text())
    assert [found["workers"] for found in content["results"]] == [0, 1] and content["cores"] >= 1
    assert 0.1 < content["worker_ms"] < 100
    for found in content["results"]:
        assert found["training"] > 0 and found["share"] == found["training"] / found["step"]
        assert f"| {found['limit']} |" in run.stdout
