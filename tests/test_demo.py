"""`latephase demo` from the command line: what it prints, what it writes, how it refuses. Not which method wins."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch

from latephase_kernels import __version__
from latephase_kernels.cli import main
from latephase_kernels.data import load_digits, split_digits
from latephase_kernels.models import SmallResNet
from latephase_kernels.train import demo as demo_program
from latephase_kernels.train.demo_methods import accuracy_and_nll, linear_anneal
from latephase_kernels.train.demo_report import METHODS, mean_and_error


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "latephase_kernels", "demo", "--quick", "--members", "4", "--output", "out/run"]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    finished = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=120
    )
    assert finished.returncode == 0, finished.stderr
    return folder / "out" / "run", finished


def test_table_and_footer(quick_run):
    folder, finished = quick_run
    lines = finished.stdout.splitlines()
    for label in METHODS.values():
        assert sum(line.startswith(label + " ") for line in lines) == 1
    assert "test accuracy %" in finished.stdout and "images/s" in finished.stdout
    assert f"torch {torch.__version__}" in finished.stdout
    assert any(f"backend {name}" in finished.stdout for name in ("native", "reference"))
    assert "these figures mean nothing" in finished.stdout
    assert str(folder.relative_to(folder.parent.parent)) in lines[-1] or "matplotlib is not installed" in lines[-1]
    # Plain lines, no bar, where stderr is no terminal.
    assert "seed 0: late-phase, averaged" in finished.stderr and "\r" not in finished.stderr


def test_results_hold_what_the_saved_model_answers(quick_run):
    folder, _ = quick_run
    results = json.loads((folder / "results.json").read_text())
    seed, hp = results["collapsed"]["seed"], results["hyperparameters"]
    model = SmallResNet()
    model.load_state_dict(torch.load(folder / results["collapsed"]["file"], weights_only=True))
    split = split_digits(*load_digits(), num_train=hp["num_train"], seed=seed)
    with torch.no_grad():
        logits = model.eval()(split.test_images)
    nll = torch.nn.functional.cross_entropy(logits.double(), split.test_labels).item()
    accuracy = 100 * (logits.argmax(1) == split.test_labels).double().mean().item()
    collapsed = results["collapsed"]
    assert collapsed["nll"] == pytest.approx(nll, rel=1e-6)
    # Within two images of 1497: another thread count may round a tie the other way.
    assert collapsed["accuracy"] == pytest.approx(accuracy, abs=0.14)
    assert collapsed["accuracy_before_collapse"] == pytest.approx(accuracy, abs=0.14)
    late_phase = results["methods"]["late_phase"]["runs"][seed]
    assert late_phase["nll"] == pytest.approx(nll, rel=1e-3)
    assert late_phase["accuracy"] == pytest.approx(accuracy, abs=0.14)


def test_methods_see_equally_many_images(quick_run):
    folder, _ = quick_run
    results = json.loads((folder / "results.json").read_text())
    # 2 epochs of 15 minibatches make 7 stacked batches of 4.
    assert results["images_before_t0"] == 600 and results["images_after_t0"] == 7 * 4 * 20
    assert {method["runs"][0]["curve"]["images_seen"][-1] for method in results["methods"].values()} == {600 + 560}
    assert results["num_members"] == 4 and set(results["methods"]) == set(METHODS)
    curves = [
        method["runs"][0]["curve"] for name, method in results["methods"].items() if name != "late_phase_ensemble"
    ]
    assert len({curve["nll"][0] for curve in curves}) == 1  # the same base run
    assert all(math.isfinite(value) for curve in curves for value in curve["nll"])


def test_picture_where_matplotlib_is(quick_run):
    folder, finished = quick_run
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        assert "matplotlib is not installed" in finished.stdout and not (folder / "curves.png").exists()
    else:
        assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.glob("*.tmp")) and not list(folder.glob(".*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--seeds", "0"], "--seeds: must be a whole number, 1 or more, got '0'"),
        (["demo", "--seeds", "many"], "--seeds: must be a whole number"),
        (["demo", "--members", "-3"], "--members: must be a whole number"),
        (["demo", "--members", "481", "--output", "x"], "number of members must be from 1 to 480, got 481"),
        (["demo", "--output", "file/inside"], "file"),
        (["demo", "--unknown"], "unrecognized arguments: --unknown"),
        (["dance"], "invalid choice: 'dance'"),
        ([], "required"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("not a folder")
    try:
        code = main(arguments)
    except SystemExit as exit:
        code = exit.code
    captured = capsys.readouterr()
    assert code == 2 and captured.out == ""
    assert captured.err.count("\n") == 1 and "error: " in captured.err and message in captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_version(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0 and capsys.readouterr().out == f"latephase {__version__}\n"


def test_disagreement_of_the_saved_model_is_an_error(tmp_path):
    run = type("Run", (), {"seed": 0, "split": split_digits(*load_digits())})
    model = SmallResNet().eval()
    with torch.no_grad():
        before = model(run.split.test_images)
    retest = demo_program.save_and_retest(run, model, before, tmp_path / "model.pt")
    assert retest["accuracy"] == retest["accuracy_before_collapse"] and retest["nll"] == retest["nll_before_collapse"]
    for wrong in (before + 0.1, before * float("nan")):
        with pytest.raises(RuntimeError, match="does not answer as the expanded one did"):
            demo_program.save_and_retest(run, model, wrong, tmp_path / "model.pt")


def test_metrics():
    logits = torch.tensor([[[0.8, 0.2], [0.6, 0.4]], [[0.4, 0.6], [0.1, 0.9]]]).log()  # [K = 2, N = 2, 2 classes]
    labels = torch.tensor([0, 0])
    accuracy, nll = accuracy_and_nll(logits, labels)  # the members' mean: 0.6 and 0.35
    assert accuracy == 50 and nll == pytest.approx(-(math.log(0.6) + math.log(0.35)) / 2)
    assert accuracy_and_nll(logits[0], labels) == (100, pytest.approx(-(math.log(0.8) + math.log(0.6)) / 2))
    assert mean_and_error([1.0, 2.0, 3.0]) == (2.0, pytest.approx(1 / math.sqrt(3)))
    assert mean_and_error([1.0]) == (1.0, None)
    schedule = linear_anneal(0.1, 0.02, 0.5)
    assert [schedule(p) for p in (0, 0.25, 0.5, 1)] == pytest.approx([0.1, 0.06, 0.02, 0.02])
