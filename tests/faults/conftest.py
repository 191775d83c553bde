"""One forking process and one undisturbed run for all fault tests of a session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_arena import Bench


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The slow ones take an hour: only where they are asked for by their mark."""
    if "slow" in config.option.markexpr:
        return
    here = Path(__file__).parent
    slow = [item for item in items if here in item.path.parents and item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """The undisturbed run, and what runs the disturbed ones."""
    made = Bench(tmp_path_factory.mktemp("faults"))
    yield made
    made.server.close()
