"""Every method that applies, over the same seeds, by `latephase train`; the table says how far each is from plain SGD.

    python -m benchmarks.study digits [--seeds 10] [--jobs 1] [--runs runs/study]

A run takes one thread, at low priority. Finished runs are not repeated and unfinished ones go on, so the command can be
stopped at any time. Writes benchmarks/results/study_NAME.json, the table in docs/study.md and docs/study_NAME.png.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.study_report import draw, format_table, insert_table, summarize
from latephase_kernels.train.eval_command import run_eval
from latephase_kernels.train.files import write_whole
from latephase_kernels.train.run_training import Interrupted, run_training
from latephase_kernels.train.runs import environment
from latephase_kernels.train.train_command import as_yaml, parse_recipe

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        title: what it is.
        recipe: of its runs.
        way: to predict, as in a run's results.
        compared_with: the title of the row it is compared with; the study's first by default. Its own: with none.
        models: of a deep ensemble; 1 for none. The first model's seed is the row's, the others have seeds of their own.
        overrides: options of `latephase train` over the recipe's.
        last: of an SWA run the last weights, not their average: what SGD with the same schedule ends in.
    """

    title: str
    recipe: str
    way: str = "averaged"
    compared_with: str | None = None
    models: int = 1
    overrides: tuple[str, ...] = ()
    last: bool = False


@dataclass(frozen=True)
class Study:
    """A table.

    Attributes:
        rows: the first is what the others are compared with.
        quantities: in a run's results → heading, digits.
    """

    rows: tuple[Row, ...]
    quantities: dict[str, tuple[str, int]]


_TENTH = (  # of the recipes' images, for a quarter of their batch and rates and half their members
    "--data.num_train=6000",
    "--batch_size=32",
    "--optimizer.lr=0.025",
    "--late.members=5",
    "--channels_last=true",
)
_TENTH_SGD = (*_TENTH, "--schedule.end_lr=0.00025")
_TENTH_SWA = (*_TENTH, "--schedule.end_lr=0.0125")

STUDIES = {
    "digits": Study(
        (
            Row("base, SGD", "digits_base"),
            Row("base, SWA", "digits_swa_base"),
            Row("dropout", "digits_dropout"),
            Row("MC-dropout, 10 passes", "digits_dropout", "MC-dropout"),
            Row("BatchEnsemble, ensemble of 5", "digits_batch_ensemble", "ensemble"),
            Row("deep ensemble of 3", "digits_base", "ensemble", models=3),
            Row("late-phase BatchNorm + head, SGD", "digits"),
            Row("late-phase BatchNorm + head, SGD, ensemble", "digits", "ensemble"),
            Row("late-phase BatchNorm + head, SWA", "digits_swa"),
            Row("late-phase BatchNorm + head, SWA, ensemble", "digits_swa", "ensemble"),
            Row("members from T0 = 0", "digits_from_start"),
            Row("late-phase rank-1", "digits_rank1"),
            Row("hypernetwork, SGD", "digits_hypernetwork_base", compared_with="hypernetwork, SGD"),
            Row("late-phase hypernetwork", "digits_hypernetwork", compared_with="hypernetwork, SGD"),
        ),
        {"accuracy": ("accuracy %", 2), "nll": ("NLL", 4)},
    ),
    "fashion_mnist": Study(
        (
            Row("base, SGD", "fashion_mnist_base", overrides=_TENTH_SGD),
            Row("base, SWA", "fashion_mnist_swa_base", overrides=_TENTH_SWA),
            Row("late-phase BatchNorm + head, SGD", "fashion_mnist", overrides=_TENTH_SGD),
            Row("late-phase BatchNorm + head, SGD, ensemble", "fashion_mnist", "ensemble", overrides=_TENTH_SGD),
            Row(
                "late-phase BatchNorm + head, SWA", "fashion_mnist_swa", compared_with="base, SWA", overrides=_TENTH_SWA
            ),
            Row(
                "late-phase BatchNorm + head, SWA, ensemble",
                "fashion_mnist_swa",
                "ensemble",
                compared_with="base, SWA",
                overrides=_TENTH_SWA,
            ),
        ),
        {"accuracy": ("accuracy %", 2), "nll": ("NLL", 4)},
    ),
    "text": Study(
        (
            Row("base, SGD", "text_swa_base", last=True),
            Row("base, SWA", "text_swa_base"),
            Row("base + one set of gains, SGD", "text_swa_gains", last=True),
            Row("base + one set of gains, SWA", "text_swa_gains", compared_with="base, SWA"),
            Row("late-phase rank-1, SGD", "text_swa", last=True),
            Row("late-phase rank-1, SGD, ensemble", "text_swa", "ensemble", last=True),
            Row("late-phase rank-1, SWA", "text_swa", compared_with="base, SWA"),
            Row("late-phase rank-1, SWA, ensemble", "text_swa", "ensemble", compared_with="base, SWA"),
        ),
        {"bits_per_character": ("bits per character", 4)},
    ),
}


def extra_seeds(row: Row, seed: int, num_seeds: int) -> list[int]:
    """Return the seeds of a deep ensemble's models behind the first, used by no other row and no other ensemble."""
    return [num_seeds + seed * (row.models - 1) + k for k in range(row.models - 1)]


def _run_folder(runs: Path, row: Row, seed: int) -> Path:
    words = [re.sub(r"[^\w.]+", "_", override).strip("_") for override in row.overrides]
    return runs / f"{'-'.join([row.recipe, *words])}-seed{seed}"


