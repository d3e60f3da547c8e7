"""`latephase train`, `eval` and `report` on a text: a small file, and every text recipe at a tiny size."""

import dataclasses
import json
import math
import re
import shutil

import pytest
import torch

from latephase_kernels.cli import main
from latephase_kernels.data import load_text, split_text
from latephase_kernels.models import CharLSTM
from latephase_kernels.nn import Rank1LSTM
from latephase_kernels.train.recipe import Model, Text, check, recipe_names
from latephase_kernels.train.run_training import load_model
from latephase_kernels.train.text_task import bits_per_character
from latephase_kernels.train.train_command import parse_recipe
from latephase_kernels.train.trainer import Trainer

pytest.importorskip("jsonargparse"), pytest.importorskip("safetensors")
TEXT_RECIPES = [name for name in recipe_names() if name.startswith(("text", "enwik8"))]
K = 3


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_bytes(b"It was a dark and stormy night; the rain fell in torrents, except at intervals. " * 15)
    return path


def options(book):
    return [
        *("text_swa", "--data.name=text_file", f"--data.folder={book}", "--text.window=5", "--batch_size=4"),
        *("--text.evaluation_streams=2", f"--late.members={K}", "--late.noise_std=0.1"),
        *("--model.options.hidden_size=8", "--model.options.embedding_size=4", "--device=cpu"),
    ]


