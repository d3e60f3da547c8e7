"""`latephase report`: results as `latephase train` writes them, made up here, beside the published figures."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest

from latephase_kernels.cli import main
from latephase_kernels.train.recipe import Recipe, recipe_file, recipe_names
from latephase_kernels.train.report import PUBLISHED, WAYS, draw_report, read_results, run_report, summarize
from latephase_kernels.train.train_command import as_yaml, parse_recipe

yaml = pytest.importorskip("yaml")
QUANTITIES = ("accuracy", "nll", "ece", "brier")


def metrics(*values):
    return dict(zip(QUANTITIES, values, strict=True))


def write_run(folder, name, seed, accuracy, *, plain=False, **recipe):
    found = {"averaged": metrics(accuracy, 0.2 + seed / 100, 3.0, 0.1)}
    if not plain:
        found["ensemble"] = metrics(accuracy + 1, 0.1, 2.0, 0.05)
        found["members"] = metrics(accuracy - 1, 0.3, 4.0, 0.2)
        found["member 0"] = metrics(1.0, 1.0, 1.0, 1.0)
    folder.mkdir(parents=True)
    content = {"name": name, "seed": seed, "epochs": 200, "metrics": found, "collapse_error": 1e-7}
    (folder / "results.json").write_text(json.dumps(content))
    by = parse_recipe([name])[0] if name in recipe_names() else Recipe(name=name)
    (folder / "config.yaml").write_text(as_yaml(dataclasses.replace(by, seed=seed, **recipe)))
    return folder


@pytest.fixture
def runs(tmp_path):
    folder = tmp_path / "runs"
    for seed, accuracy in enumerate((96.25, 96.5, 96.75)):
        write_run(folder / f"cifar10-seed{seed}", "cifar10", seed, accuracy, checkpoint_minutes=seed + 1.0)
    write_run(folder / "base", "cifar10_base", 7, 96.0, plain=True)
    write_run(folder / "deep" / "er", "mine|own", 0, 50.0)
    return folder


def test_a_report(runs, tmp_path, capsys):
    output = tmp_path / "out" / "report"
    assert main(["report", str(runs), str(runs / "base"), "--output", str(output)]) == 0  # the base run counts once
    printed = capsys.readouterr().out
    lines = (output / "report.md").read_text().splitlines()
    assert printed.startswith("\n".join(lines)) and f"Written to {output}" in printed
    rows = {}
    for line in lines[2:]:
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        assert len(cells) == 8
        rows[cells[0], cells[1]] = cells[2:]
    deviation = np.std([96.25, 96.5, 96.75], ddof=1)  # 0.25
    assert rows["cifar10", "averaged"] == [
        *("3", f"96.50 ± {deviation:.2f}", "0.2100 ± 0.0100", "3.00 ± 0.00", "0.1000 ± 0.0000"),
        "96.46 ± 0.15 (late-phase BatchNorm, SGD)",
    ]
    assert rows["cifar10", "ensemble"][1::4] == ["97.50 ± 0.25", ""]  # nothing published of this way to predict
    assert (
        rows["cifar10_base", "averaged"][:2] == ["1", "96.00"] and "96.16 ± 0.12" in rows["cifar10_base", "averaged"][5]
    )
    assert rows["mine\\|own", "members"][1] == "49.00" and rows["mine\\|own", "averaged"][5] == ""
    assert len(rows) == 7
    written = {(row["run"], row["prediction"]): row for row in json.loads((output / "report.json").read_text())}
    assert len(written) == 7
    assert written["cifar10", "averaged"]["accuracy"] == {"mean": 96.5, "std": 0.25, "seeds": 3}
    assert written["cifar10", "averaged"]["published"]["accuracy"] == {"mean": 96.46, "std": 0.15, "seeds": 5}
    assert written["cifar10_base", "averaged"]["nll"] == {"mean": pytest.approx(0.27), "std": None, "seeds": 1}
    assert "published" not in written["cifar10", "ensemble"]
    assert (output / "report.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in output.iterdir()) == ["report.json", "report.md", "report.png"]


def test_a_figure_without_a_deviation_is_of_no_known_number_of_seeds(tmp_path):
    write_run(tmp_path / "runs" / "one", "cifar100_hypernetwork", 0, 80.0)
    assert main(["report", str(tmp_path / "runs"), "--output", str(tmp_path)]) == 0
    averaged = json.loads((tmp_path / "report.json").read_text())[0]
    assert averaged["published"]["accuracy"] == {"mean": 81.55, "std": None, "seeds": None}


def test_the_picture_shows_every_number(runs, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    assert draw_report(summarize(read_results([runs])), tmp_path / "report.png", {"cifar10"})
    panels = drawn[0].axes
    assert len(panels) == 4  # accuracy and NLL, of the names beginning with cifar10, and of mine
    texts = [text.get_text() for axes in panels for text in axes.texts]
    assert {"96.50 ± 0.25", "96.46 ± 0.15", "97.50 ± 0.25", "96.00", "96.16 ± 0.12", "0.2100 ± 0.0100"} <= set(texts)
    assert len(texts) == 2 * 7 + 2
    labels = [text.get_text() for axes in panels[::2] for text in axes.get_yticklabels()]
    assert labels == [
        *("cifar10_base, averaged", "cifar10*, averaged", "cifar10*, ensemble", "cifar10*, members"),
        *("mine|own, averaged", "mine|own, ensemble", "mine|own, members"),
    ]
    legends = [text.get_text() for axes in panels if axes.get_legend() for text in axes.get_legend().get_texts()]
    assert legends == ["published (*: of a recipe with other options)"]


def test_runs_are_found_where_training_puts_them(runs, monkeypatch, capsys):
    monkeypatch.chdir(runs.parent)
    assert main(["report"]) == 0
    assert "| cifar10 | averaged | 3 | 96.50 ± 0.25" in capsys.readouterr().out
    assert (runs.parent / "report" / "report.md").exists()


def test_runs_of_other_options_than_the_published_recipe_say_so(runs, tmp_path, capsys):
    late = dataclasses.replace(parse_recipe(["cifar100"])[0].late, members=5, fuse=False)
    write_run(runs / "short", "cifar100", 0, 70.0, epochs=2, late=late, precision="bfloat16", channels_last=True)
    output = tmp_path / "out"
    assert main(["report", str(runs), "--output", str(output)]) == 0
    line = (
        "cifar100: the published figure is of the recipe; these runs have epochs = 2 (200), late.members = 5 (10), "
        "precision = bfloat16 (float32) (the recipe's)"
    )
    assert (output / "report.md").read_text().splitlines()[-1] == line and line in capsys.readouterr().out
    written = {row["run"]: row.get("changed") for row in json.loads((output / "report.json").read_text())}
    assert written["cifar100"] == {
        "epochs": [2, 200],
        "late.members": [5, 10],
        "precision": ["bfloat16", "float32"],
    }
    assert [name for name, changed in written.items() if changed] == ["cifar100"]


def test_recipes_have_their_published_figure():
    """Every figure is of a recipe, or of several runs of one, and the recipe's comment states it, too."""
    for (name, way), (_, mean, deviation) in PUBLISHED.items():
        recipe = name.removesuffix("_deep_ensemble")
        assert recipe in recipe_names() and way in WAYS
        assert yaml.safe_load(recipe_file(recipe).read_text())["name"] == recipe
        if recipe == name:
            digits, unit = (3, "bits per character") if name.startswith("enwik8") else (2, "%")
            figure = f"{mean:.{digits}f}" + ("" if math.isnan(deviation) else f" ± {deviation:.{digits}f}")
            comment = [line for line in recipe_file(name).read_text().splitlines() if line.startswith("#")]
            assert f": {figure} {unit} published" in comment[0]
    stated = {name for name in recipe_names() if re.search("(%|character) published", recipe_file(name).read_text())}
    assert stated == {name for name, _ in PUBLISHED if not name.endswith("_deep_ensemble")}


