"""Which promise a test proves, and how many cases it tried: what the table is made of.

A pytest plugin. Each test with the marker ``promise(number)`` counts as one case, or as many as it
tells ``count_cases``. With ``--tally FILE`` all is written there as JSON.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

_CASES = "cases"
CountCases = Callable[[int], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    parser.addoption("--timed", action="store_true", help="also hold the clock to what is promised")
    parser.addoption("--tally", type=Path, help="write what every promise's tests did, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker, and collect outcomes where they are wanted."""
    config.addinivalue_line("markers", "promise(number): proves that promise of tests.faults")
    if (path := config.getoption("--tally")) is not None:
        config.pluginmanager.register(_Tally(path))


@pytest.fixture
def count_cases(record_property: Callable[[str, object], None]) -> CountCases:
    """Return what a test tells its number of cases."""
    return lambda number: record_property(_CASES, number)


@pytest.fixture
def is_timed(request: pytest.FixtureRequest) -> bool:
    """Tell whether seconds are looked at: not on machines that do other things, such as CI's."""
    return bool(request.config.getoption("--timed"))


class _Tally:
    """One row for each part of a promise's test: the promise, the test, its outcome, its cases."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._promises: dict[str, int] = {}
        self._rows: list[dict[str, Any]] = []

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            if (marker := item.get_closest_marker("promise")) is not None:
                self._promises[item.nodeid] = marker.args[0]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        promise = self._promises.get(report.nodeid)
        is_whole = report.when == "call" or report.outcome != "passed"  # set-up can skip or fail
        if promise is None or not is_whole:
            return
        reason = ""
        if report.skipped and isinstance(report.longrepr, tuple):
            reason = str(report.longrepr[2]).removeprefix("Skipped: ")
        self._rows.append(
            {
                "promise": promise,
                "test": report.nodeid.partition("[")[0],
                "outcome": report.outcome,
                "reason": reason,
                "cases": dict(report.user_properties).get(_CASES, 1),
            }
        )

    def pytest_sessionfinish(self) -> None:
        self._path.write_text(json.dumps(self._rows))