@pytest.fixture(scope="module")
def finished(book, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    assert main(["train", *options(book), "--output", str(folder)]) == 0
    return folder


def test_a_run(finished, book, capsys):
    results = json.loads((finished / "results.json").read_text())
    ways = ["averaged", "ensemble", "members", *(f"member {k}" for k in range(K))]
    assert list(results["metrics"]) == ways and results["collapse_error"] < 1e-5
    text = load_text(book)
    plain = CharLSTM(len(text.vocabulary), 8, embedding_size=4)
    load_model(plain, finished / "model.safetensors")  # strictly
    averaged = results["metrics"]["averaged"]
    assert bits_per_character(plain, text.test, 2)["averaged"] == pytest.approx(averaged["bits_per_character"])
    assert bits_per_character(plain, text.validation, 2)["averaged"] == pytest.approx(
        averaged["validation_bits_per_character"]
    )
    assert 0 < averaged["bits_per_character"] < math.log2(len(text.vocabulary))
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["characters/s"] > 0 and records[-1]["members"] == K
    assert 0 < records[-1]["validation bits per character"] < math.log2(len(text.vocabulary))
    capsys.readouterr()
    assert main(["eval", str(finished), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    evaluation = json.loads((finished / "evaluation.json").read_text())
    assert evaluation["metrics"] == results["metrics"] and evaluation["finished"]
    assert re.search(rf"^ *ensemble +{results['metrics']['ensemble']['bits_per_character']:.4f} ", printed, re.M)


def test_the_last_weights_of_a_run_with_swa(finished, book, tmp_path):
    """They are those of the same run without SWA, and leave what was found of their average alone."""
    (tmp_path / "last").mkdir()
    of_average = tmp_path / "last" / "evaluation.json"
    of_average.write_text("{}")
    assert main(["eval", str(finished), "--last", "--output", str(tmp_path / "last"), "--device", "cpu"]) == 0
    without = tmp_path / "without"
    assert main(["train", *options(book), "--swa.start=null", "--output", str(without)]) == 0
    last = json.loads((tmp_path / "last" / "evaluation_last.json").read_text())
    assert of_average.read_text() == "{}"
    trained = json.loads((without / "results.json").read_text())
    assert last["metrics"] == trained["metrics"]
    assert last["metrics"] != json.loads((finished / "results.json").read_text())["metrics"]


def test_a_run_goes_on_where_its_text_was_moved_to(finished, book, tmp_path, capsys):
    folder, moved = shutil.copytree(finished, tmp_path / "run"), tmp_path / "moved.txt"
    for content, code in ((book.read_bytes(), 0), (book.read_bytes()[:600], 2)):
        moved.write_bytes(content)
        assert main(["train", *options(moved), "--output", str(folder), "--resume"]) == code
    message = f"data.folder must hold the data of the checkpoint's run, .* got {moved} with"
    assert re.search(message, capsys.readouterr().err)


def test_a_report(finished, tmp_path, capsys):
    """One table for texts; published figures stand beside the recipes' names alone."""
    runs = tmp_path / "runs"
    for seed, bits in enumerate((1.5, 1.75)):
        folder = runs / f"enwik8-{seed}"
        folder.mkdir(parents=True)
        found = {"averaged": {"bits_per_character": bits, "validation_bits_per_character": bits + 1}}
        (folder / "results.json").write_text(json.dumps({"name": "enwik8", "seed": seed, "metrics": found}))
    images = runs / "digits"
    images.mkdir()
    found = {"averaged": {"accuracy": 50.0, "nll": 1.0, "ece": 2.0, "brier": 0.5}}
    (images / "results.json").write_text(json.dumps({"name": "digits", "seed": 0, "metrics": found}))
    assert main(["report", str(runs), str(finished), "--output", str(tmp_path / "out")]) == 0
    images, texts = (tmp_path / "out" / "report.md").read_text().strip().split("\n\n")
    assert "| digits | averaged | 1 | 50.00 | 1.0000 | 2.00 | 0.5000 |  |" in images and "enwik8" not in images
    assert (
        "| enwik8 | averaged | 2 | 1.6250 ± 0.1768 | 2.6250 ± 0.1768 | 1.633 (late-phase rank-1, SGD) |"
        in texts.splitlines()
    )
    assert "| text_swa | ensemble | 1 |" in texts and "published bits per character" in texts
    rows = {(row["run"], row["prediction"]): row for row in json.loads((tmp_path / "out" / "report.json").read_text())}
    published = rows["enwik8", "averaged"]["published"]
    assert published["bits_per_character"] == {"mean": 1.633, "std": None, "seeds": None}
    assert (tmp_path / "out" / "report.png").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["text", "--text.window=many"], "text.window"),
        (["text", "--text.window=-1"], "text.window must be at least 1, got -1"),
        (["text", "--text.length=3"], "text.length"),
        (["text", "--optimizer.clip_norm=-1"], "optimizer.clip_norm must be null or more than 0"),
        (["text", "--batch_size=1000000"], "batch_size, text.window or late.members do not fit the text"),
        (["text", "--late.members=1000000"], "batch_size, text.window or late.members do not fit the text"),
        (["text", "--late.targets=[rank1:gru]"], "late.targets .* do not fit char_lstm: they match no module"),
        (["text", "--model.name=small_resnet"], "model.name must be char_lstm for a text, got 'small_resnet'"),
        (["digits", "--model.name=char_lstm"], "model.name must be .* got 'char_lstm'"),
        (["text", "--data.name=text_file", "--data.folder=nowhere.txt"], "nowhere.txt"),
        (["text", "--data.name=text_file", "--data.folder=short.txt"], "at least 20 bytes, got 5"),
        (["enwik8", "--data.folder=nowhere"], 'nowhere.*download\\("enwik8"'),
    ],
)
def test_what_the_user_can_mend_is_a_message(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_bytes(b"short")
    try:
        code = main(["train", *arguments])
    except SystemExit as exit:  # an option that the parser refuses
        code = exit.code
    assert code == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--ood", "svhn"], "--ood and --corruptions are for runs on images, this one is on text_file"),
        (["--corruptions"], "--ood and --corruptions are for runs on images"),
        (["--last"], "has no last weights; leave out --last"),
    ],
)
def test_what_a_text_has_not(arguments, message, finished, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.yaml", "model.safetensors"):
        (folder / name).write_bytes((finished / name).read_bytes())
    assert main(["eval", str(folder), *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (folder / "evaluation.json").exists()


def test_an_ensemble_of_runs_on_a_text_is_refused(finished, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors").write_bytes((finished / "model.safetensors").read_bytes())
    (other / "config.yaml").write_text((finished / "config.yaml").read_text().replace("seed: 0", "seed: 1"))
    assert main(["eval", str(finished), str(other)]) == 2
    assert "an ensemble of runs must be of runs on images, got text_file" in capsys.readouterr().err


def test_the_set_of_recipes_is_complete():
    forms = ("", "_base", "_gains", "_swa", "_swa_base", "_swa_gains")
    assert sorted(TEXT_RECIPES) == sorted(f"{text}{form}" for text in ("text", "enwik8") for form in forms)
    network = CharLSTM(205, **parse_recipe(["enwik8"])[0].model.options)
    assert sum(parameter.numel() for parameter in network.parameters()) == 1_558_730  # the paper's 1.56 M


@pytest.mark.parametrize("name", TEXT_RECIPES)
def test_a_recipe_trains(name):
    recipe = parse_recipe([name])[0]
    assert recipe.name == name and recipe.late.targets == ["rank1:lstm"]
    assert recipe.late.members == (1 if name.endswith("gains") else 5 if name.startswith("text") else 10)
    scale = 2 / recipe.epochs
    start = None if recipe.late.start is None else scale * recipe.late.start
    tiny = dataclasses.replace(
        recipe,
        model=Model("char_lstm", {**recipe.model.options, "hidden_size": 3}),
        batch_size=1,
        epochs=2,
        text=Text(window=3),
        late=dataclasses.replace(recipe.late, start=start),
        swa=dataclasses.replace(recipe.swa, start=None if recipe.swa.start is None else scale * recipe.swa.start),
    )
    trainer = Trainer(check(tiny), split_text(b"the quick brown fox jumps over the lazy dog " * 5))
    while trainer.minibatch < trainer.total:
        assert trainer.expanded <= (start is not None and trainer.epoch >= start)
        trainer.step()
    assert math.isfinite(trainer.read_loss()[0])
    assert isinstance(trainer.model.lstm, Rank1LSTM) == (not name.endswith("base"))
    assert type(trainer.model.fc) is torch.nn.Linear
    assert (trainer.averaged is not None) == ("swa" in name)
