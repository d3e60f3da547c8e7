"""Tables and pictures of benchmarks/study.py: mean ± standard error, and the difference of paired seeds."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from latephase_kernels.train.demo_report import mean_and_error
from latephase_kernels.train.figures import new_figure, save_figure
from latephase_kernels.train.files import write_whole

Summary = dict[str, dict[str, dict[str, float]]]


def summarize(values: Mapping[str, Mapping[str, Sequence[float]]], compared: Mapping[str, str]) -> Summary:
    """Return mean and error of each row and quantity, and of its differences seed by seed to the compared row.

    Args:
        values: row → quantity → one value a seed.
        compared: row → the row it is compared with; itself for none.
    """
    summary: Summary = {}
    for title, quantities in values.items():
        for quantity, own in quantities.items():
            mean, error = mean_and_error(own)
            found = {"mean": mean, "error": error}
            if compared[title] != title:
                other = values[compared[title]][quantity]
                differences = [a - b for a, b in zip(own, other, strict=True)]
                found["difference"], found["difference error"] = mean_and_error(differences)
            summary.setdefault(title, {})[quantity] = found
    return summary


def format_table(
    summary: Summary, compared: Mapping[str, str], quantities: Mapping[str, tuple[str, int]], seeds: int
) -> str:
    """Return the table as Markdown, with a line on what its numbers are."""
    header = ["method"]
    for heading, _ in quantities.values():
        header += [heading, "difference"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for title, found in summary.items():
        cells = [title]
        for quantity, (_, digits) in quantities.items():
            own = found[quantity]
            cells.append(f"{own['mean']:.{digits}f} ± {own['error']:.{digits}f}")
            signed = (
                ""
                if compared[title] == title
                else f"{own['difference']:+.{digits}f} ± {own['difference error']:.{digits}f}"
            )
            cells.append(signed)
        lines.append("| " + " | ".join(cells) + " |")
    first = next(iter(summary))
    others = [f"{title} to {other}" for title, other in compared.items() if other not in (first, title)]
    notes = f"{seeds} seeds; mean ± standard error; differences are to {first}, seed by seed"
    return "\n".join([*lines, "", f"{notes}{''.join(f' ({other})' for other in others)}."])


def insert_table(file: Path, name: str, table: str) -> None:
    """Put a table between the file's lines `<!-- NAME -->` and `<!-- end NAME -->`, which are appended if need be.

    Raises:
        ValueError: the file has one of the two lines only.
    """
    begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
    content = file.read_text(encoding="utf-8") if file.exists() else "# Study\n"
    if (begin in content) != (end in content):
        raise ValueError(f"study: {file} must have both lines {begin} and {end}, or none")
    if begin not in content:
        content = f"{content.rstrip()}\n\n{begin}\n{end}\n"
    before, rest = content.split(begin, 1)
    write_whole(file, f"{before}{begin}\n{table}\n{end}{rest.split(end, 1)[1]}")


def draw(summary: Summary, compared: Mapping[str, str], quantities: Mapping[str, tuple[str, int]], path: Path) -> bool:
    """Draw the differences with bars of two standard errors, one panel a quantity; False without matplotlib."""
    titles = [title for title in summary if compared[title] != title]
    figure = new_figure(3.2 + 3.6 * len(quantities), 0.34 * len(titles) + 1.0)
    if figure is None:
        return False
    panels = figure.subplots(1, len(quantities), sharey=True, squeeze=False)[0]
    for axes, (quantity, (heading, _)) in zip(panels, quantities.items()):
        found = [summary[title][quantity] for title in titles]
        errors = [2 * own["difference error"] for own in found]
        axes.errorbar([own["difference"] for own in found], range(len(titles)), xerr=errors, fmt="o", capsize=3)
        axes.axvline(0.0, color="black", linewidth=0.8)
        axes.set_xlabel(f"{heading}: difference, ± 2 standard errors")
        axes.grid(alpha=0.3)
    panels[0].set_yticks(range(len(titles)), titles)
    panels[0].set_ylim(len(titles) - 0.5, -0.5)
    save_figure(figure, path, dpi=110)
    return True
