"""`python -m benchmarks.gpu` on a machine without one: what it would run exists, and what fails stops nothing else."""

import argparse
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _root(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture
def gpu():
    return pytest.importorskip("benchmarks.gpu")


@pytest.fixture
def steps():
    return pytest.importorskip("benchmarks.steps")


def test_what_it_runs_exists(gpu, tmp_path):
    names = []
    for part in gpu.ALL_PARTS:
        for step in (step for together in gpu.steps(part, tmp_path) for step in together):
            names.append(step.name)
            files = [ROOT / argument for argument in step.command if argument.endswith(".py")]
            assert files and all(file.is_file() for file in files), step
            if "benchmarks/" in step.command[1]:
                known = "".join(map(Path.read_text, (files[0], ROOT / "benchmarks/comparison.py")))
                assert all(f'"{a}"' in known for a in step.command[2:] if a.startswith("--")), step
    assert len(set(names)) == len(names)


COLLECT = """
import contextlib, io, json, sys, pytest
found = []
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as output:
        pytest.main(["-q", "--collect-only", "-p", "no:cacheprovider", *arguments])
    found.append([line for line in output.getvalue().splitlines() if "::" in line])
print(json.dumps(found))
"""


@pytest.mark.parametrize(
    "prebuilt, checks, printed",
    [
        (True, ["pass"], ""),
        (True, ["assert False", "pass"], "built it\n"),
        (False, ["pass"], "built it\n"),
        (False, ["assert False"], "built it\n"),
    ],
)
def test_a_build_passes_where_the_libraries_load(gpu, tmp_path, prebuilt, checks, printed):
    """Those that load already are not built again, if so asked; one that nvcc was missing for does not load."""
    [[step]] = gpu.steps("build", tmp_path, prebuilt=prebuilt)
    shell, option, script, python, check, *build = step.command
    assert "{'cpu', 'cuda'}" in check and build[1] == "setup.py"
    (tmp_path / "checks").write_text("\n".join(checks))
    next_check = "lines = open('checks').read().split('\\n'); open('checks', 'w').write(lines[-1]); exec(lines[0])"
    command = [shell, option, script, python, next_check, "echo", "built", "it"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout == printed and (run.returncode == 0) == (checks[-1] == "pass")


def test_the_tests_of_every_kernel_run_once(gpu):
    """Each step has tests, and together they are all of the files that need a GPU."""
    chosen = [[*files, "-k", expression] for files, expression in gpu.TESTS.values()]
    files = [str(file) for file in (ROOT / "tests").glob("test_cuda_*.py") if file.stem != "test_cuda_resources"]
    command = [sys.executable, "-c", COLLECT, json.dumps([*chosen, files, [*gpu.SANITIZED_FILES, "-k", gpu.SANITIZED]])]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    *by_step, all_of_them, sanitized = json.loads(run.stdout)
    assert all(by_step)
    found = [test for tests in by_step for test in tests]
    assert len(found) == len(set(found)) and set(all_of_them) <= set(found)
    for name in ("one_case_of_every_tier", "member_gain", "rank1_linear", "rank1_lstm"):
        assert any(name in test for test in sanitized), name


@pytest.mark.parametrize(
    "command, ended",
    [
        ([sys.executable, "-c", "raise SystemExit(3)"], "failed with exit code 3"),
        (["no-such-program"], "left out: no-such-program is not installed"),
        (["true"], "left out: no_such_module is not installed"),
        (["bash", "-c", "echo begun; sleep 60 & sleep 60; echo end"], "ran out of time"),
        ([sys.executable, "-c", "print(1)"], "passed"),
    ],
)
def test_a_command_that_fails_or_hangs_is_named(steps, tmp_path, command, ended):
    start = time.monotonic()
    needs = ("no_such_module",) if "no_such_module" in ended else ()
    found = steps.run(steps.Step("a step", command, 1.5, needs=needs), tmp_path, start + 60)
    assert found["ended"] == ended and time.monotonic() - start < 6
    assert ended != "ran out of time" or found["tail"] == "begun\n"


# A torch whose GPU test 3 breaks.
BROKEN = """
import os, sys, time, types, pytest
def synchronize():
    if cuda.lost: raise RuntimeError("unspecified launch failure")
cuda = types.SimpleNamespace(lost=False, is_initialized=lambda: True, synchronize=synchronize)
sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)
@pytest.mark.parametrize("i", range(6))
def test_it(i):
    if i == 1:
        time.sleep(60)
    if i == 2:
        os._exit(77)
    cuda.lost = i == 3
    assert i not in (3, 4)
"""


def test_tests_go_on_behind_one_that_hangs_crashes_or_breaks_the_gpu(gpu, steps, tmp_path):
    (tmp_path / "test_broken.py").write_text(BROKEN)
    step = steps.Step("tests", [*gpu.PYTEST, str(tmp_path / "test_broken.py")], 60.0, hangs=2.0)
    found = steps.run(step, tmp_path, time.monotonic() + 60)
    assert found["tests"] == {"passed": 2, "failed": 2, "skipped": 0, "begun": 2}
    assert [test["test"][-2] for test in found["bad"]] == ["1", "2", "3", "4"]
    assert "assert 3 not in" in found["bad"][2]["message"]
    assert found["ended"] == "4 of 6 tests failed"
    step.limit, step.hangs = 5.0, 60.0
    found = steps.run(step, tmp_path, time.monotonic() + 60)
    assert found["ended"].startswith("ran out of time in ") and found["tests"]["passed"] == 1
    step.command, step.limit = [*gpu.PYTEST, str(tmp_path / "no_such_file.py")], 60.0
    assert steps.run(step, tmp_path, time.monotonic() + 60)["ended"] == "failed with exit code 4 before any test"


def test_a_rehearsal_writes_everything(tmp_path):
    """A step that is cut, and one that there is nothing for; a JSON that says where it ran, and all in one file."""
    output, archive = tmp_path / "results", tmp_path / "all.tar.gz"
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--parts", "gain", "linear", "--limit", "6"]
    run = subprocess.run(
        [*command, "--output", str(output), "--archive", str(archive), "--commit", "abc"],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PATH": os.defpath},
    )  # fmt: skip
    assert run.returncode == 1 and "gain bfloat16" in run.stdout, run.stdout + run.stderr
    report = json.loads((output / "gpu.json").read_text())
    assert report["commit"] == "abc" and report["torch"] == torch.__version__
    assert {"device", "driver", "triton", "python", "memory GiB", "multiprocessors"} <= report.keys()
    assert report["nvcc"] or not Path("/usr/local/cuda/bin/nvcc").exists(), "PATH has no place for it"
    ended = [step["ended"] for part in report["parts"].values() for step in part.values()]
    assert len(ended) == 4 and set(ended) <= {"ran out of time", "not begun: no time left"}
    assert "results/gpu.json" in tarfile.open(archive).getnames()


def test_a_contender_that_raises_or_is_wrong_is_named_and_the_others_are_timed(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    comparison, bench = pytest.importorskip("comparison"), pytest.importorskip("bench_ensemble_batch_norm")

    def raises(*_):
        raise RuntimeError("no kernel image is available")

    arguments = argparse.Namespace(seconds=0.0, one_thread=False)
    functions = {"raises": raises, "wrong": lambda x: x * 1.1, "square": torch.square, "ours": lambda x: x * x}
    leaf, dy = torch.randn(8, requires_grad=True), torch.randn(8)
    rows = comparison.compare(functions, [leaf], dy, torch.square, arguments)
    assert "no kernel image" in rows["raises"]["failed"] and rows["wrong"]["error"] > 0.05
    assert rows["ours"]["fastest_peer"] == "square" and len(list(comparison.describe(rows))) == 4
    case = bench.Case(2, 3, 4, device=torch.device("cpu"), dtype=torch.float32, channels_last=False)
    plain = {bench.PLAIN: bench.plain, bench.FLOOR: bench.floor}
    for ours, key in ((raises, "failed"), (bench.plain, "wrong_share")):
        table = {"layout": "contiguous", "rows": bench.bench(case, {**plain, bench.OURS: ours}, 0.0)}
        assert key in table["rows"][bench.OURS] and "ms" in table["rows"][bench.PLAIN]
        assert all(bench.describe(*row) for row in table["rows"].items())
        assert bench.summarize([table]) == {} and bench.markdown([table]).count("\n") == 1


def test_tiers_are_compared_setting_by_setting(monkeypatch):
    """Each call sees the variables of its setting and leaves none behind; wrong values are named, and not timed."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    tiers = pytest.importorskip("bench_tiers")
    seen, right = set(), tiers.ours

    def ours(x, *parameters):
        setting = {name: value for name, value in os.environ.items() if name.startswith("LATEPHASE_CUDA_")}
        seen.add(json.dumps(setting))
        return right(x, *parameters) * (1.5 if setting.get("LATEPHASE_CUDA_CLUSTER") == "2" else 1.0)

    monkeypatch.setattr(tiers, "ours", ours)
    case = tiers.Case(2, 3, 4, device=torch.device("cpu"), dtype=torch.float32, channels_last=False)
    table = {"network": "any", "shape": [20, 3, 4, 4], "layout": "contiguous", "rows": tiers.bench(case, 0.0, 1e9)}
    assert seen == {json.dumps(variables) for variables in tiers.SETTINGS.values()}
    assert not any(name.startswith("LATEPHASE_CUDA_") for name in os.environ)
    for rows in table["rows"].values():
        assert set(rows) == set(tiers.SETTINGS)
        assert [name for name, row in rows.items() if "ms" not in row] == ["clusters of 2 at most"]
    lines = tiers.describe(table)
    assert len(lines) == 2 and all(line.count("|") == 8 and "wrong: clusters of 2 at most" in line for line in lines)
    assert set(tiers.summarize([table])) == {"contiguous, forward", "contiguous, backward"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so():
    run = subprocess.run([sys.executable, "-m", "benchmarks.gpu"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and "torch sees no CUDA device here" in run.stderr
