"""`latephase report`: finished runs beside the published figures, mean ± standard deviation over seeds."""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Test accuracy in %, mean and standard deviation over 5 seeds (None where the paper gives none).
# Source: von Oswald et al., ICLR 2021, tables 1 to 3; WRN-28-10 unless said.
PUBLISHED: dict[str, tuple[str, float, float | None]] = {
    "cifar10": ("late-phase BatchNorm, SGD", 96.46, 0.15),
    "cifar10_base": ("base, SGD", 96.16, 0.12),
    "cifar10_swa": ("late-phase BatchNorm, SWA", 96.81, 0.07),
    "cifar10_swa_base": ("base, SWA", 96.48, 0.04),
    "cifar10_wide_swa": ("WRN 28-14, late-phase BatchNorm, SWA", 97.45, 0.10),
    "cifar100": ("late-phase BatchNorm, SGD", 82.87, 0.22),
    "cifar100_base": ("base, SGD", 81.35, 0.16),
    "cifar100_swa": ("late-phase BatchNorm, SWA", 83.06, 0.08),
    "cifar100_swa_base": ("base, SWA", 82.46, 0.09),
    "cifar100_wide_swa": ("WRN 28-14, late-phase BatchNorm, SWA", 85.00, 0.25),
}
QUANTITIES = {"accuracy": ("accuracy %", 2), "nll": ("NLL", 4), "ece": ("ECE %", 2), "brier": ("Brier", 4)}
WAYS = ("averaged", "ensemble", "members")


def read_results(folders: Sequence[str | Path]) -> list[dict[str, Any]]:
    """Return the results.json of every run in the folders, which are runs or hold runs.

    Raises:
        ValueError: a folder holds no finished run, or a results.json is damaged.
    """
    results = []
    for folder in map(Path, folders):
        files = sorted(folder.glob("**/results.json"))
        if not files:
            raise ValueError(f"report: {folder} holds no finished run (no results.json); train there, or resume")
        for file in files:
            try:
                content = json.loads(file.read_text(encoding="utf-8"))
                content["metrics"]["averaged"]["accuracy"], content["name"], content["seed"]
            except (json.JSONDecodeError, KeyError, TypeError):
                raise ValueError(f"report: {file} is no result of latephase train") from None
            results.append(content)
    return results


def summarize(results: Sequence[dict[str, Any]]) -> dict[tuple[str, str], dict[str, tuple[float, float, int]]]:
    """Return mean, standard deviation (nan for one seed) and number of seeds by (run's name, way to predict), quantity.

    Raises:
        ValueError: two runs have the same name and seed.
    """
    seen = set()
    values: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        key = (result["name"], result["seed"])
        if key in seen:
            raise ValueError(f"report: there are two runs of {key[0]} with seed {key[1]}; name one of them otherwise")
        seen.add(key)
        for way in WAYS:
            for quantity, value in result["metrics"].get(way, {}).items():
                values[result["name"], way][quantity].append(value)
    return {
        key: {
            quantity: (
                statistics.fmean(found),
                statistics.stdev(found) if len(found) > 1 else math.nan,
                len(found),
            )
            for quantity, found in quantities.items()
        }
        for key, quantities in values.items()
    }


def format_markdown(summary: dict[tuple[str, str], dict[str, tuple[float, float, int]]]) -> str:
    """Return the comparison as a Markdown table."""
    header = ["run", "prediction", "seeds", *(title for title, _ in QUANTITIES.values()), "published accuracy %"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for (name, way), quantities in summary.items():
        cells = [name, way, str(quantities["accuracy"][2])]
        for quantity, (_, digits) in QUANTITIES.items():
            mean, deviation, _ = quantities[quantity]
            cells.append(f"{mean:.{digits}f}" + ("" if math.isnan(deviation) else f" ± {deviation:.{digits}f}"))
        published = PUBLISHED.get(name) if way == "averaged" else None
        cells.append("" if published is None else f"{published[1]:.2f} ± {published[2]:.2f} ({published[0]})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_report(summary: dict[tuple[str, str], dict[str, tuple[float, float, int]]], path: Path) -> bool:
    """Draw accuracy and NLL of every run, with the published accuracy beside it; False without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    labels = [f"{name}, {way}" for name, way in summary]
    figure = Figure(figsize=(11, 1.4 + 0.32 * len(labels)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, quantity in zip(figure.subplots(1, 2, sharey=True), ("accuracy", "nll")):
        for row, quantities in enumerate(summary.values()):
            mean, deviation, _ = quantities[quantity]
            axes.errorbar(mean, row, xerr=0 if math.isnan(deviation) else deviation, fmt="o", capsize=3, color="C0")
        if quantity == "accuracy":
            published = [
                (row, PUBLISHED[name])
                for row, (name, way) in enumerate(summary)
                if way == "averaged" and name in PUBLISHED
            ]
            for row, (_, mean, deviation) in published:
                axes.errorbar(mean, row + 0.25, xerr=deviation or 0, fmt="s", capsize=3, color="C1")
            if published:
                axes.plot([], [], "s", color="C1", label="published")
                axes.legend()
        axes.set_yticks(range(len(labels)), labels)
        axes.set_xlabel(f"test {QUANTITIES[quantity][0]}")
        axes.grid(alpha=0.3)
    figure.axes[0].invert_yaxis()
    figure.savefig(path, dpi=130)
    return True


def run_report(folders: Sequence[str], output: str) -> None:
    """Print the table, and write report.md, report.json and report.png into the output folder.

    Raises:
        ValueError: see read_results and summarize.
        OSError: the folder cannot be written.
    """
    summary = summarize(read_results(folders))
    table = format_markdown(summary)
    target = Path(output)
    target.mkdir(parents=True, exist_ok=True)
    (target / "report.md").write_text(table + "\n", encoding="utf-8")
    content = [
        {
            "run": name,
            "prediction": way,
            **{key: {"mean": m, "std": None if math.isnan(s) else s, "seeds": n} for key, (m, s, n) in q.items()},
        }
        for (name, way), q in summary.items()
    ]
    (target / "report.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    drawn = draw_report(summary, target / "report.png")
    print(table)
    print(
        f"\nMean ± standard deviation over seeds. Written to {target}"
        + ("" if drawn else " (no picture: matplotlib is missing)")
    )
