"""What the tests of faults share: processes, what they run, and a place that syncs at once."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from faults.arena import Arena
from faults.runs import Runners

_MEMORY = Path("/dev/shm")
_MIN_FREE_BYTES = 2 * 10**9


@pytest.fixture(scope="session")
def tmp_path_factory(request: pytest.FixtureRequest) -> Iterator[pytest.TempPathFactory]:
    """Return what makes directories in memory, where there is room: thousands of runs sync there.

    What is lost with power is tried on file systems of their own.
    """
    factory = pytest.TempPathFactory.from_config(request.config, _ispytest=True)
    if not os.access(_MEMORY, os.W_OK) or _free_bytes(_MEMORY) < _MIN_FREE_BYTES:
        yield factory
        return
    with tempfile.TemporaryDirectory(prefix="ckptavg-faults-", dir=_MEMORY) as directory:
        factory._given_basetemp = Path(directory, "pytest")
        yield factory


def _free_bytes(directory: Path) -> int:
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


@pytest.fixture(scope="session")
def runners() -> Iterator[Runners]:
    """Return one runner a core."""
    with Runners() as runners:
        yield runners


@pytest.fixture(scope="session")
def arena(runners: Runners, tmp_path_factory: pytest.TempPathFactory) -> Arena:
    """Return scenarios for every runner."""
    return Arena(runners, tmp_path_factory.mktemp("arena"))
