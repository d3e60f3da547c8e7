"""Pictures in files: where they begin and end."""

import io
from pathlib import Path
from typing import Any

from .files import write_whole


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure of matplotlib's, in inches, that needs no display; None where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: Path, *, dpi: int) -> None:
    """Write a figure as PNG, as write_whole does."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=dpi)
    write_whole(path, content.getvalue())
