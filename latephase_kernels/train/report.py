"""`latephase report`: finished runs beside the published figures, mean ± standard deviation over seeds."""

import dataclasses
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from .figures import new_figure, save_figure
from .files import write_json, write_whole
from .quantities import KINDS, QUANTITIES, kind_of
from .train_command import parse_recipe

# By the run's name and way to predict: what it is, and the first quantity of its kind (test accuracy in %, bits per
# character of the test text), mean and standard deviation over 5 seeds (nan: a figure without one, and no
# number of seeds is known).
# Source: von Oswald et al., ICLR 2021 (arXiv 2007.12927); WRN-28-10 unless said.
PUBLISHED: dict[tuple[str, str], tuple[str, float, float]] = {
    ("cifar10", "averaged"): ("late-phase BatchNorm, SGD", 96.46, 0.15),
    ("cifar10_base", "averaged"): ("base, SGD", 96.16, 0.12),
    ("cifar10_base_deep_ensemble", "ensemble"): ("deep ensemble, SGD", 96.91, math.nan),
    ("cifar10_batch_ensemble", "ensemble"): ("BatchEnsemble, SGD", 96.19, 0.18),
    ("cifar10_dropout", "averaged"): ("dropout, SGD", 96.02, 0.06),
    ("cifar10_swa", "averaged"): ("late-phase BatchNorm, SWA", 96.81, 0.07),
    ("cifar10_swa_base", "averaged"): ("base, SWA", 96.48, 0.04),
    ("cifar10_wide_swa", "averaged"): ("WRN 28-14, late-phase BatchNorm, SWA", 97.45, 0.10),
    ("cifar100", "averaged"): ("late-phase BatchNorm, SGD", 82.87, 0.22),
    ("cifar100_base", "averaged"): ("base, SGD", 81.35, 0.16),
    ("cifar100_base_deep_ensemble", "ensemble"): ("deep ensemble, SGD", 84.09, math.nan),
    ("cifar100_hypernetwork", "averaged"): ("late-phase hypernetwork, SGD", 81.55, math.nan),
    ("cifar100_swa", "averaged"): ("late-phase BatchNorm, SWA", 83.06, 0.08),
    ("cifar100_swa_base", "averaged"): ("base, SWA", 82.46, 0.09),
    ("cifar100_swa_hypernetwork", "averaged"): ("late-phase hypernetwork, SWA", 82.01, math.nan),
    ("cifar100_wide_swa", "averaged"): ("WRN 28-14, late-phase BatchNorm, SWA", 85.00, 0.25),
    ("enwik8", "averaged"): ("late-phase rank-1, SGD", 1.633, math.nan),
    ("enwik8_base", "averaged"): ("base, SGD", 1.695, math.nan),
    ("enwik8_gains", "averaged"): ("base + one set of rank-1 weights, SGD", 1.663, math.nan),
    ("enwik8_swa", "averaged"): ("late-phase rank-1, SWA", 1.615, math.nan),
    ("enwik8_swa_base", "averaged"): ("base, SWA", 1.626, math.nan),
    ("enwik8_swa_gains", "averaged"): ("base + one set of rank-1 weights, SWA", 1.616, math.nan),
    ("imagenet_densenet161", "averaged"): ("DenseNet-161, late-phase BatchNorm, fine-tuning", 78.31, 0.01),
    ("imagenet_densenet161_base", "averaged"): ("DenseNet-161, fine-tuning", 78.17, math.nan),
    ("imagenet_resnet152", "averaged"): ("ResNet-152, late-phase BatchNorm, fine-tuning", 78.77, 0.01),
    ("imagenet_resnet152_base", "averaged"): ("ResNet-152, fine-tuning", 78.37, math.nan),
    ("imagenet_resnet50", "averaged"): ("ResNet-50, late-phase BatchNorm, fine-tuning", 76.87, 0.03),
    ("imagenet_resnet50_base", "averaged"): ("ResNet-50, fine-tuning", 76.62, math.nan),
}
PUBLISHED_DIGITS = {"accuracy": 2, "bits_per_character": 3}
WAYS = ("averaged", "ensemble", "members", "MC-dropout")
# Lines of a config.yaml in which runs may differ that are averaged: they do not say what is trained.
_INCIDENTAL = (
    *("seed", "folder", "evaluate_every", "checkpoint_minutes", "keep_checkpoints", "timeout_seconds"),
    *("channels_last", "compile", "cuda_graph", "deterministic", "member_chunk", "fuse", "workers"),
)