def train(job: tuple[Path, str, tuple[str, ...], int]) -> bool:
    """Train one run to its end, unless it is finished; return False where it was interrupted.

    Args:
        job: folder, recipe, overrides, seed.

    Raises:
        ValueError: the folder holds a run of other options.
        Others: see run_training.
    """
    folder, name, overrides, seed = job
    recipe, _ = parse_recipe([name, *overrides, f"--seed={seed}"])
    config, existing = as_yaml(recipe), folder / "config.yaml"
    if (folder / "results.json").exists():
        if existing.read_text(encoding="utf-8") != config:
            raise ValueError(f"study: {folder} holds a run of other options; remove it, or give another --runs")
        return True
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "a", encoding="utf-8") as log, contextlib.redirect_stderr(log):
        try:
            run_training(recipe, config, folder, resume=True, device="cpu")
        except Interrupted:
            return False
    return True


def lower_priority() -> None:
    """Leave the machine to others: niceness 10, or what it is where that is more."""
    os.nice(max(0, 10 - os.nice(0)))


def jobs_of(study: Study, seeds: int, runs: Path) -> list[tuple[Path, str, tuple[str, ...], int]]:
    """Return every run that the study needs, each once, seed by seed."""
    jobs = {}
    for seed in range(seeds):
        for row in study.rows:
            for own in [seed, *extra_seeds(row, seed, seeds)]:
                folder = _run_folder(runs, row, own)
                jobs[folder] = (folder, row.recipe, row.overrides, own)
    return list(jobs.values())


def collect(study: Study, seeds: int, runs: Path) -> dict[str, dict[str, list[float]]]:
    """Return the values of every row and quantity, one a seed; deep ensembles are evaluated now.

    Raises:
        KeyError: a run's results lack a row's way to predict, or a quantity.
    """
    values: dict[str, dict[str, list[float]]] = {}
    for row in study.rows:
        metrics = []
        for seed in range(seeds):
            folder = _run_folder(runs, row, seed)
            if row.models > 1:
                members = [_run_folder(runs, row, own) for own in [seed, *extra_seeds(row, seed, seeds)]]
                folder = runs / f"{folder.name}-ensemble_of_{row.models}"
                if not (folder / "results.json").exists():
                    with contextlib.redirect_stdout(io.StringIO()):
                        run_eval(members, output=folder, device="cpu")
            if row.last:
                folder = _last_weights(folder)
            metrics.append(json.loads((folder / "results.json").read_text(encoding="utf-8"))["metrics"][row.way])
        values[row.title] = {quantity: [found[quantity] for found in metrics] for quantity in study.quantities}
    return values


def _last_weights(folder: Path) -> Path:
    """Evaluate a run's last weights, unless that is done; return the folder of the results."""
    evaluated = folder.with_name(f"{folder.name}-last")
    if not (evaluated / "results.json").exists():
        with contextlib.redirect_stdout(io.StringIO()):
            run_eval(folder, last=True, output=evaluated, device="cpu")
        (evaluated / "evaluation_last.json").rename(evaluated / "results.json")
    return evaluated


def run_study(name: str, *, seeds: int, jobs: int, runs: Path, results: Path, docs: Path) -> dict | None:
    """Train what is missing, and write results, table and picture; None where the training was interrupted.

    Args:
        name: of STUDIES.
        seeds: 0 … seeds − 1; at least 2.
        jobs: runs at a time.
        runs: where their folders are.
        results: the folder of study_NAME.json.
        docs: the folder of study.md and study_NAME.png.
    """
    study, todo = STUDIES[name], jobs_of(STUDIES[name], seeds, runs / name)
    print(f"study {name}: {len(todo)} runs, {sum((job[0] / 'results.json').exists() for job in todo)} of them finished")
    if jobs == 1:
        finished = all(map(train, todo))  # stops at the first that was interrupted
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, mp_context=context, initializer=lower_priority) as pool:
            finished = all(pool.map(train, todo))
    if not finished:
        print("interrupted; the same command goes on")
        return None
    content = {
        "study": name,
        "seeds": list(range(seeds)),
        "environment": {key: value for key, value in environment().items() if key != "command"},
        "recipes": {
            row.title: {
                "recipe": row.recipe,
                "overrides": list(row.overrides),
                "prediction": row.way,
                "last weights": row.last,
                "models": row.models,
                "compared with": row.compared_with or study.rows[0].title,
            }
            for row in study.rows
        },
        "values": collect(study, seeds, runs / name),
    }
    compared = {title: entry["compared with"] for title, entry in content["recipes"].items()}
    content["summary"] = summary = summarize(content["values"], compared)
    results.mkdir(parents=True, exist_ok=True)
    write_whole(results / f"study_{name}.json", json.dumps(content, indent=1) + "\n")
    table = format_table(summary, compared, study.quantities, seeds)
    insert_table(docs / "study.md", name, table)
    draw(summary, compared, study.quantities, docs / f"study_{name}.png")
    print(table)
    return content


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", choices=sorted(STUDIES), metavar="NAME", help=", ".join(sorted(STUDIES)))
    parser.add_argument("--seeds", type=int, default=10, help="runs a method (default 10)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each (default 1)")
    parser.add_argument("--runs", type=Path, default=Path("runs/study"), help="where runs lie (default runs/study)")
    arguments = parser.parse_args()
    if arguments.seeds < 2 or arguments.jobs < 1:
        parser.error(f"--seeds must be at least 2 and --jobs at least 1, got {arguments.seeds} and {arguments.jobs}")
    lower_priority()
    places = {"runs": arguments.runs, "results": ROOT / "benchmarks" / "results", "docs": ROOT / "docs"}
    finished = [run_study(name, seeds=arguments.seeds, jobs=arguments.jobs, **places) for name in arguments.names]
    return 0 if all(finished) else 130


if __name__ == "__main__":
    raise SystemExit(main())
