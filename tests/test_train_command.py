"""`latephase train` as a process: finished, interrupted, killed, refused; on the bundled digits."""

import copy
import errno
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import pytest
import torch

from latephase_kernels.cli import main
from latephase_kernels.data import DeviceImages, WorkerError
from latephase_kernels.train import run_training
from latephase_kernels.train.build import build_data, build_network, check_network
from latephase_kernels.train.checkpoints import CheckpointFolder, RunError
from latephase_kernels.train.progress import Progress
from latephase_kernels.train.ranks import RankError
from latephase_kernels.train.recipe import Data, Model, Recipe
from latephase_kernels.train.run_training import load_model
from latephase_kernels.train.runs import read_metrics
from latephase_kernels.train.train_command import parse_recipe, run_train
from latephase_kernels.train.trainer import Trainer

pytest.importorskip("jsonargparse"), pytest.importorskip("torchmetrics"), pytest.importorskip("safetensors")
SHORT = [
    "--epochs=4",
    "--late.start=2",
    "--late.members=3",
    "--swa.start=3",
    "--schedule.anneal_start=2",
    "--schedule.anneal_end=4",
    "--evaluate_every=2",
    "--model.options.widths=[4,4]",
    "--device=cpu",
]
ANNEALED = ["--schedule.anneal_start=1", "--schedule.anneal_end=2"]


def command(folder, *more):
    return ["train", "digits", *SHORT, "--output", str(folder), *more]


def run(start, arguments):
    """In a process of its own, which begins as `start`, the first arguments of Python, says."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *start, *arguments], capture_output=True, text=True, env=environment)


def run_here(folder, *more):
    """In this process, which saves some seconds; return the exit code."""
    torch.set_num_threads(1)  # with other numbers of threads sums round otherwise
    return main(command(folder, *more))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run from start to end."""
    folder = tmp_path_factory.mktemp("train") / "run"
    result = run(["-m", "latephase_kernels"], command(folder))
    assert result.returncode == 0, result.stderr
    return folder, result


def tensors(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def assert_same_run(folder, expected):
    a, b = tensors(folder), tensors(expected)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in b)
    assert json.loads((folder / "results.json").read_text()) == json.loads((expected / "results.json").read_text())
    timed = ("seconds", "images/s")
    for one, other in zip(
        read_metrics(folder / "metrics.jsonl"), read_metrics(expected / "metrics.jsonl"), strict=True
    ):
        assert {k: v for k, v in one.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}


def test_a_finished_run(finished):
    folder, result = finished
    assert "averaged" in result.stdout and "ensemble" in result.stdout and f"written to {folder}" in result.stdout
    assert "epoch 4 of 4" in result.stderr
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.yaml", "environment.json", "metrics.csv", "curves.png", "model.safetensors", "checkpoints"}
    first, *_, last = read_metrics(folder / "metrics.jsonl")
    members = [last[f"member {k} loss"] for k in range(3)]
    assert sum(members) / 3 == pytest.approx(last["train loss"]) and len({*members}) == 3
    assert "member 0 loss" not in first
    network = build_network(Model("small_resnet", {"widths": [4, 4]}), 10, 1)
    load_model(network, folder / "model.safetensors")
    _, test = build_data(Data("digits"))
    assert (folder / "classes.txt").read_text().splitlines() == list(test.classes)
    images = (test.images.float() / 255 - test.mean[0]) / test.std[0]
    with torch.no_grad():
        accuracy = 100 * (network.eval()(images).argmax(1) == test.labels).double().mean().item()
    written = json.loads((folder / "results.json").read_text())["metrics"]
    assert written["averaged"]["accuracy"] == pytest.approx(accuracy, abs=0.1)  # at most one image differs
    assert len(written) == 6 and (folder / "metrics.jsonl").read_text().count("\n") == 4


