"""Progress on stderr: a bar that redraws itself on a terminal, one plain line a stage otherwise."""

import sys
import time
from typing import TextIO


class Progress:
    """Count work done towards a total.

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
            print(f"[{self._percent():3d} %] {stage}", file=self.stream, flush=True)

    def advance(self, work: int) -> None:
        """Add to the work done and, on a terminal, redraw the bar."""
        self.done += work
        if self.on_terminal:
            filled = 30 * self._percent() // 100
            remaining = self.elapsed() * (self.total - self.done) / max(self.done - self.start, 1)
            bar = "#" * filled + "." * (30 - filled)
            # Return to the line's start, and erase what a longer line left.
            self.stream.write(f"\r[{bar}] {self._percent():3d} %  {remaining:4.0f} s left  {self.stage}\x1b[K")
            self.stream.flush()

    def end(self) -> None:
        """Leave the terminal's line as it was before the bar."""
        if self.on_terminal:
            self.stream.write("\r\x1b[K")
            self.stream.flush()

    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self.started

    def _percent(self) -> int:
        return min(100 * self.done // max(self.total, 1), 100)
