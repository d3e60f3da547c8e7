"""What `latephase demo` shows and writes: the table, the curves, results.json."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .figures import new_figure, save_figure
from .files import write_json

METHODS = {
    "sgd": "SGD",
    "swa": "SWA",
    "late_phase": "late-phase, averaged",
    "late_phase_ensemble": "late-phase, ensemble",
}


@dataclass
class Curve:
    """Test accuracy (%) and NLL over the number of training images seen."""

    images_seen: list[int] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)

    def add(self, images_seen: int, accuracy: float, nll: float) -> None:
        self.images_seen.append(images_seen)
        self.accuracy.append(accuracy)
        self.nll.append(nll)


@dataclass
class MethodResult:
    """One method and seed: test accuracy in %, NLL, training seconds after T0, images a second, the curve."""

    accuracy: float
    nll: float
    seconds: float
    images_per_second: float
    curve: Curve


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error, s / √n; None for a single value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


def _with_error(values: list[float], digits: int, sign: str = "") -> str:
    mean, error = mean_and_error(values)
    return f"{mean:{sign}.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def format_table(results: dict[str, list[MethodResult]], facts: dict) -> str:
    """The comparison as text, mean ± standard error over the seeds; the footer says under what conditions."""
    header = ("method", "test accuracy %", "minus SGD", "test NLL", "seconds", "images/s")
    rows = []
    for method, runs in results.items():
        gains = [run.accuracy - sgd.accuracy for run, sgd in zip(runs, results["sgd"], strict=True)]
        rows.append(
            (
                METHODS[method],
                _with_error([run.accuracy for run in runs], 2),
                "" if method == "sgd" else _with_error(gains, 2, "+"),
                _with_error([run.nll for run in runs], 4),
                f"{statistics.fmean(run.seconds for run in runs):.2f}",
                f"{statistics.fmean(run.images_per_second for run in runs):,.0f}",
            )
        )
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(["", *lines, "", *_footer(len(results["sgd"]), facts)])


def _footer(num_seeds: int, facts: dict) -> list[str]:
    retest, num_train = facts["collapsed"], facts["hyperparameters"]["num_train"]
    lines = [
        f"Digits 8×8, {num_train} training and {facts['num_test']} test images; network of {facts['parameters']:,} "
        f"parameters; K = {facts['num_members']} members; {num_seeds} seed{'s' * (num_seeds > 1)}"
        + (", mean ± standard error." if num_seeds > 1 else "."),
        f"All continue from the same state after {facts['images_before_t0']:,} images and see "
        f"{facts['images_after_t0']:,} more; seconds and images/s are of that continuation.",
        "The two late-phase rows are one training; the ensemble keeps all K members and averages their predictions.",
        f"Collapsed model of seed {retest['seed']}: {retest['accuracy_before_collapse']:.2f} % (NLL "
        f"{retest['nll_before_collapse']:.4f}) before collapsing; saved, loaded into the plain network and tested "
        f"again: {retest['accuracy']:.2f} % (NLL {retest['nll']:.4f}).",
        f"latephase_kernels {facts['latephase_kernels']}, backend {facts['backend']}, torch {facts['torch']}, "
        f"{facts['device']}, {facts['threads']} thread, {facts['seconds_total']:.0f} s in all.",
    ]
    if facts["quick"]:
        lines.append("--quick takes a few steps only: these figures mean nothing.")
    else:
        lines.append("So small a task shows that all of this works, not how the methods rank on large ones.")
    return lines


def write_results(results: dict[str, list[MethodResult]], facts: dict, path: Path) -> dict:
    """Write everything as JSON; lists under a method have one entry a seed. Returns what was written."""
    methods = {}
    for method, runs in results.items():
        entry: dict[str, object] = {"label": METHODS[method], "runs": [asdict(run) for run in runs]}
        for quantity in ("accuracy", "nll", "seconds", "images_per_second"):
            mean, error = mean_and_error([getattr(run, quantity) for run in runs])
            entry[quantity] = {"mean": mean, "standard_error": error}
        methods[method] = entry
    content = {**facts, "methods": methods}
    write_json(path, content)
    return content


def _points(curves: list[Curve], quantity: str, since: int = 0, until: float = math.inf) -> tuple[list, list, list]:
    """Images seen, mean and standard error over the seeds (0 for one seed) of the points in [since, until]."""
    points = []
    for images_seen, *values in zip(
        curves[0].images_seen, *(getattr(curve, quantity) for curve in curves), strict=True
    ):
        if since <= images_seen <= until:
            mean, error = mean_and_error(values)
            points.append((images_seen, mean, error or 0.0))
    images, means, errors = map(list, zip(*points, strict=True))
    return images, means, errors


def draw_curves(results: dict[str, list[MethodResult]], t0: int, path: Path) -> bool:
    """Draw accuracy and NLL over the images seen, mean and standard error over the seeds; False without matplotlib."""
    figure = new_figure(11, 4.2)
    if figure is None:
        return False
    style = {"marker": "o", "markersize": 4, "capsize": 2, "linewidth": 1.5}
    labels = {"accuracy": "test accuracy, %", "nll": "test NLL"}
    for axes, (quantity, label) in zip(figure.subplots(1, 2), labels.items(), strict=True):
        base = _points([run.curve for run in results["sgd"]], quantity, until=t0)
        axes.errorbar(*base, **style, color="grey", label="SGD up to T0, the same for all")
        for method, runs in results.items():
            points = _points([run.curve for run in runs], quantity, since=t0)
            axes.errorbar(*points, **style, label=METHODS[method])
        axes.axvline(t0, color="grey", linestyle="--", linewidth=1)
        axes.annotate("T0", (t0, 1), (4, -4), ("data", "axes fraction"), "offset points", va="top", color="grey")
        axes.set(xlabel="training images seen", ylabel=label)
        axes.grid(alpha=0.3)
        if quantity == "nll":
            axes.set_yscale("log")
    figure.axes[0].legend(loc="best")
    save_figure(figure, path, dpi=130)
    return True