def test_a_part_of_the_training_images():
    whole, part = build_data(Data("digits"))[0], build_data(Data("digits", num_train=70))[0]
    assert torch.equal(part.images, whole.images[:70]) and torch.equal(part.labels, whole.labels[:70])
    for name, expected in (("digits", "from 1 to 300"), ("python_text", "null")):
        with pytest.raises(ValueError, match=f"data.num_train must be {expected}"):
            build_data(Data(name, num_train=301))


def test_metrics_count_the_members_that_were_trained(finished):
    records = read_metrics(finished[0] / "metrics.jsonl")
    assert [record["members"] for record in records] == [1, 1, 3, 3]


def test_a_seed_reproduces_a_run(finished, tmp_path):
    assert run_here(tmp_path / "again") == 0
    assert_same_run(tmp_path / "again", finished[0])


def test_deterministic(finished, tmp_path, monkeypatch):
    """On a CPU the same bits; PyTorch's settings are those of the run inside it, and as before after it."""
    seen = []
    step = Trainer.step

    def looking(trainer):
        seen.append((torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark))
        return step(trainer)

    monkeypatch.setattr(Trainer, "step", looking)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    before = torch.backends.cudnn.benchmark
    assert run_here(tmp_path / "run", "--deterministic=true") == 0
    assert set(seen) == {(True, False)} and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert not torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.benchmark == before
    assert torch.utils.deterministic.fill_uninitialized_memory
    a, b = tensors(tmp_path / "run"), tensors(finished[0])
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_resuming_a_finished_run_says_that_it_is_trained(finished, tmp_path, capsys):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    assert run_here(folder, "--resume") == 0
    assert re.search(r"\[100 %\] digits\S*: all 4 epochs are trained", error := capsys.readouterr().err), error
    assert_same_run(folder, finished[0])


def test_a_signal_ends_an_evaluation(finished, tmp_path, monkeypatch):
    """Of which nothing is recorded; the resumed run does it again."""
    folder, batches, seen = tmp_path / "run", DeviceImages.batches, []

    def interrupted(images, *given):
        for batch in batches(images, *given):
            yield batch
            seen.append(len(batch[0]))
            if len(seen) == 2:
                signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(DeviceImages, "batches", interrupted)
    assert run_here(folder) == 128 + signal.SIGTERM
    assert seen == [250, 250] and [record["epoch"] for record in read_metrics(folder / "metrics.jsonl")] == [1.0]
    assert run_here(folder, "--resume") == 0
    assert_same_run(folder, finished[0])


