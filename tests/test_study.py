"""`python -m benchmarks.study`: seeds are paired, finished runs are not repeated, figures are those of the runs."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("jsonargparse"), pytest.importorskip("torchmetrics"), pytest.importorskip("safetensors")
ROOT = Path(__file__).parents[1]
SHORT = (
    *("--epochs=2", "--model.options.widths=[4,4]", "--schedule.anneal_start=1", "--schedule.anneal_end=2"),
    *("--evaluate_every=5", "--batch_size=60"),
)
LATE = ("--late.start=1", "--late.members=2")


@pytest.fixture(scope="module")
def study():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        module = pytest.importorskip("benchmarks.study")
        rows = (
            module.Row("plain", "digits_base", overrides=SHORT),
            module.Row("late", "digits", overrides=(*SHORT, *LATE)),
            module.Row("late, ensemble", "digits", "ensemble", overrides=(*SHORT, *LATE)),
            module.Row("two models", "digits_base", "ensemble", models=2, compared_with="late", overrides=SHORT),
        )
        patch.setitem(module.STUDIES, "tiny", module.Study(rows, {"accuracy": ("accuracy %", 2), "nll": ("NLL", 4)}))
        yield module


@pytest.fixture(scope="module")
def done(study, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    (folder / "docs").mkdir()
    (folder / "docs" / "study.md").write_text("# A\n\n<!-- tiny -->\nold\n<!-- end tiny -->\nafter\n")
    places = {"runs": folder / "runs", "results": folder / "results", "docs": folder / "docs"}
    return places, study.run_study("tiny", seeds=2, jobs=1, **places)


def metrics(places, pattern):
    folders = sorted((places["runs"] / "tiny").glob(pattern))
    return [json.loads((folder / "results.json").read_text())["metrics"] for folder in folders]


def test_figures(done):
    places, content = done
    plain = metrics(places, "digits_base-*-seed[01]")
    late = metrics(places, "digits-*-seed[01]")
    assert len(plain) == len(late) == 2 and len(metrics(places, "*seed?")) == 6  # ensembles take two more runs
    values = content["values"]
    assert values["plain"]["nll"] == [found["averaged"]["nll"] for found in plain]
    assert values["late, ensemble"]["accuracy"] == [found["ensemble"]["accuracy"] for found in late]
    ensembles = [
        json.loads((places["runs"] / "tiny" / f"{folder}" / "results.json").read_text())
        for folder in sorted(p.name for p in (places["runs"] / "tiny").glob("*ensemble_of_2"))
    ]
    assert [found["seeds"] for found in ensembles] == [[0, 2], [1, 3]]
    assert values["two models"]["nll"] == [found["metrics"]["ensemble"]["nll"] for found in ensembles]
    difference = np.subtract(values["two models"]["nll"], values["late"]["nll"])
    found = content["summary"]["two models"]["nll"]
    assert found["difference"] == pytest.approx(difference.mean())
    assert found["difference error"] == pytest.approx(difference.std(ddof=1) / np.sqrt(2))
    assert found["error"] == pytest.approx(np.std(values["two models"]["nll"], ddof=1) / np.sqrt(2))
    assert "difference" not in content["summary"]["plain"]["nll"]
    assert json.loads((places["results"] / "study_tiny.json").read_text()) == content
    text = (places["docs"] / "study.md").read_text()
    assert text.startswith("# A\n\n<!-- tiny -->\n| method |") and text.endswith("<!-- end tiny -->\nafter\n")
    row = next(line for line in text.splitlines() if line.startswith("| two models |"))
    assert f"{found['mean']:.4f} ± {found['error']:.4f} | {found['difference']:+.4f} ±" in row
    assert (
        "old" not in text
        and "2 seeds; mean ± standard error; differences are to plain, seed by seed (two models to late)" in text
    )
    assert (places["docs"] / "study_tiny.png").read_bytes().startswith(b"\x89PNG")


def test_finished_runs_are_not_repeated(study, done, monkeypatch):
    places, content = done
    monkeypatch.setattr(study, "run_training", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(study, "run_eval", lambda *_, **__: pytest.fail("evaluated again"))
    assert study.run_study("tiny", seeds=2, jobs=1, **places) == content
    rows = study.STUDIES["tiny"].rows
    longer = dataclasses.replace(rows[0], overrides=(*SHORT[:-1], "--batch_size=50"))
    folder = study._run_folder(places["runs"] / "tiny", rows[0], 0)
    with pytest.raises(ValueError, match=f"{folder.name} holds a run of other options; remove it"):
        study.train((folder, longer.recipe, longer.overrides, 0))


def test_an_interrupted_study_writes_nothing(study, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise study.Interrupted(2)

    monkeypatch.setattr(study, "run_training", interrupted)
    places = {"runs": tmp_path / "runs", "results": tmp_path / "results", "docs": tmp_path / "docs"}
    assert study.run_study("tiny", seeds=2, jobs=1, **places) is None
    assert not places["results"].exists() and len(list((tmp_path / "runs" / "tiny").iterdir())) == 1


def test_the_committed_studies(study):
    """Rows name recipes that exist; each study's committed figures are of its present rows, and stand in the docs."""
    from latephase_kernels.train.train_command import parse_recipe

    for name, found in study.STUDIES.items():
        titles = [row.title for row in found.rows]
        assert len(set(titles)) == len(titles)
        for row in found.rows:
            parse_recipe([row.recipe, *row.overrides])
            assert row.compared_with is None or row.compared_with in titles
        results = ROOT / "benchmarks" / "results" / f"study_{name}.json"
        if results.exists():
            content = json.loads(results.read_text())
            assert list(content["values"]) == titles and len(content["seeds"]) >= 10
            block = re.search(
                rf"<!-- {name} -->\n(.*)\n<!-- end {name} -->", (ROOT / "docs" / "study.md").read_text(), re.DOTALL
            )
            compared = {title: entry["compared with"] for title, entry in content["recipes"].items()}
            summary = study.summarize(content["values"], compared)
            assert block[1] == study.format_table(summary, compared, found.quantities, len(content["seeds"]))
