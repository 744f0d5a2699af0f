"""What the tests of faults share: processes, and what they run."""

from collections.abc import Iterator

import pytest

from faults.arena import Arena
from faults.runs import Runners


@pytest.fixture(scope="session")
def runners() -> Iterator[Runners]:
    """Return one runner a core."""
    with Runners() as runners:
        yield runners


@pytest.fixture(scope="session")
def arena(runners: Runners, tmp_path_factory: pytest.TempPathFactory) -> Arena:
    """Return scenarios for every runner."""
    return Arena(runners, tmp_path_factory.mktemp("arena"))
