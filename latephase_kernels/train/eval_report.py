"""The tables and the picture of `latephase eval`."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .figures import new_figure, save_figure
from .quantities import format_metrics, format_number, format_table

_BINS = 40


def format_source(results: Mapping[str, Any]) -> str:
    """Return in words of which run and of what in its folder a model is."""
    source = f"{results['name']}, seed {results['seed']}: {results['weights']}"
    if results["epoch"] is not None:
        source += f" of epoch {results['epoch']:.4g}, {'the' if results['finished'] else 'NOT the'} end of the run"
    return source


def format_evaluation(results: Mapping[str, Any]) -> str:
    """Return what evaluation.json holds as tables."""
    source = format_source(results)
    if len(results["metrics"]) == 1:
        source += "; one plain model, no members"
    parts = [source]
    parts.append(format_metrics(results["metrics"], "test set"))
    if results.get("disagreement") is not None:
        parts.append(f"Pairs of members that disagree on a test image: {100 * results['disagreement']:.2f} %")
    if results.get("out_of_distribution"):
        ways = next(iter(results["out_of_distribution"].values()))["auroc"]
        rows = [
            (
                name,
                str(found["images"]),
                *(format_number(found["auroc"][way], 4) for way in ways),
                format_number(None if found["disagreement"] is None else 100 * found["disagreement"], 2),
            )
            for name, found in results["out_of_distribution"].items()
        ]
        header = ("foreign set", "images", *(f"AUROC {way}" for way in ways), "disagreement %")
        parts.append(format_table(header, rows))
        parts.append("AUROC of predictive entropy, against the test set: 0.5 is chance, 1 perfect.")
    if "corruptions" in results:
        found = results["corruptions"]
        rows = [
            (kind, *(format_number(error, 2) for error in (*errors, found["mean_errors"][kind])))
            for kind, errors in found["errors"].items()
        ]
        parts.append(format_table(("error % at severity", "1", "2", "3", "4", "5", "mean"), rows))
        means = [
            f"{mean:.2f} % over {count} corruptions" if mean is not None else f"unknown over {count}, some are left out"
            for count, mean in found["mean_corruption_error"].items()
        ]
        model = "averaged model" if "averaged" in results["metrics"] else "ensemble"
        parts.append(
            f"Mean corruption error of the {model}: {', '.join(means)} (15: the benchmark's); plain means, not "
            "divided by a baseline's errors."
        )
    if results["left_out"]:
        parts.append(f"Left out, for reasons given above: {', '.join(results['left_out'])}")
    return "\n\n".join(parts)


def draw_entropies(entropies: Mapping[str, Mapping[str, Tensor]], num_classes: int, path: Path) -> bool:
    """Draw the test set's predictive entropies against each foreign set's; False without matplotlib.

    Args:
        entropies: [N] of each way to predict, by set; "test" is the one of the run.
        num_classes: bounds the entropy by its logarithm.
        path: the PNG file to write.
    """
    inside, largest = entropies["test"], math.log(num_classes)
    foreign = [name for name in entropies if name != "test"]
    figure = new_figure(max(3.6 * len(foreign), 5.0), 3.0 * len(inside) + 0.4)
    if figure is None:
        return False
    grid = figure.subplots(len(inside), len(foreign), squeeze=False, sharex=True, sharey=True)
    style = {"bins": _BINS, "range": (0.0, largest), "histtype": "stepfilled", "alpha": 0.55}
    for row, way in zip(grid, inside):
        for axes, name in zip(row, foreign):
            for label, values in (("test set", inside[way]), (name, entropies[name][way])):
                shares = [1.0 / len(values)] * len(values)
                axes.hist(values.numpy(), weights=shares, label=label, **style)
            axes.set(title=f"{name}, {way}", xlim=(0.0, largest))
            axes.set_yscale("log")  # most test images have next to no entropy
            axes.legend()
        row[0].set_ylabel(f"share of images, {_BINS} bins")
    for axes in grid[-1]:
        axes.set_xlabel("predictive entropy, nats")
    save_figure(figure, path, dpi=110)
    return True