Summary = dict[tuple[str, str], dict[str, tuple[float, float, int]]]


def _is_result(content: Any) -> bool:
    try:
        ways = [content["metrics"][way] for way in WAYS if way in content["metrics"]]
        complete = len({kind_of(found) for found in ways} - {()}) == 1 and all(map(kind_of, ways))
        values = [found[quantity] for found in ways for quantity in kind_of(found)]
        complete = complete and all(value is None or isinstance(value, (int, float)) for value in values)
        return complete and isinstance(content["name"], str) and isinstance(content["seed"], int)
    except (KeyError, TypeError):
        return False


def _recipe_lines(file: Path) -> list[str]:
    """What a run was trained by, as far as runs that are averaged must agree; empty where it is not there."""
    config = file.with_name("config.yaml")
    lines = config.read_text(encoding="utf-8").splitlines() if config.exists() else []
    return [line.strip() for line in lines if line.strip().partition(":")[0] not in _INCIDENTAL]


def read_results(folders: Sequence[str | Path]) -> list[dict[str, Any]]:
    """Return the results.json of every run in the folders, which are runs or hold runs; each once.

    What other commands of this package wrote there is passed over.

    A result whose run has the name of a recipe with a published figure, and other options than that recipe, gets the
    key "changed": dotted option → [the run's, the recipe's].

    Raises:
        ValueError: a folder holds no finished run, a results.json is damaged, two runs have the same name and seed, or
            runs have the same name and different recipes.
    """
    found: dict[Path, dict[str, Any]] = {}
    for folder in map(Path, folders):
        files = sorted(folder.glob("**/results.json"))
        contents = {}
        for file in files:
            try:
                contents[file] = json.loads(file.read_text(encoding="utf-8"))
            except ValueError:
                raise ValueError(f"report: {file} is damaged; resume the run, or remove the file") from None
        runs = {file.resolve(): content for file, content in contents.items() if _is_result(content)}
        if not runs:
            raise ValueError(f"report: {folder} holds no finished run of latephase train; train there, or resume")
        found.update(runs)
    _check_comparable(found)
    # Once for all runs of a name, which agree; parsing takes a while.
    changed: dict[tuple[str, bool], dict[str, list[Any]]] = {}
    for file, result in found.items():
        key = (result["name"], file.with_name("config.yaml").exists())
        if key not in changed:
            changed[key] = _changed_options(file, result["name"])
        if changed[key]:
            result["changed"] = changed[key]
    return list(found.values())


