"""Progress on stderr: a bar that redraws itself on a terminal, one plain line a stage otherwise."""

import contextlib
import os
import sys
import time
from typing import TextIO


class Progress:
    """Count work done towards a total; the end of a with block leaves the terminal's line as it was before the bar.

    A stream that cannot be written to (its terminal is gone, its disk is full) is no reason to end the work.

    Args:
        total: the work to do, in any unit.
        stream: where to write; stderr unless given.
    """

    def __init__(self, total: int, stream: TextIO | None = None):
        self.total, self.done, self.start, self.stage = total, 0, 0, ""  # start: done before now, by an earlier run
        self.stream = sys.stderr if stream is None else stream
        self.on_terminal = self.stream.isatty()
        self.started = time.perf_counter()

    def begin(self, stage: str) -> None:
        """Name what runs now; off a terminal this prints the one line of the stage."""
        self.stage = stage
        if not self.on_terminal:
            self._write(f"[{self._percent():3d} %] {stage}\n")

    def advance(self, work: int) -> None:
        """Add to the work done and, on a terminal, redraw the bar."""
        self.done += work
        if self.on_terminal:
            remaining = self.elapsed() * (self.total - self.done) / max(self.done - self.start, 1)
            text, room = f"{self._percent():3d} %  {remaining:4.0f} s left  {self.stage}", self._columns() - 1
            width = min(max(room - len(text) - 3, 10), 30)
            filled = width * self._percent() // 100
            line = f"[{'#' * filled}{'.' * (width - filled)}] {text}"[:room]  # one that wraps would not be redrawn
            # Return to the line's start, and erase what a longer line left.
            self._write(f"\r{line}\x1b[K")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        if self.on_terminal:
            self._write("\r\x1b[K")

    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self.started

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self.stream.write(text)
            self.stream.flush()

    def _columns(self) -> int:
        """The terminal's width; 1000 where it is unknown."""
        try:
            return os.get_terminal_size(self.stream.fileno()).columns or 1000
        except (OSError, ValueError, AttributeError):
            return 1000

    def _percent(self) -> int:
        return min(100 * self.done // max(self.total, 1), 100)
