"""One forking process and one undisturbed run for all fault tests of a session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fault_arena import Bench


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """The undisturbed run, and what runs the disturbed ones."""
    made = Bench(tmp_path_factory.mktemp("faults"))
    yield made
    made.server.close()