def _dotted(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in options.items():
        found |= _dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def _changed_options(file: Path, name: str) -> dict[str, list[Any]]:
    """The options, but for incidental ones, in which a run differs from the published recipe of its name."""
    config = file.with_name("config.yaml")
    if name not in {published for published, _ in PUBLISHED} or not config.exists():
        return {}
    try:
        run, recipe = (_dotted(dataclasses.asdict(parse_recipe([source])[0])) for source in (str(config), name))
    except ImportError:  # without the packages that train needs there is nothing to compare with
        return {}
    except ValueError as error:
        raise ValueError(f"report: {config} is no recipe: {error}; mend it, or remove it") from None
    return {
        key: [run.get(key), recipe.get(key)]
        for key in {**recipe, **run}
        if key.rpartition(".")[2] not in _INCIDENTAL and run.get(key) != recipe.get(key)
    }


def _check_comparable(found: Mapping[Path, dict[str, Any]]) -> None:
    """Raise a ValueError where a mean over seeds would be over other things, too."""
    by_name: dict[str, dict[int, Path]] = defaultdict(dict)
    for file, result in found.items():
        seeds = by_name[result["name"]]
        if result["seed"] in seeds:
            raise ValueError(
                f"report: {seeds[result['seed']].parent} and {file.parent} are both {result['name']} with seed "
                f"{result['seed']}; report one of them, or train with another --name"
            )
        for other in list(seeds.values())[:1]:
            lines, other_lines = _recipe_lines(file), _recipe_lines(other)
            changed = sorted(set(lines) ^ set(other_lines))
            if lines and other_lines and changed:
                raise ValueError(
                    f"report: {other.parent} and {file.parent} are both {result['name']}, but by different recipes: "
                    f"{changed[0]!r} is in one of them only; report one of them, or train with another --name"
                )
        seeds[result["seed"]] = file


def summarize(results: Sequence[dict[str, Any]]) -> Summary:
    """Return mean, standard deviation (nan for one seed) and number of seeds by (run's name, way to predict), quantity.

    The standard deviation is that of a sample: divided by the number of seeds less one.
    """
    values: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name in dict.fromkeys(result["name"] for result in results):
        for way in WAYS:
            for result in results:
                if result["name"] == name and way in result["metrics"]:
                    for quantity in kind_of(result["metrics"][way]):
                        found = result["metrics"][way][quantity]
                        values[name, way][quantity].append(math.nan if found is None else found)  # as write_json has it
    return {
        key: {
            quantity: (
                statistics.fmean(found),
                # stdev fails on nan with an AttributeError.
                statistics.stdev(found) if len(found) > 1 and not any(map(math.isnan, found)) else math.nan,
                len(found),
            )
            for quantity, found in quantities.items()
        }
        for key, quantities in values.items()
    }


def _with_deviation(mean: float, deviation: float, digits: int) -> str:
    return f"{mean:.{digits}f}" + ("" if math.isnan(deviation) else f" ± {deviation:.{digits}f}")


def format_changes(changed: Mapping[str, dict[str, list[Any]]]) -> list[str]:
    """Return a line of Markdown for each name whose runs are not by the recipe that its published figure is of."""
    return [
        f"{name}: the published figure is of the recipe; these runs have "
        + ", ".join(f"{key} = {run} ({recipe})" for key, (run, recipe) in options.items())
        + " (the recipe's)"
        for name, options in changed.items()
    ]


def format_markdown(summary: Summary) -> str:
    """Return the comparison as Markdown, one table for each kind of data."""
    tables = []
    for kind in KINDS:
        rows = {key: quantities for key, quantities in summary.items() if kind_of(quantities) == kind}
        if rows:
            tables.append(_markdown_table(rows, kind))
    return "\n\n".join(tables)


def _markdown_table(summary: Summary, kind: Sequence[str]) -> str:
    titles = [QUANTITIES[key][0] for key in kind]
    header = ["run", "prediction", "seeds", *titles, f"published {titles[0]}"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for (name, way), quantities in summary.items():
        cells = [name.replace("|", "\\|"), way, str(quantities[kind[0]][2])]
        cells += [_with_deviation(*quantities[key][:2], QUANTITIES[key][1]) for key in kind]
        if (name, way) in PUBLISHED:
            title, mean, deviation = PUBLISHED[name, way]
            cells.append(f"{_with_deviation(mean, deviation, PUBLISHED_DIGITS[kind[0]])} ({title})")
        else:
            cells.append("")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_report(summary: Summary, path: Path, changed: Collection[str] = ()) -> bool:
    """Draw two quantities of every run, with the published one beside it; False without matplotlib.

    Names of runs in `changed`, with other options than the recipe of their published figure, get a star.

    Runs of one kind whose names begin alike, up to the first "_", share their panels: those of one data set, as the
    recipes are named.
    """
    families: dict[tuple[str, Sequence[str]], list[tuple[str, str]]] = defaultdict(list)
    for (name, way), quantities in summary.items():
        families[name.partition("_")[0], kind_of(quantities)].append((name, way))
    heights = [len(rows) + 1.5 for rows in families.values()]
    figure = new_figure(12, 0.5 * sum(heights) + 0.6)
    if figure is None:
        return False
    grid = figure.subplots(
        len(families), 2, sharey="row", squeeze=False, gridspec_kw={"height_ratios": heights, "width_ratios": (3, 2)}
    )
    for panels, ((_, kind), rows) in zip(grid, families.items()):
        for axes, quantity in zip(panels, kind):
            for row, key in enumerate(rows):
                mean, deviation, _ = summary[key][quantity]
                _draw_value(axes, row - 0.1, mean, deviation, QUANTITIES[quantity][1], above=True, fmt="o", color="C0")
            axes.set_xlabel(f"test {QUANTITIES[quantity][0]}")
            axes.grid(alpha=0.3)
            axes.margins(x=0.2)
        published = [(row, PUBLISHED[key]) for row, key in enumerate(rows) if key in PUBLISHED]
        for row, (_, mean, deviation) in published:
            digits = PUBLISHED_DIGITS[kind[0]]
            _draw_value(panels[0], row + 0.15, mean, deviation, digits, above=False, fmt="s", color="C1")
        if published:
            star = " (*: of a recipe with other options)" if any(name in changed for name, _ in rows) else ""
            panels[0].plot([], [], "s", color="C1", label="published" + star)
            panels[0].legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), frameon=False, borderpad=0.0)
        panels[0].set_yticks(range(len(rows)), [f"{name}{'*' * (name in changed)}, {way}" for name, way in rows])
        panels[0].set_ylim(len(rows) - 0.3, -0.7)
    save_figure(figure, path, dpi=110)
    return True


