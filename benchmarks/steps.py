"""Runs commands under time limits: a step that fails, hangs or is cut never takes others with it.

The output of each step goes to a log as it comes. A step that runs tests goes on behind a test that hangs, crashes or
breaks the GPU's context, in a new process.
"""

import importlib.util
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from benchmarks import outcomes

ROOT = Path(__file__).parents[1]
PASSED = "passed"
TAIL = 2000  # characters of a log that a summary repeats
MOST_STARTS = 8  # of the tests of a step
MOST_NAMED = 20  # tests that failed, in a summary
_POLL = 0.1  # seconds


@dataclass
class Step:
    """A command with a name, its limit in seconds, and what it adds to the environment.

    needs: modules without which it is left out.
    hangs: of a step that runs tests, the seconds after which a test is taken to hang; its command takes the arguments
        of pytest.
    """

    name: str
    command: list[str]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    hangs: float | None = None


class _Cut(Exception):
    """A process was killed at its limit."""


class _Hangs(Exception):
    """A process was killed because nothing happened."""


def _kill(process: subprocess.Popen) -> None:
    """End a process and all that it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(5)
    except (ProcessLookupError, subprocess.TimeoutExpired):  # a driver may hold it for a while
        pass


def _run(step: Step, arguments: list[str], log: TextIO, end: float, watched: Path | None = None) -> int:
    """Run a step's command; return its exit code.

    Raises:
        _Cut: `end` came first.
        _Hangs: `watched`, once begun, did not grow for the step's seconds.
    """
    process = subprocess.Popen(
        [*step.command, *arguments], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
        env={**os.environ, **step.environment}, start_new_session=True,
    )  # fmt: skip
    before = size = watched.stat().st_size if watched else 0
    since = time.monotonic()
    while True:
        try:
            return process.wait(_POLL)
        except subprocess.TimeoutExpired:
            now = time.monotonic()
        if now >= end:
            _kill(process)
            raise _Cut
        if watched and watched.stat().st_size != size:
            size, since = watched.stat().st_size, now
        if step.hangs and size > before and now - since > step.hangs:
            _kill(process)
            raise _Hangs


def _run_command(step: Step, log: TextIO, end: float) -> dict:
    try:
        code = _run(step, [], log, end)
    except _Cut:
        return {"ended": "ran out of time"}
    return {"ended": PASSED if code == 0 else f"failed with exit code {code}"}


def _run_tests(step: Step, log: TextIO, end: float, lines: Path) -> dict:
    lines.write_text("")
    ended, tests = f"stopped after {MOST_STARTS} starts", []
    for _ in range(MOST_STARTS):
        behind = len(tests)
        try:
            code = _run(step, ["--outcomes", str(lines), "--behind", str(behind)], log, end, lines)
        except _Hangs:
            code = None
        except _Cut:
            tests, ended = outcomes.read(lines), "ran out of time"
            if tests and tests[-1]["outcome"] == "begun":
                ended += f" in {tests.pop()['test']}"
            break
        tests = outcomes.read(lines)
        if code in (0, 1, 5):  # all done: passed, failed, or none left
            ended = PASSED if tests else "failed: no tests were found"
            break
        if len(tests) == behind:
            ended = f"failed with exit code {code} before any test"
            break
    bad = [test for test in tests if test["outcome"] not in ("passed", "skipped")]
    if bad:
        ended = ("" if ended == PASSED else f"{ended}; ") + f"{len(bad)} of {len(tests)} tests failed"
    count = {name: sum(test["outcome"] == name for test in tests) for name in ("passed", "failed", "skipped", "begun")}
    if ended == PASSED and not count["passed"]:
        ended = "left out: every test skips here"
    return {"ended": ended, "tests": count, "bad": bad[:MOST_NAMED]}


def run(step: Step, folder: Path, end: float) -> dict:
    """Run a step until its limit, or `end` on time.monotonic's clock if that is sooner; return how it ended."""
    start = time.monotonic()
    end = min(end, start + step.limit)
    if end - start < 1:
        return {"ended": "not begun: no time left", "seconds": 0.0}
    missing = [] if shutil.which(step.command[0]) else [step.command[0]]
    missing += [name for name in step.needs if importlib.util.find_spec(name) is None]
    if missing:
        return {"ended": f"left out: {', '.join(missing)} is not installed", "seconds": 0.0}
    path = folder / f"{step.name.replace(' ', '_')}.log"
    with open(path, "w", encoding="utf-8") as log:
        found = _run_tests(step, log, end, path.with_suffix(".jsonl")) if step.hangs else _run_command(step, log, end)
    found["seconds"] = round(time.monotonic() - start, 1)
    if found["ended"] != PASSED:
        found["tail"] = path.read_text(encoding="utf-8", errors="replace")[-TAIL:]
    return found


def run_together(
    steps: list[Step], folder: Path, end: float, ended: Callable[[str, dict], object] = lambda name, found: None
) -> dict[str, dict]:
    """Run steps at the same time; return how each ended, by name, and call ended(name, how) as each one does."""
    with ThreadPoolExecutor(len(steps)) as pool:
        names = {pool.submit(run, step, folder, end): step.name for step in steps}
        for future in as_completed(names):
            ended(names[future], future.result())
        return {name: future.result() for future, name in names.items()}
