"""Pictures in files: where they begin."""

from typing import Any


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure of matplotlib's, in inches, that needs no display; None where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure(figsize=(width, height), layout="constrained")
