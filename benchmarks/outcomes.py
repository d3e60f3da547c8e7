"""A pytest plugin: a line of JSON as each test begins and ends, so that nothing is lost where a run hangs or is cut.

    pytest -p benchmarks.outcomes --outcomes FILE [--behind N] tests/…

A test that leaves the GPU's context broken ends the run with exit code LOST: every later one would fail for its sake.
`--behind N` leaves out the first N tests that are selected, those that an earlier run has seen.
"""

import json
import sys

import pytest

LOST = 70
_ERROR = 600  # characters of a failure's message that are kept, its end


def pytest_addoption(parser):
    parser.addoption("--outcomes", help="append a line of JSON for each test to this file")
    parser.addoption("--behind", type=int, default=0, help="leave out so many tests, the first ones")


def pytest_configure(config):
    if config.getoption("--outcomes"):
        config.pluginmanager.register(_Writer(config.getoption("--outcomes")))


@pytest.hookimpl(trylast=True)  # behind -k
def pytest_collection_modifyitems(config, items):
    seen = config.getoption("--behind")
    if seen:
        config.hook.pytest_deselected(items=items[:seen])
        del items[:seen]


class _Writer:
    def __init__(self, path):
        self.path = path

    def write(self, **fields):
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(fields) + "\n")

    def pytest_runtest_logstart(self, nodeid):
        self.write(test=nodeid, outcome="begun")

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            message = {} if report.outcome == "passed" else {"message": str(report.longrepr)[-_ERROR:]}
            self.write(test=report.nodeid, outcome=report.outcome, seconds=round(report.duration, 3), **message)
        torch = sys.modules.get("torch")
        if report.failed and torch is not None and torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                pytest.exit(f"the GPU's context is lost: {error}", returncode=LOST)


def read(path) -> list[dict]:
    """Return the last line of every test that began, in order: those that "begun" is the outcome of did not end."""
    found: dict[str, dict] = {}
    with open(path, encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):  # else it was cut off
                fields = json.loads(line)
                found[fields["test"]] = fields
    return list(found.values())