def test_a_result_that_is_not_finite(runs, tmp_path):
    write_run(runs / "nan", "bad", 0, math.nan)
    run_report([runs], tmp_path / "out")
    written = json.loads((tmp_path / "out" / "report.json").read_text(), parse_constant=pytest.fail)
    assert {row["accuracy"]["mean"] for row in written if row["run"] == "bad"} == {None}


def test_a_deviation_that_is_not_finite(runs, tmp_path, capsys):
    for seed, accuracy in enumerate((math.nan, 50.0)):
        write_run(runs / f"nan{seed}", "bad", seed, accuracy)
    run_report([runs], tmp_path / "out")
    assert "| bad | averaged | 2 | nan | 0.2050 ± 0.0071 |" in capsys.readouterr().out


def test_other_commands_results_are_passed_over(runs):
    (runs / "demo_run").mkdir()
    (runs / "demo_run" / "results.json").write_text('{"methods": {}, "checks": {"failed": 0}}')
    (runs / "list").mkdir()
    (runs / "list" / "results.json").write_text("[1]")
    words = {"name": "words", "seed": 0, "metrics": {"averaged": metrics("high", 1, 1, 1)}}
    (runs / "words").mkdir()
    (runs / "words" / "results.json").write_text(json.dumps(words))
    assert [result["name"] for result in read_results([runs])].count("cifar10") == 3 and len(read_results([runs])) == 5


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda runs: (runs / "empty").mkdir(),
            "empty holds no finished run of latephase train; train there, or resume",
        ),
        (lambda runs: (runs / "base" / "results.json").write_text('{"name": "ci'), "base/results.json is damaged"),
        (
            lambda runs: write_run(runs / "again", "cifar10", 1, 90.0),
            "again and .*cifar10-seed1 are both cifar10 with seed 1; report one of them, or train with another --name",
        ),
        (
            lambda runs: write_run(runs / "short", "cifar10", 9, 90.0, epochs=2),
            "are both cifar10, but by different recipes: 'epochs: 2+0*' is in one of them only",
        ),
    ],
)
def test_what_cannot_be_reported_is_named(runs, tmp_path, change, message, capsys):
    change(runs)
    folders = [str(runs), *([str(runs / "empty")] if (runs / "empty").exists() else [])]
    assert main(["report", *folders, "--output", str(tmp_path / "out")]) == 2
    assert re.search(f"^latephase: error: report: .*{message}", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_results_alone_are_enough(runs, tmp_path):
    """Copied without their config.yaml, runs of one name are taken to be alike."""
    for config in runs.glob("**/config.yaml"):
        config.unlink()
    assert summarize(read_results([runs]))["cifar10", "averaged"]["accuracy"] == (96.5, 0.25, 3)
