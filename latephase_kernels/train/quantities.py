"""What runs are measured in, and how it is shown: one statement for `latephase train`, `eval` and `report`."""

from collections.abc import Iterable, Mapping, Sequence

# By the key in a run's metrics: its title, and the digits shown.
QUANTITIES: dict[str, tuple[str, int]] = {
    "accuracy": ("accuracy %", 2),
    "nll": ("NLL", 4),
    "ece": ("ECE %", 2),
    "brier": ("Brier", 4),
    "bits_per_character": ("bits per character", 4),
    "validation_bits_per_character": ("validation bits per character", 4),
}


# The keys of a run on images and of one on a text; the first is what published figures are of.
KINDS = (("accuracy", "nll", "ece", "brier"), ("bits_per_character", "validation_bits_per_character"))


def kind_of(metrics: Iterable[str]) -> tuple[str, ...]:
    """Return the one of KINDS that is whole among these keys, () if none is."""
    found = set(metrics)
    return next((kind for kind in KINDS if found.issuperset(kind)), ())


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return lines of cells, right-aligned in columns."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in (header, *rows))


def format_number(value: float | None, digits: int) -> str:
    """Return a number with so many digits after the point, "-" for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def format_metrics(metrics: Mapping[str, Mapping[str, float]], title: str) -> str:
    """Return the metrics of several ways to predict as a table, one row a way."""
    kind = kind_of(next(iter(metrics.values()), ()))
    rows = [(way, *(format_number(found[key], QUANTITIES[key][1]) for key in kind)) for way, found in metrics.items()]
    return format_table((title, *(QUANTITIES[key][0] for key in kind)), rows)