def _draw_value(
    axes: Any, row: float, mean: float, deviation: float, digits: int, *, above: bool, **style: Any
) -> None:
    """One point with its error bar and, above or below it, its value in figures."""
    axes.errorbar(mean, row, xerr=None if math.isnan(deviation) else deviation, capsize=3, markersize=5, **style)
    axes.annotate(
        _with_deviation(mean, deviation, digits),
        (mean, row),
        (0, 4 if above else -4),
        textcoords="offset points",
        ha="center",
        va="bottom" if above else "top",
        fontsize="small",
        color=style["color"],
    )


def run_report(folders: Sequence[str | Path], output: str | Path) -> None:
    """Print the table, and write report.md, report.json and report.png into the output folder.

    Raises:
        ValueError: see read_results; nothing was written.
        OSError: a folder cannot be read or written.
    """
    results = read_results(folders)
    summary = summarize(results)
    changed = {result["name"]: result["changed"] for result in results if "changed" in result}
    table = "\n\n".join([format_markdown(summary), *format_changes(changed)])
    target = Path(output)
    target.mkdir(parents=True, exist_ok=True)
    write_whole(target / "report.md", table + "\n")
    write_json(target / "report.json", _as_json(summary, changed))
    drawn = draw_report(summary, target / "report.png", changed)
    print(table)
    print(
        f"\nMean ± standard deviation over seeds. Written to {target}"
        + ("" if drawn else " (no picture: matplotlib is missing)")
    )


def _as_json(summary: Summary, changed: Mapping[str, dict[str, list[Any]]]) -> list[dict[str, Any]]:
    """The summary, one entry a row of the table."""
    content = []
    for (name, way), quantities in summary.items():
        entry: dict[str, Any] = {"run": name, "prediction": way}
        if name in changed:
            entry["changed"] = changed[name]
        for quantity, (mean, deviation, count) in quantities.items():
            entry[quantity] = {"mean": mean, "std": deviation, "seeds": count}
        if (name, way) in PUBLISHED:
            title, mean, deviation = PUBLISHED[name, way]
            seeds = None if math.isnan(deviation) else 5
            figure = {"mean": mean, "std": deviation, "seeds": seeds}
            entry["published"] = {"what": title, kind_of(quantities)[0]: figure}
        content.append(entry)
    return content