def test_help_names_the_data(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "train by a recipe: CIFAR, Fashion-MNIST, ImageNet, enwik8" in " ".join(capsys.readouterr().out.split())


INTERRUPTED = """
import os, signal, sys, threading
from latephase_kernels.cli import main
from latephase_kernels.train.trainer import Trainer

number, step, steps = int(sys.argv.pop(1)), Trainer.step, 0
if number == signal.SIGHUP:  # which tests under nohup ignore
    signal.signal(number, signal.SIG_DFL)
def interrupted(trainer):
    global steps
    steps += 1
    if steps == 20:
        threading.Timer(0.02, os.kill, (os.getpid(), number)).start()
    return step(trainer)
Trainer.step = interrupted
sys.exit(main(sys.argv[1:]))
"""


def test_nohup_keeps_its_promise():
    """A SIGHUP that is ignored before stays ignored; one that is not is remembered."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with run_training._Signals() as signals:
            signal.raise_signal(signal.SIGHUP)
            assert signals.received is None
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with run_training._Signals() as signals:
            signal.raise_signal(signal.SIGHUP)
            assert signals.received == signal.SIGHUP
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_an_interrupted_run_goes_on(finished, tmp_path, number, capsys):
    """Wherever the signal finds it, the resumed run ends in the same bits."""
    folder = tmp_path / "run"
    killed = number == signal.SIGKILL
    options = ["--checkpoint_minutes=0"] if killed else []
    ended = run(["-c", INTERRUPTED, str(int(number))], command(folder, *options))
    if killed:
        assert ended.returncode == -signal.SIGKILL
    else:
        assert ended.returncode == 128 + number and f"--resume --output {folder}" in ended.stderr
    assert not (folder / "model.safetensors").exists()
    assert run_here(folder, *options) == 2
    assert "already holds a run; give --resume" in capsys.readouterr().err
    if not killed:
        assert run_here(folder, "--resume") == 0
    else:  # and the disk flipped a bit of the newest checkpoint
        *_, before, newest = sorted((folder / "checkpoints").glob("step-*.pt"))  # one more if killed before its removal
        content = bytearray(newest.read_bytes())
        content[len(content) // 2] ^= 1
        newest.write_bytes(content)
        logged = [{**record, "seconds": 1000.0} for record in read_metrics(folder / "metrics.jsonl")]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in logged))
        resumed = run(["-m", "latephase_kernels"], command(folder, "--resume", *options))
        assert resumed.returncode == 0, resumed.stderr
        assert f"checkpoint {newest.name}" in resumed.stderr and f"going on from {before.name}" in resumed.stderr
        assert all(record["seconds"] >= 1000 for record in read_metrics(folder / "metrics.jsonl"))  # the time goes on
    assert_same_run(folder, finished[0])


def test_a_full_disk_leaves_the_last_checkpoint(finished, tmp_path):
    """No file may grow beyond 100 kB: the second checkpoint fits no more."""
    folder = shutil.copytree(finished[0], tmp_path / "run")
    (folder / "model.safetensors").unlink()
    last = max((folder / "checkpoints").glob("step-*.pt"))
    start = f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({last.stat().st_size // 2},) * 2); "
    start += "from latephase_kernels.cli import main; sys.exit(main(sys.argv[1:]))"
    result = run(["-c", start], command(folder, "--resume"))
    assert result.returncode == 2 and f"[Errno {errno.EFBIG}] checkpoint of step" in result.stderr
    assert f"'{folder / 'checkpoints' / 'step-'}" in result.stderr
    assert last.exists() and not list(folder.glob("**/*unfinished*"))
    assert run_here(folder, "--resume") == 0  # where there is room again
    assert_same_run(folder, finished[0])


def test_a_diverging_run_says_so(tmp_path, capsys):
    folder = tmp_path / "run"
    assert run_here(folder, "--optimizer.lr=1e30") == 2
    message = " ".join(capsys.readouterr().err.split())
    assert re.search(
        r"loss of minibatch \d+ \(epoch 0.\d+\) is not finite; lower optimizer.lr, or give --skip_non", message
    )
    assert not (folder / "model.safetensors").exists() and not list((folder / "checkpoints").iterdir())


def test_a_network_that_was_checked_is_the_same():
    torch.manual_seed(0)
    network = build_network(Model("small_resnet", {"widths": [4, 4], "dropout": 0.5}), 10, 1)
    before, random_numbers = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    check_network(network, "small_resnet", (1, 8, 8), 10)
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random_numbers) and network.training


def test_a_network_that_does_not_fit_is_refused_before_training(tmp_path, capsys):
    pytest.importorskip("torchvision")
    output = tmp_path / "run"
    assert main(["train", "digits_base", "--model.name=torchvision:alexnet", "--output", str(output)]) == 2
    message = "model.name torchvision:alexnet does not run on this data's images of 1 × 8 × 8: .*3 channels.*; choose"
    assert re.search(message, capsys.readouterr().err)
    assert not output.exists()


@pytest.mark.parametrize("answer, found", [(lambda x: x, r"\[2, 1, 8, 8\]"), (lambda x: (x, x), "tuple")])
def test_a_network_must_answer_with_logits(answer, found):
    network = torch.nn.BatchNorm2d(1)
    network.forward = answer
    with pytest.raises(ValueError, match=rf"mine must answer 2 images of 1 × 8 × 8 with .* \[2, 10\], got {found}; "):
        check_network(network, "mine", (1, 8, 8), 10)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nothing"], "there is no recipe 'nothing'; there are cifar10, "),
        (["cifar10_bas"], r"there is no recipe 'cifar10_bas' \(is cifar10_base meant\?\); there are cifar10, "),
        (["mine.yaml"], "there is no file mine.yaml"),
        (["digits", "--late.start=500"], "late.start must be null or an epoch from 0 to below epochs"),
        (
            ["digits", "--model.name=resnet"],
            "model.name must be wide_resnet, hyper_wide_resnet, small_resnet, torchvision:NAME",
        ),
        (["digits", "--model.options.depth=3"], "model small_resnet with options .*depth"),
        (["digits", "--model.name=torchvision:resnet7"], "resnet7"),
        (["digits", "--data.name=mnist"], "data.name must be one of cifar10, cifar100, fashion_mnist, digits"),
        (["cifar10", "--data.folder=nowhere"], "nowhere"),
        (["digits", "--output=file"], r"\[Errno 17\] File exists: 'file'"),
        (["digits", "--output=file/run"], r"\[Errno 20\] Not a directory: 'file/run'"),
        (["digits", "--late.start=x"], "late.start"),
        (["digits", "--seed=99999999999999999999"], "seed must be from -2⁶³ to below 2⁶⁴, got 9+"),
        (
            ["digits", "--epochs=4", "--late.start=1", "--late.members=17", "--swa.start=3", *ANNEALED],
            "swa.start must be at most 2.7, the epoch in which the last whole step ends, got 3.0: nothing would be",
        ),
        (["digits", "--nothing=1"], "train: unrecognized arguments: --nothing=1 .see latephase train --help"),
        (["digits", "--epo=2"], "unrecognized arguments: --epo=2"),
        (["digits", "--device=foo"], "--device must be a device that works here, got foo: "),
        (["digits", "--device=meta"], "--device must be a device that works here, got meta: "),
        (["digits", "--swa=null"], "train: swa must hold options, such as swa.start, got null"),
        (
            ["digits", "--epochs=2", "--late.start=1", "--late.members=400"],
            "late.members must be at most 10, the steps' minibatches from late.start .1.0. on, got 400",
        ),
    ],
)
def test_what_the_user_can_mend_is_a_message(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    try:
        code = main(["train", *arguments])
    except SystemExit as exit:  # an option that the parser refuses
        code = exit.code
    assert code == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("error", [WorkerError, RankError, RunError])
def test_what_ends_a_run_is_a_message(error, monkeypatch, capsys):
    def fail(arguments):
        raise error("data worker 7 was killed")

    monkeypatch.setattr("latephase_kernels.train.train_command.run_train", fail)
    assert main(["train", "digits"]) == 2
    assert capsys.readouterr().err == "latephase: error: data worker 7 was killed\n"


@pytest.mark.parametrize("name", ["torchmetrics", "safetensors"])
def test_what_is_needed_at_the_end_is_missed_at_the_start(name, tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda found, *more: None if found == name else find(found, *more))
    assert run_here(tmp_path / "run") == 2
    assert f"needs {name}; pip install 'latephase_kernels[train]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_signal_acts_at_once_when_all_is_trained(tmp_path, monkeypatch):
    before, found = signal.getsignal(signal.SIGINT), []
    monkeypatch.setattr(run_training, "_finish", lambda *_: found.append(signal.getsignal(signal.SIGINT)) or {})
    assert run_here(tmp_path / "run") == 0
    assert found == [before]


def test_a_signal_at_the_last_checkpoint_is_not_lost(tmp_path, monkeypatch, capsys):
    save = CheckpointFolder.save

    def interrupted(folder, state, step):
        signal.raise_signal(signal.SIGINT)
        return save(folder, state, step)

    monkeypatch.setattr(CheckpointFolder, "save", interrupted)
    assert run_here(tmp_path / "run") == 130
    assert "SIGINT after a checkpoint was written" in capsys.readouterr().err


def test_throughput_is_of_work_that_is_done():
    """Reading the loss waits for the device, and belongs to the time."""
    records = []
    trainer = types.SimpleNamespace(
        task=types.SimpleNamespace(unit="images", units_per_minibatch=10, counts=dict),
        read_loss=lambda: (time.sleep(0.1), [], 0),
        optimizer=types.SimpleNamespace(param_groups=[{"lr": 0.1}]),
        minibatch=1,
        epoch=1.0,
        expanded=False,
    )
    one = object.__new__(run_training._Run)
    one.recipe, one.trainer, one.progress, one.seconds_before = Recipe(), trainer, Progress(10, io.StringIO()), 0.0
    one.folder = types.SimpleNamespace(log=records.append)
    one._end_epochs(0, 1, (1, time.perf_counter()))
    assert 0 < records[0]["images/s"] <= 100


def test_a_run_that_trained_nothing_leaves_its_folder_free(finished, tmp_path):
    folder = tmp_path / "run"
    assert run_here(folder, "--optimizer.lr=1e30") == 2
    assert run_here(folder, "--epochs=5") == 0
    with pytest.raises(ValueError, match=r"of another recipe \(epochs is 5 there and 4 here\); resume with"):
        run_train(command(folder, "--resume")[1:])


@pytest.mark.parametrize("num_members, every", [(7, 10), (17, 1)])
def test_the_last_epoch_is_evaluated_where_cycles_leave_minibatches_over(num_members, every, tmp_path):
    changes = (f"--late.members={num_members}", "--late.start=1", "--swa.start=null", f"--evaluate_every={every}")
    assert run_here(tmp_path / "run", *changes) == 0
    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert metrics[-1]["step"] == 10 + 30 // num_members * num_members  # 10 minibatches an epoch
    assert "test accuracy" in metrics[-1]


def test_a_model_that_answers_nan_is_not_saved(tmp_path, capsys):
    folder = tmp_path / "run"
    assert run_here(folder, "--optimizer.lr=1e30", "--skip_nonfinite=true") == 2
    assert "the trained model's outputs are not finite, so it was not saved" in capsys.readouterr().err
    assert not (folder / "model.safetensors").exists()


def test_the_scale_of_base_gradients_may_be_a_number():
    assert parse_recipe(["digits", "--late.base_grad_scale=0.5"])[0].late.base_grad_scale == 0.5
    assert parse_recipe(["digits", "--late.base_grad_scale=mean"])[0].late.base_grad_scale == "mean"


def test_a_recipe_is_utf_8_in_any_locale(tmp_path):
    (tmp_path / "mine.yaml").write_text('# ±\nname: "größe × 2"\noptimizer: {lr: 1e-3}\n', encoding="utf-8")
    code = "import sys; from latephase_kernels.train.train_command import parse_recipe\n"
    code += "found = parse_recipe(sys.argv[1:])[0]; print(ascii(found.name), found.optimizer.lr)"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "mine.yaml")], capture_output=True, text=True, env=environment
    )
    assert result.stdout == ascii("größe × 2") + " 0.001\n", result.stderr
    (tmp_path / "mine.yaml").write_bytes(b"name: gr\xf6\n")
    with pytest.raises(ValueError, match="mine.yaml must be text in UTF-8"):
        parse_recipe([str(tmp_path / "mine.yaml")])


@pytest.mark.parametrize("content", ["late: null", "late: 5"])
def test_a_part_of_a_recipe_holds_options(content, tmp_path):
    (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises(ValueError, match="train: late must hold options, such as late.start, got (None|5)"):
        parse_recipe([str(tmp_path / "mine.yaml")])


def test_recipes_are_layered(tmp_path):
    (tmp_path / "mine.yaml").write_text("late: {members: 4}\nmodel: {options: {width: 2}}\nseed: 7\n")
    recipe, own = parse_recipe(["cifar10", "--config", str(tmp_path / "mine.yaml"), "--late.start=null", "--resume"])
    assert (recipe.late.members, recipe.late.start, recipe.seed, recipe.epochs) == (4, None, 7, 200)
    assert recipe.model.options["width"] == 2 and recipe.optimizer.weight_decay == 5e-4 and own["resume"]
    recipe, _ = parse_recipe(["cifar100"])
    assert recipe.late.weight_decay == 5e-3 and recipe.late.targets == ["batch_norm", "head"]
