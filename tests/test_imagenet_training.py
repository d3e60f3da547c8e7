"""`latephase train` on a small set in ImageNet's layouts: trained, interrupted, resumed, evaluated, collapsed."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys

import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("jsonargparse")
pytest.importorskip("torchmetrics")
pytest.importorskip("safetensors")
from image_sets import write_folder, write_shards
from test_train_command import assert_same_run

from latephase_kernels.cli import main
from latephase_kernels.data import ArchiveError, load_imagenet
from latephase_kernels.data.image_batches import EvaluationImages
from latephase_kernels.models import SmallResNet
from latephase_kernels.train import runs
from latephase_kernels.train.recipe import check, recipe_names
from latephase_kernels.train.run_training import load_model
from latephase_kernels.train.train_command import parse_recipe

SMALL = [
    "imagenet_scratch",
    "--model.name=small_resnet",
    # Of fewer channels, channels_last, a 1×1 convolution with stride of torch 2.14's corrupts memory backward on a CPU
    # without AVX-512.
    "--model.options.widths=[8,8]",
    "--images.size=16",
    "--images.resize=20",
    "--images.workers=2",
    "--batch_size=2",
    "--accumulate=2",
    "--epochs=3",
    "--optimizer.lr=0.05",
    "--schedule.drop_epochs=[2]",
    "--late.start=1",
    "--late.members=3",
    "--device=cpu",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("folder"))


def command(data, output, *more):
    options = [*SMALL, f"--data.folder={data}", "--output", str(output), *more]
    return [sys.executable, "-m", "latephase_kernels", "train", *options]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}  # bits depend on the number of threads


def run(*arguments):
    return subprocess.run(command(*arguments), capture_output=True, text=True, env=ENVIRONMENT)


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("train") / "run"
    result = run(folder, output)
    assert result.returncode == 0, result.stderr
    return output


def test_a_run_and_its_collapsed_model(finished, folder):
    results = json.loads((finished / "results.json").read_text())
    assert set(results["metrics"]) == {"averaged", "ensemble", "members", "member 0", "member 1", "member 2"}
    assert results["collapse_error"] < 1e-5
    network = SmallResNet(num_classes=3, in_channels=3, widths=[8, 8])
    load_model(network, finished / "model.safetensors")
    images, labels = next(EvaluationImages(load_imagenet(folder)[1], size=16, resize=20).batches(12))
    with torch.no_grad():
        accuracy = 100 * (network.eval()(images).argmax(1) == labels).double().mean().item()
    assert results["metrics"]["averaged"]["accuracy"] == pytest.approx(accuracy)


def test_a_run_killed_in_an_epoch_goes_on(finished, folder, tmp_path):
    """Wherever it was: the resumed run ends in the same bits, and no worker keeps the folder locked."""
    process = subprocess.Popen(
        command(folder, tmp_path / "run", "--checkpoint_minutes=0"), stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    for line in process.stderr:
        if "epoch 1 of 3, loss" in line:
            break
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    saved = [int(path.name[5:14]) for path in (tmp_path / "run" / "checkpoints").glob("step-*.pt")]
    assert max(saved) < 36 and not (tmp_path / "run" / "results.json").exists()
    torch.set_num_threads(1)
    assert main(command(folder, tmp_path / "run", "--resume", "--checkpoint_minutes=0")[3:]) == 0
    assert_same_run(tmp_path / "run", finished)


def test_shards_without_workers_from_given_weights(tmp_path, capsys):
    """From weights in a file, which evaluating does not need."""
    write_shards(tmp_path / "set")
    weights = tmp_path / "start.pth"
    torch.save(SmallResNet(num_classes=3, in_channels=3, widths=[8, 8]).state_dict(), weights)
    options = [f"--data.folder={tmp_path / 'set'}", f"--output={tmp_path / 'run'}", "--images.workers=0", "--epochs=2"]
    assert main(["train", *SMALL, *options, "--schedule.drop_epochs=[]", f"--model.weights={weights}"]) == 0
    assert "averaged" in capsys.readouterr().out
    weights.unlink()
    assert main(["eval", str(tmp_path / "run"), "--device", "cpu"]) == 0
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    trained = json.loads((tmp_path / "run" / "results.json").read_text())
    assert found["metrics"] == trained["metrics"]


def test_shards_without_what_windows_lacks(tmp_path, monkeypatch, capsys):
    """A run that asked for workers elsewhere needs neither fork nor pread, and gives the same."""
    write_shards(tmp_path / "set")
    options = [f"--data.folder={tmp_path / 'set'}", "--epochs=1", "--schedule.drop_epochs=[]", "--late.start=null"]
    assert main(["train", *SMALL, *options, f"--output={tmp_path / 'linux'}", "--images.workers=0"]) == 0
    for module, names in ((os, "fork pread sched_getaffinity O_CLOEXEC"), (signal, "SIGKILL SIGHUP pthread_sigmask")):
        for name in names.split():
            monkeypatch.delattr(module, name)
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    monkeypatch.setattr(runs, "fcntl", None)
    assert main(["train", *SMALL, *options, f"--output={tmp_path / 'run'}", "--images.workers=2"]) == 0
    assert_same_run(tmp_path / "run", tmp_path / "linux")


def test_corrupt_images_are_counted(tmp_path, capsys):
    write_folder(tmp_path / "set")
    (tmp_path / "set/train/n0001/n0001_3.JPEG").write_bytes(b"no image")
    options = [f"--data.folder={tmp_path / 'set'}", "--images.workers=1", "--late.start=null", "--epochs=1"]
    assert main(["train", *SMALL, *options, f"--output={tmp_path / 'one'}"]) == 2
    assert "n0001_3.JPEG is no image or damaged" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="n0001_3.JPEG is no image .*; another image takes its place"):
        assert main(["train", *SMALL, *options, f"--output={tmp_path / 'two'}", "--images.corrupt=replace"]) == 0
    assert '"corrupt images": 1' in (tmp_path / "two" / "metrics.jsonl").read_text()


def test_layouts(folder, tmp_path):
    train, val = load_imagenet(folder)
    assert len(train) == 24 and len(val) == 12 and train.classes == val.classes
    write_shards(tmp_path / "shards")
    (tmp_path / "shards" / "classes.txt").write_text("cat\ndog\nowl\n")
    train, val = load_imagenet(tmp_path / "shards")
    assert len(train) == 24 and len(val) == 12 and train.classes == val.classes == ("cat", "dog", "owl")
    (tmp_path / "shards" / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(ArchiveError, match="has class 2, there are 2"):
        load_imagenet(tmp_path / "shards")
    for name in ("val-00000.tar", "val-00001.tar"):
        (tmp_path / "shards" / name).unlink()
    (tmp_path / "shards" / "classes.txt").unlink()
    with pytest.raises(FileNotFoundError, match="has no shards of the split val; expected are"):
        load_imagenet(tmp_path / "shards")
    (tmp_path / "half" / "train" / "x").mkdir(parents=True)
    (tmp_path / "half" / "train" / "x" / "1.jpg").write_bytes(b"?")
    with pytest.raises(FileNotFoundError, match="half/val is no folder; expected are FOLDER/train/CLASS"):
        load_imagenet(tmp_path / "half")
    with pytest.raises(FileNotFoundError, match="nowhere is no folder; .*; or expected are .*tar"):
        load_imagenet(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--cuda_graph=true"], "cuda_graph must be false on cpu: only a GPU captures graphs"),
        (["--images.decoder=gpu"], "decoder must be cpu here: there is none on the GPU"),
        (["--images.decoder=dali"], "images.decoder must be auto, cpu or gpu, got dali"),
        (["--images.resize=8"], "images.resize must be at least images.size"),
        (["--images.workers=-1"], "images.workers must be null or at least 0, got -1"),
        (["--images.corrupt=skip"], "images.corrupt must be error or replace, got skip"),
        (["--accumulate=0"], "accumulate must be at least 1, got 0"),
        (["--schedule.drop_factor=0"], "schedule.drop_factor must be more than 0"),
        (["--batch_size=25"], "batch_size must be from 1 to 24"),
        (["--data.folder=nowhere"], "nowhere is no folder"),
        (["--model.weights=gone.pth"], "there is no file gone.pth"),
    ],
)
def test_what_the_user_can_mend_is_a_message(folder, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *SMALL, f"--data.folder={folder}", *arguments]) == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))
    assert not (tmp_path / "runs").exists()


def test_the_recipes():
    """What paper and code of the method have for fine-tuning; the plain ones beside them."""
    names = [name for name in recipe_names() if name.startswith("imagenet")]
    models = {"resnet50": "resnet50", "resnet152": "resnet152", "densenet161": "densenet161", "scratch": "resnet50"}
    assert len(names) == 7
    for name in names:
        recipe = check(parse_recipe([name])[0])
        assert recipe.name == name and recipe.data.name == "imagenet"
        assert recipe.model.name == "torchvision:" + models[name.split("_")[1]]
        assert (recipe.optimizer.momentum, recipe.optimizer.nesterov) == (0.9, False)
        if name == "imagenet_scratch":
            assert recipe.model.weights is None and recipe.late.start == 80
            continue
        assert recipe.model.weights == "IMAGENET1K_V1" and recipe.epochs == 20
        assert recipe.batch_size * recipe.accumulate == 256 and recipe.optimizer.lr == 1e-3
        assert recipe.schedule.drop_epochs == [10] and recipe.schedule.drop_factor == 0.1
        late = recipe.late
        if name.endswith("_base"):
            assert late.start is None and recipe.optimizer.weight_decay == 1e-4
        else:
            assert (late.start, late.members, late.targets, late.base_grad_scale) == (0, 10, ["batch_norm"], "mean")
            assert recipe.optimizer.weight_decay == pytest.approx(1e-4 / (2 * late.members)) and late.noise_std == 0
            assert late.weight_decay == pytest.approx(1e-4 / 2) and not recipe.schedule.members_follow
